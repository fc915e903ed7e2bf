"""RMIA: against loops, by hand, its ties, views, tuned settings, its equivalent BASE, and on bad input."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cwrf.attacks import (
    Evidence,
    base_attack,
    create_attack,
    rmia,
    tune_rmia,
)
from lightning_cwrf.attacks.rmia import TEMPERATURES
from lightning_cwrf.attacks.signals import tempered_probability
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.shadows import balanced_membership
from tests.attacks.cases import close, evidence, seeds, shadowed, tensor
from tests.oracles import attacks as oracle


@pytest.mark.slow
@given(
    st.integers(0, 10_000),
    st.booleans(),
    st.sampled_from([1.0, 1.5, 2.0]),
    st.booleans(),
    st.sampled_from([0.0, 0.2, 0.34, 0.49]),
)
def test_rmia_against_loops(seed, online, gamma, coarse, trim):
    torch.manual_seed(seed)
    n, m, k = 7, 11, 6
    target, shadows = torch.rand(n), torch.rand(k, n)
    z, z_shadows = torch.rand(m), torch.rand(k, m)
    if coarse:  # many equal ratios
        target, shadows, z, z_shadows = (t.mul(2).ceil().div(2) for t in (target, shadows, z, z_shadows))
    membership = balanced_membership(k, n, seed)
    case = target, shadows, membership, z, z_shadows
    settings = {"online": online, "gamma": gamma, "offline_a": 0.3, "trim": trim}
    lists = [t.double().tolist() for t in (target, shadows)]
    lists = *lists, membership.tolist(), z.double().tolist(), z_shadows.double().tolist()
    close(rmia(*case, **settings, break_ties=False), oracle.rmia(*lists, online, gamma, 0.3, trim))
    close(rmia(*case, **settings), oracle.rmia_with_ties_broken(*lists, online, gamma, 0.3, trim))


@pytest.mark.slow
@given(seeds, st.booleans(), st.integers(1, 5), st.sampled_from([1.0, 1.3]))
def test_the_vote_over_views_against_loops(seed, online, q, gamma):
    """More than half of the views dominate; with an even number, exactly half are not enough."""
    torch.manual_seed(seed)
    n, m, k = 6, 9, 4
    views, shadow_views = torch.rand(q, n).double(), torch.rand(q, k, n).double()
    z, z_shadows, membership = torch.rand(m).double(), torch.rand(k, m).double(), balanced_membership(k, n, seed)
    case = views, shadow_views, membership, z, z_shadows
    ours = rmia(*case, online=online, gamma=gamma, offline_a=0.3, break_ties=False)
    close(ours, oracle.rmia_votes(*(part.tolist() for part in case), online, gamma, 0.3, 0.0))


def test_rmia_by_hand():
    """Pr(x) = .5 and .4; ratios 1.6 and .5. The population's ratios are 1/2, 1 and 2."""
    shadows, membership = tensor([0.7, 0.2], [0.3, 0.6]), torch.tensor([[True, False], [False, True]])
    target = tensor(0.8, 0.2)
    population = tensor(0.2, 0.4, 0.8), tensor([0.4, 0.2, 0.3], [0.4, 0.6, 0.5])
    case = target, shadows, membership, *population
    # ratio(x) / ratio(z): 3.2, 1.6, .8 and 1, .5, .25.
    for gamma, shares in ((1.0, [2 / 3, 1 / 3]), (1.6, [2 / 3, 0]), (2.0, [1 / 3, 0]), (3.3, [0, 0])):
        found = rmia(*case, gamma=gamma, break_ties=False)
        assert found.tolist() == pytest.approx(shares)
        broken = [(3 * s + r / (1 + r)) / 4 for s, r in zip(shares, (1.6, 0.5), strict=True)]
        assert rmia(*case, gamma=gamma).tolist() == pytest.approx(broken)
    assert torch.equal(rmia(*case), rmia(*case, online=True, gamma=2.0, break_ties=True))
    # Offline with a = .3: Pr(x) = (1.3 · .3 + .7) / 2 and (1.3 · .2 + .7) / 2, Pr(z) = (1.3 · .4 + .7) / 2.
    ratios = [0.8 / 0.545, 0.2 / 0.48]
    others = [0.2 / 0.61, 0.4 / 0.61, 0.8 / 0.61]
    shares = [sum(r / z >= 2 for z in others) / 3 for r in ratios]
    offline = rmia(*case, online=False, offline_a=0.3)
    assert offline.tolist() == pytest.approx([(3 * s + r / (1 + r)) / 4 for s, r in zip(shares, ratios, strict=True)])


@pytest.mark.slow
@given(seeds, st.booleans())
def test_breaking_ties_keeps_the_order_of_shares(seed, online):
    target, shadows, membership = shadowed(seed, n=40)
    target, shadows = target.sigmoid(), shadows.sigmoid()
    population = torch.rand(5), torch.rand(6, 5)
    case = target, shadows, membership, *population
    plain, broken = (rmia(*case, online=online, offline_a=0.3, break_ties=b) for b in (False, True))
    for i in range(40):
        for j in range(40):
            if plain[i] > plain[j]:
                assert broken[i] > broken[j]
    ratio = target / shadows.mean(0)
    same = plain == plain.mode().values
    if online and int(same.sum()) > 1:
        assert torch.equal(broken[same].argsort(), ratio[same].argsort())
    assert 0 <= float(broken.min()) <= float(broken.max()) <= 1


@given(seeds, st.booleans(), st.sampled_from([1.0, 2.0, 7.0]))
def test_gamma_does_not_change_the_order_and_base_has_the_same(seed, online, gamma):
    target, shadows, membership = shadowed(seed, n=40)
    target, shadows = target.sigmoid(), shadows.sigmoid()
    case = target, shadows, membership, torch.rand(5), torch.rand(6, 5)
    order = rmia(*case, online=online, offline_a=0.3).argsort()
    assert torch.equal(rmia(*case, online=online, offline_a=0.3, gamma=gamma).argsort(), order)
    if online:
        base = base_attack(-target.log(), -shadows.log(), membership)
        assert torch.equal(base.argsort(), order)
        close(base, oracle.base((-target.log()).tolist(), (-shadows.log()).tolist()))


def test_base_of_evidence_has_the_order_of_rmia_and_needs_no_population():
    seen, is_member = evidence(n=60)
    ours = create_attack("base")(replace(seen, population_logits=None, shadow_population_logits=None))
    assert torch.equal(ours.argsort(), create_attack("rmia")(seen).argsort())
    assert float(membership_auroc(ours, is_member)) == float(membership_auroc(create_attack("rmia")(seen), is_member))
    # Where every probability of the true class is 0 in float64, the losses still have an order.
    far = seen.logits * 1000
    assert torch.isfinite(create_attack("base")(replace(seen, logits=far, shadow_logits=far.expand(8, -1, -1)))).all()


@pytest.mark.slow
@given(
    seeds,
    st.booleans(),
    st.sampled_from([None, 0.0, 0.7]),
    st.sampled_from([0.0, 0.26]),
    st.sampled_from([1, 4]),
    st.booleans(),
)
@settings(max_examples=30)
def test_tuned_settings_are_the_best_on_shadow_models(seed, online, a, trim, models, paired):
    torch.manual_seed(seed)
    membership = balanced_membership(8, 14, seed) if paired else torch.rand(6, 14) < 0.5
    logits = torch.randn(len(membership), 14).double() + membership.double()
    choices = {1.0: logits.sigmoid(), 2.0: (logits / 2).sigmoid()}
    lists = {t: p.tolist() for t, p in choices.items()}
    candidates = [0.3 if online else i / 10 for i in range(1 if online else 11)] if a is None else [a]
    expected = oracle.tuned_rmia(lists, membership.tolist(), online, candidates, trim, models)
    found = tune_rmia(choices, membership, online=online, offline_a=a, trim=trim, models=models)
    assert found == pytest.approx(expected)


def test_the_attacked_model_and_its_pair_are_not_among_those_it_is_attacked_with():
    """A model's copies, as a bootstrap draws them, and the other half of its pair may hold anything."""
    torch.manual_seed(0)
    membership = balanced_membership(6, 60).repeat(2, 1)
    own, others = [1, 6, 7], [2, 3, 4, 5, 8, 9, 10, 11]  # the pair, the copy and the copy's pair; all others
    changed = {"own": 0, "others": 0}
    for _ in range(10):
        choices = {t: torch.rand(12, 60).double() for t in (1.0, 2.0)}
        found = tune_rmia(choices, membership, models=1)
        for what, rows in (("own", own), ("others", others)):
            for each in choices.values():
                each[rows] = torch.rand(len(rows), 60).double()
            changed[what] += tune_rmia(choices, membership, models=1) != found
    assert changed["own"] == 0
    assert changed["others"] > 0


@pytest.mark.parametrize("name", ["rmia", "rmia_views"])
def test_offline_temperature_and_a_are_tuned_together_without_the_audited_model(name):
    seen, _ = evidence(n=300)
    by_view = (lambda s: s) if name == "rmia" else (lambda s: s.transpose(0, 1))
    of = "examples" if name == "rmia" else "views"
    shadows = {t: by_view(seen.shadow_signals(tempered_probability(t), of)) for t in TEMPERATURES}
    t, a = tune_rmia(shadows, seen.membership)
    scores = create_attack(name, online=False)(seen)
    assert torch.equal(scores, create_attack(name, online=False, temperature=t, offline_a=a)(seen))
    assert torch.equal(scores, create_attack(name, online=False, temperature="tuned", offline_a="tuned")(seen))
    fixed = create_attack(name, online=False, temperature=1.0)(seen)
    alone = tune_rmia({1.0: shadows[1.0]}, seen.membership)[1]
    assert torch.equal(fixed, create_attack(name, online=False, temperature=1.0, offline_a=alone)(seen))
    # Online the published temperature is the default, and "tuned" is tuned online.
    online = create_attack(name)(seen)
    assert torch.equal(online, create_attack(name, temperature=1.0)(seen))
    best = tune_rmia(shadows, seen.membership, online=True)[0]
    assert torch.equal(create_attack(name, temperature="tuned")(seen), create_attack(name, temperature=best)(seen))


def test_the_temperature_is_that_of_the_softmax():
    seen, _ = evidence(n=50)
    hot = {field: getattr(seen, field) / 4 for field in ("logits", "shadow_logits", "population_logits")}
    hot["shadow_population_logits"] = seen.shadow_population_logits / 4
    scores = create_attack("rmia", temperature=4.0)(seen)
    torch.testing.assert_close(scores, create_attack("rmia", temperature=1.0)(replace(seen, **hot)))


def test_tuning_on_many_examples_uses_every_second(monkeypatch):
    seen, _ = evidence(n=300)
    monkeypatch.setattr(sys.modules[rmia.__module__], "TUNED_ON", 150)
    half = Evidence(seen.logits[::2], seen.targets[::2], seen.shadow_logits[:, ::2], seen.membership[:, ::2])
    t, a = tune_rmia({t: half.shadow_signals(tempered_probability(t)) for t in TEMPERATURES}, half.membership)
    scores = create_attack("rmia", online=False)(seen)
    assert torch.equal(scores, create_attack("rmia", online=False, temperature=t, offline_a=a)(seen))


def test_tuning_finds_a_better_temperature_where_there_is_one():
    """Membership moves the true class's logit by as much for every example, which the softmax hides if it is sure."""
    torch.manual_seed(0)
    n, k, m = 600, 8, 50
    membership, is_member, level = balanced_membership(k, n), torch.rand(n) < 0.5, 4 * torch.randn(n) + 4

    def logits(signal):
        return torch.stack([signal, torch.zeros_like(signal)], -1)

    seen = Evidence(
        logits=logits(level + is_member + torch.randn(n)),
        targets=torch.zeros(n).long(),
        shadow_logits=logits(level + membership + torch.randn(k, n)),
        membership=membership,
        population_logits=logits(torch.randn(m)),
        population_targets=torch.zeros(m).long(),
        shadow_population_logits=logits(torch.randn(k, m)),
    )

    def auc(**settings):
        return float(membership_auroc(create_attack("rmia", **settings)(seen), is_member))

    published = auc(online=False, temperature=1.0, offline_a=0.3)
    assert auc(online=False) > published + 0.03
    assert auc(temperature="tuned") > auc() + 0.03


def test_too_few_shadow_models_to_tune_is_an_error_with_the_fix():
    seen, _ = evidence(n=20, k=2)
    message = "cannot be tuned on 2 shadow models and 20 examples: .* pass temperature=1.0 and offline_a=0.3"
    with pytest.raises(ValueError, match=message):
        create_attack("rmia", online=False)(seen)
    fixed = create_attack("rmia", online=False, temperature=1.0, offline_a=0.3)
    assert fixed(seen).shape == (20,)
    with pytest.raises(ValueError, match="at least one temperature"):
        tune_rmia({}, seen.membership)
    with pytest.raises(ValueError, match="membership must be bool of shape"):
        tune_rmia({1.0: torch.rand(3, 20)}, seen.membership)
    with pytest.raises(ValueError, match="no setting can be tuned"):
        tune_rmia({1.0: torch.zeros(8, 40)}, balanced_membership(8, 40), offline_a=1.0)
    with pytest.raises(ValueError, match=r"target \(q, n\) and shadows \(q, k, n\)"):
        rmia(torch.rand(3, 9), torch.rand(2, 6, 9), balanced_membership(6, 9), torch.rand(4), torch.rand(6, 4))


@pytest.mark.parametrize("name", ["target", "shadows", "population_target", "population_shadows"])
def test_probabilities_may_exceed_one_by_rounding_alone(name):
    case = {
        "target": torch.full((3,), 0.5, dtype=torch.float64),
        "shadows": torch.full((2, 3), 0.5, dtype=torch.float64),
        "membership": torch.tensor([[True] * 3, [False] * 3]),
        "population_target": torch.full((4,), 0.5, dtype=torch.float64),
        "population_shadows": torch.full((2, 4), 0.5, dtype=torch.float64),
    }
    for value, fine in ((1 + 5e-7, True), (0.0, True), (1 + 2e-6, False), (-1e-9, False)):
        spoiled = {**case, name: case[name].clone()}
        spoiled[name].view(-1)[2] = value  # of the first model
        if fine:
            rmia(**spoiled)
        else:
            with pytest.raises(ValueError, match=rf"{name} must hold probabilities; examples \[2\] lie outside"):
                rmia(**spoiled)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 0.5}, "gamma must be a number of at least 1, not 0.5"),
        ({"offline_a": 1.5}, r"offline_a must be a number in \[0, 1\], not 1.5"),
        ({"trim": 0.5}, r"trim must be a number in \[0, 0.5\), not 0.5"),
        ({"target": torch.full((9,), 1.2)}, "target must hold probabilities"),
        ({"population_target": torch.rand(0), "population_shadows": torch.rand(6, 0)}, "m >= 1"),
        ({"population_shadows": torch.rand(5, 4)}, "population_shadows must have shape"),
        ({"population_shadows": torch.zeros(6, 4)}, "probability 0 under every shadow model"),
        ({"population_target": torch.tensor([0.1, float("nan"), 0.2, 0.3])}, r"population_target .* examples \[1\]"),
    ],
)
def test_invalid_input_raises(changes, message):
    case = {
        "target": torch.rand(9),
        "shadows": torch.rand(6, 9),
        "membership": balanced_membership(6, 9),
        "population_target": torch.rand(4),
        "population_shadows": torch.rand(6, 4),
    }
    with pytest.raises(ValueError, match=message):
        rmia(**{**case, **changes})
