"""The attacks beyond LiRA, RMIA and the loss attack, against loops; every attack by name, on good and on bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cwrf import attacks
from lightning_cwrf.attacks import (
    Evidence,
    attack_p,
    attack_r,
    augmentation_attack,
    available_attacks,
    bavaria,
    calibrated,
    create_attack,
    lira,
    logit_signal,
    modified_entropy,
    neural_attack,
    quantile_regression,
    register_attack,
    rmia,
    tune_offline_a,
)
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.shadows import balanced_membership
from tests.oracles import formulas


def shadowed(seed=0, n=9, k=6):
    torch.manual_seed(seed)
    return torch.randn(n).double(), torch.randn(k, n).double(), balanced_membership(k, n, seed)


def close(ours, theirs, tolerance=1e-8):
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=tolerance, atol=tolerance)


seeds = st.integers(0, 9999)


@given(seeds, st.sampled_from(["t", "normal"]), st.sampled_from([0.5, 2.0, 10.0]), st.sampled_from([4, 8]))
def test_bavaria_against_loops(seed, predictive, prior, k):
    target, shadows, membership = shadowed(seed, k=k)
    lists = target.tolist(), shadows.tolist(), membership.tolist()
    ours = bavaria(target, shadows, membership, predictive=predictive, prior_models=prior)
    close(ours, formulas.bavaria(*lists, True, predictive, prior))
    offline = bavaria(target, shadows, membership, online=False, predictive=predictive, prior_models=prior)
    # Student's distribution function is an approximation that rises as the exact one does.
    close(offline, formulas.bavaria(*lists, False, predictive, prior), 1e-8 if predictive == "normal" else 0.02)


def test_bavaria_with_many_models_is_lira():
    """The prior counts for two models; among hundreds it is gone."""
    target, shadows, membership = shadowed(n=20, k=800)
    shadows += 3 * torch.randn(20)  # examples differ, so the prior's mean tells little of each
    target += shadows.mean(0)
    own = lira(target, shadows, membership, variance="per_example")
    assert float((bavaria(target, shadows, membership, predictive="normal") - own).abs().max()) < 0.05


def test_bavaria_beats_lira_at_few_models_of_unequal_spread():
    """Examples differ in spread, and four models do not tell it: the case that the prior is for."""
    n, k = 4000, 4
    torch.manual_seed(0)
    membership, spread = balanced_membership(k, n, 0), torch.empty(n).exponential_() + 0.2
    shadows = spread * torch.randn(k, n) + membership.float()
    is_member = torch.rand(n) < 0.5
    target = spread * torch.randn(n) + is_member.float()
    auc = {
        "t": membership_auroc(bavaria(target, shadows, membership), is_member),
        "normal": membership_auroc(bavaria(target, shadows, membership, predictive="normal"), is_member),
        "pooled": membership_auroc(lira(target, shadows, membership, variance="pooled"), is_member),
        "own": membership_auroc(lira(target, shadows, membership, variance="per_example"), is_member),
    }
    assert min(auc["t"], auc["normal"]) > max(auc["pooled"], auc["own"]) + 0.01, auc


@given(seeds, st.booleans(), st.sampled_from([1, 3]), st.booleans())
def test_lira_of_the_reference_code_against_that_code(seed, online, queries, balanced):
    torch.manual_seed(seed)
    target, shadows = torch.randn(queries, 9).double(), torch.randn(queries, 7 + balanced, 9).double()
    membership = balanced_membership(8, 9, seed)
    if not balanced:  # some examples have more models of a side than others
        membership = membership[:7]
    expected = formulas.lira_reference_code(target.tolist(), shadows.tolist(), membership.tolist(), online)
    close(lira(target, shadows, membership, online=online, variance="reference_code"), expected)
    if queries == 1:
        close(lira(target[0], shadows[0], membership, online=online, variance="reference_code"), expected)


def test_offline_the_reference_code_is_two_sided():
    """An example that the model is unusually unsure of scores as high as one it is unusually sure of."""
    shadows, membership = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]]), torch.zeros(2, 3, dtype=torch.bool)
    target = torch.tensor([-2.0, 1.0, 4.0])  # around the median, 1, of deviation 1
    scores = lira(target, shadows, membership, online=False, variance="reference_code")
    at_median = math.log(2 * math.pi) / 2
    assert scores.tolist() == pytest.approx([at_median + 4.5, at_median, at_median + 4.5])
    assert lira(target, shadows, membership, online=False).diff().min() > 0


def test_the_reference_code_takes_medians_and_one_spread_for_both_sides():
    shadows = torch.tensor([[0.0, 9.0], [2.0, 0.0], [10.0, 0.0], [0.0, 1.0], [1.0, 3.0], [5.0, 8.0]])
    membership = torch.tensor([[True, False]] * 3 + [[False, True]] * 3)
    # IN: 0, 2, 10 and 1, 3, 8: medians 2 and 3, mean 4, squares 16 + 4 + 36 + 9 + 1 + 16. OUT: medians 1 and 0.
    variance = 82 / 6
    expected = [((4 - 1) ** 2 - (4 - 2) ** 2) / 2 / variance, ((1 - 0) ** 2 - (1 - 3) ** 2) / 2 / variance]
    scores = lira(torch.tensor([4.0, 1.0]), shadows, membership, variance="reference_code")
    assert scores.tolist() == pytest.approx(expected)


def test_lira_over_several_queries_is_the_mean_of_their_log_ratios():
    target, shadows, membership = shadowed()
    targets, signals = torch.stack([target, -target, target + 1]), torch.stack([shadows, shadows * 2, shadows - 1])
    one_by_one = [lira(t, s, membership) for t, s in zip(targets, signals, strict=True)]
    assert torch.equal(lira(targets, signals, membership), sum(one_by_one) / 3)
    with pytest.raises(ValueError, match=r"with q queries, target \(q, n\) and shadows \(q, k, n\)"):
        lira(targets, signals[:2], membership)


@given(seeds, st.booleans())
def test_rmia_breaks_ties_and_nothing_else(seed, online):
    target, shadows, membership = shadowed(seed, n=40)
    target, shadows = target.sigmoid(), shadows.sigmoid()
    population = torch.rand(5), torch.rand(6, 5)
    case = target, shadows, membership, *population
    plain, broken = (rmia(*case, online=online, break_ties=b) for b in (False, True))
    for i in range(40):
        for j in range(40):
            if plain[i] > plain[j]:
                assert broken[i] > broken[j]
    ratio = target / shadows.mean(0)
    same = plain == plain.mode().values
    if online and int(same.sum()) > 1:
        assert torch.equal(broken[same].argsort(), ratio[same].argsort())
    assert 0 <= float(broken.min()) <= float(broken.max()) <= 1


def test_offline_a_is_tuned_on_shadow_models_alone():
    torch.manual_seed(0)
    membership = balanced_membership(8, 300)
    shadows = (torch.randn(8, 300) + membership.float()).sigmoid()
    population = torch.randn(8, 100).sigmoid()
    a = tune_offline_a(shadows, membership, population)
    assert 0 <= a <= 1
    target, points = torch.rand(300), torch.rand(100)
    tuned = rmia(target, shadows, membership, points, population, online=False, offline_a=None)
    assert torch.equal(tuned, rmia(target, shadows, membership, points, population, online=False, offline_a=a))


@given(seeds, st.booleans())
def test_attacks_p_and_r_against_loops(seed, coarse):
    target, shadows, membership = shadowed(seed)
    losses, shadow_losses, population = target.abs(), shadows.abs(), torch.rand(12, dtype=torch.float64)
    if coarse:
        losses, shadow_losses, population = ((t * 2).round() / 2 for t in (losses, shadow_losses, population))
    close(attack_p(losses, population), formulas.attack_p(losses.tolist(), population.tolist()))
    lists = losses.tolist(), shadow_losses.tolist(), membership.tolist()
    close(attack_r(losses, shadow_losses, membership), formulas.attack_r(*lists))


@given(seeds, st.integers(2, 6), st.sampled_from([1.0, 5.0]))
def test_metrics_of_one_prediction_against_loops(seed, k, scale):
    torch.manual_seed(seed)
    logits, y = torch.randn(5, k, dtype=torch.float64) * scale, torch.randint(k, (5,))
    rows = list(zip(logits.tolist(), y.tolist(), strict=True))
    close(modified_entropy(logits, y), [-formulas.modified_entropy(*row) for row in rows])
    close(attacks.entropy(logits, y), [-formulas.entropy(formulas.softmax(row)) for row, _ in rows])
    close(attacks.confidence(logits, y), [-formulas.cross_entropy(*row) for row in rows])
    close(attacks.correctness(logits, y), [float(max(row) == row[c]) for row, c in rows])
    assert torch.isfinite(modified_entropy(logits * 1e4, y)).all()
    twice = torch.stack([logits, logits + 1])
    assert torch.allclose(modified_entropy(twice, y)[1], modified_entropy(logits, y))


@given(seeds, st.booleans())
def test_thresholds_come_from_shadow_models_per_class(seed, per_class):
    signal, shadows, membership = shadowed(seed, n=12)
    targets = torch.arange(12) % 3
    expected = []
    for i in range(12):
        chosen = targets == targets[i] if per_class else torch.ones(12, dtype=torch.bool)
        known, inside = shadows[:, chosen].flatten().tolist(), membership[:, chosen].flatten().tolist()
        expected.append(float(signal[i]) - formulas.best_threshold(known, inside))
    close(calibrated(signal, targets, shadows, membership, per_class=per_class), expected)


def evidence(seed=0, n=400, k=8, m=200, classes=4, strength=2.0):
    """Models that put `strength` on the true class of what they were trained on; and who was, of the audited one."""
    torch.manual_seed(seed)
    membership, targets = balanced_membership(k, n, seed), torch.randint(classes, (n,))
    is_member = torch.rand(n) < 0.5
    one_hot = torch.nn.functional.one_hot(targets, classes).float()
    base = torch.randn(n, classes) + one_hot
    labels = torch.randint(classes, (m,))
    easy = torch.randn(m, classes) + torch.nn.functional.one_hot(labels, classes)
    inside, noise = membership[..., None] * one_hot, torch.randn(k, 3, n, classes)
    return Evidence(
        logits=base + strength * is_member[:, None] * one_hot + 0.5 * torch.randn(n, classes),
        targets=targets,
        shadow_logits=base + strength * inside + 0.5 * torch.randn(k, n, classes),
        membership=membership,
        population_logits=easy + 0.5 * torch.randn(m, classes),
        population_targets=labels,
        shadow_population_logits=easy + 0.5 * torch.randn(k, m, classes),
        inputs=base,
        population_inputs=easy,
        view_logits=base + strength * is_member[:, None] * one_hot + 0.5 * torch.randn(3, n, classes),
        shadow_view_logits=base + strength * inside.unsqueeze(1) + 0.5 * noise,
    ), is_member


@pytest.mark.parametrize("name", available_attacks())
def test_every_attack_finds_a_signal_and_nothing_where_there_is_none(name):
    attack = create_attack(name)
    seen, is_member = evidence()
    rng = torch.get_rng_state()
    scores = attack(seen)
    assert torch.equal(torch.get_rng_state(), rng)
    assert scores.dtype == torch.float64
    assert torch.equal(attack(seen), scores)
    assert float(membership_auroc(scores, is_member)) > 0.55
    blind = evidence(strength=0.0)[0]
    aucs = [float(membership_auroc(attack(blind), torch.rand(400) < 0.5)) for _ in range(5)]
    assert abs(sum(aucs) / 5 - 0.5) < 0.05


def test_the_strongest_attacks_beat_the_loss_attack_at_8_shadow_models():
    seen, is_member = evidence()
    auc = {
        name: float(membership_auroc(create_attack(name)(seen), is_member))
        for name in ("loss", "lira", "rmia", "bavaria")
    }
    assert min(auc["lira"], auc["rmia"], auc["bavaria"]) > auc["loss"] + 0.05, auc


@pytest.mark.parametrize("name", available_attacks())
@pytest.mark.parametrize("kind", ["huge", "half", "constant", "one example"])
def test_degenerate_evidence(name, kind):
    seen, _ = evidence(n=20, k=4, m=30)
    changes = {}
    for field in (f for f in vars(seen) if "logits" in f):
        value = getattr(seen, field)
        if kind == "huge":
            value = value * 1e4 / 4 if name != "rmia" else value * 100
        elif kind == "half":
            value = value.half()
        elif kind == "constant":
            value = torch.zeros_like(value)
        elif field == "logits":
            value = value[:1]
        elif "population" not in field:
            value = value[..., :1, :]
        changes[field] = value
    if kind == "one example":
        changes |= {"targets": seen.targets[:1], "membership": seen.membership[:, :1], "inputs": seen.inputs[:1]}
    scores = create_attack(name)(Evidence(**{**vars(seen), **changes}))
    assert torch.isfinite(scores).all()
    if kind == "constant" and name not in ("quantile_regression", "neural"):
        assert len(scores.unique()) <= 4 + 1  # nothing but the label, of four classes, tells one from another


@pytest.mark.parametrize("name", available_attacks())
def test_nan_is_an_error_that_names_the_row(name):
    seen, _ = evidence(n=20, k=4, m=30)
    logits, views = seen.logits.clone(), seen.view_logits.clone()
    logits[7, 1] = views[0, 7, 1] = math.nan
    with pytest.raises(ValueError, match=r"examples \[7\]|rows? \[7\]|NaN"):
        create_attack(name)(Evidence(**{**vars(seen), "logits": logits, "view_logits": views}))


@pytest.mark.parametrize("name", available_attacks())
def test_missing_evidence_is_named(name):
    seen, _ = evidence(n=20, k=4, m=30)
    bare = Evidence(seen.logits, seen.targets)
    attack = create_attack(name)
    if not attack.needs:
        assert attack(bare).shape == (20,)
        return
    with pytest.raises(ValueError, match=f"the {name} attack needs"):
        attack(bare)


def test_the_augmentation_attack_with_shadow_models():
    torch.manual_seed(0)
    membership = balanced_membership(8, 500)
    shadow = torch.rand(6, 8, 500) < torch.where(membership, 0.9, 0.6)
    is_member = torch.rand(500) < 0.5
    correct = torch.rand(6, 500) < torch.where(is_member, 0.9, 0.6)
    scores = augmentation_attack(correct, shadow, membership)
    assert float(membership_auroc(scores, is_member)) > 0.7
    order = correct.sum(0)
    assert all(scores[i] > scores[j] for i in range(0, 500, 7) for j in range(0, 500, 11) if order[i] > order[j])
    with pytest.raises(ValueError, match=r"shadow_correct must have shape \(6, k, 500\)"):
        augmentation_attack(correct, shadow[:5], membership)
    with pytest.raises(ValueError, match="correct must be bool"):
        augmentation_attack(correct.float())


def test_lira_over_views_is_the_mean_over_them():
    seen, _ = evidence(n=30, k=8, m=30)
    expected = torch.zeros(30, dtype=torch.float64)
    for view in range(3):
        own = logit_signal(seen.view_logits[view], seen.targets)
        shadows = torch.stack([logit_signal(seen.shadow_view_logits[k, view], seen.targets) for k in range(8)])
        expected += lira(own, shadows, seen.membership, variance="pooled") / 3
    torch.testing.assert_close(create_attack("lira_views", variance="pooled")(seen), expected)


def test_the_registry():
    @register_attack("margin")
    def margin(evidence, power=1.0):
        first, second = evidence.logits.topk(2).values.unbind(-1)
        return (first - second) ** power

    try:
        seen, is_member = evidence()
        assert float(membership_auroc(create_attack("margin", power=2.0)(seen), is_member)) > 0.5
        with pytest.raises(ValueError, match="there is an attack 'margin' already"):
            register_attack("margin")(lambda evidence: evidence.logits)
    finally:
        attacks.registry._ATTACKS.pop("margin")
    with pytest.raises(ValueError, match="no attack 'lyra'; known are attack_p, attack_r"):
        create_attack("lyra")
    with pytest.raises(TypeError, match="the lira attack has no setting onlin; it has online, variance"):
        create_attack("lira", onlin=False)
    with pytest.raises(TypeError, match="the entropy attack has no setting x; it has per_class"):
        create_attack("entropy", x=1)
    with pytest.raises(ValueError, match="unknown needs gpu"):
        register_attack("x", "gpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bavaria(*shadowed(), predictive="cauchy"), "predictive must be"),
        (lambda: bavaria(*shadowed(), prior_models=0), "prior_models must be a number above 0, not 0"),
        (lambda: bavaria(*shadowed(k=2)), "train at least 4 shadow models"),
        (lambda: attack_p(torch.rand(3), torch.rand(0)), "m >= 1"),
        (lambda: quantile_regression(torch.rand(3), torch.rand(3, 2), torch.rand(5), torch.rand(5, 2)), "10 examples"),
        (lambda: quantile_regression(torch.rand(3), torch.rand(3, 2), torch.rand(20), torch.rand(20, 3)), "flat"),
        (lambda: neural_attack(torch.rand(3, 2), torch.zeros(3).long(), torch.rand(2, 4, 2), torch.ones(2, 4) > 0),
         r"must have shape \(k, n, K\)"),
        (lambda: neural_attack(torch.rand(3, 2), torch.zeros(3).long(), torch.rand(2, 3, 2), torch.ones(2, 3) > 0),
         "both kinds, IN and OUT"),
    ],
)  # fmt: skip
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
