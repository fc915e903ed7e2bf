"""RMIA: against loops, by hand, its ties, its offline a, and on bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cwrf.attacks import (
    rmia,
    tune_offline_a,
)
from lightning_cwrf.shadows import balanced_membership
from tests.attacks.cases import seeds, shadowed, tensor
from tests.oracles import attacks as oracle


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([1.0, 1.5, 2.0]), st.booleans())
def test_rmia_against_loops(seed, online, gamma, coarse):
    torch.manual_seed(seed)
    n, m, k = 7, 11, 4
    target, shadows = torch.rand(n), torch.rand(k, n)
    z, z_shadows = torch.rand(m), torch.rand(k, m)
    if coarse:  # many equal ratios
        target, shadows, z, z_shadows = (t.mul(2).ceil().div(2) for t in (target, shadows, z, z_shadows))
    membership = balanced_membership(k, n, seed)
    ours = rmia(target, shadows, membership, z, z_shadows, online=online, gamma=gamma, offline_a=0.3, break_ties=False)
    lists = [t.double().tolist() for t in (target, shadows)]
    theirs = oracle.rmia(
        *lists, membership.tolist(), z.double().tolist(), z_shadows.double().tolist(), online, gamma, 0.3
    )
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-12)


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
    offline = rmia(*case, online=False)
    assert offline.tolist() == pytest.approx([(3 * s + r / (1 + r)) / 4 for s, r in zip(shares, ratios, strict=True)])
    assert torch.equal(offline, rmia(*case, online=False, offline_a=0.3))


@given(seeds, st.booleans())
def test_breaking_ties_keeps_the_order_of_shares(seed, online):
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


@given(seeds, st.sampled_from([1.0, 2.0]), st.sampled_from([1, 4]))
@settings(max_examples=10)
def test_offline_a_is_the_best_of_eleven(seed, gamma, models):
    torch.manual_seed(seed)
    membership = balanced_membership(6, 12, seed)
    shadows = (torch.randn(6, 12).double() + 2 * membership.double()).sigmoid()
    population = torch.randn(6, 9).double().sigmoid()
    found = tune_offline_a(shadows, membership, population, gamma=gamma, models=models)
    lists = shadows.tolist(), membership.tolist(), population.tolist()
    assert found == pytest.approx(oracle.tuned_offline_a(*lists, gamma, models))
    if gamma == 2.0 and models == 4:
        assert tune_offline_a(shadows, membership, population) == found


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
