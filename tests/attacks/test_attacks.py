import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cwrf.attacks import example_losses, lira, logit_signal, loss_threshold, rmia, true_class_probability
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.shadows import balanced_membership
from tests.oracles import formulas


def random_shadows(n=9, k=6, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n), torch.randn(k, n), balanced_membership(k, n, seed)


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(["pooled", "per_example", "auto"]))
def test_lira_against_loops(seed, online, variance):
    target, shadows, membership = random_shadows(seed=seed)
    ours = lira(target, shadows, membership, online=online, variance=variance)
    theirs = formulas.lira(
        target.tolist(), shadows.tolist(), membership.tolist(), online, pooled=variance != "per_example"
    )
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_auto_takes_each_examples_own_variance_from_64_models_on():
    for k, same_as in ((62, "pooled"), (64, "per_example")):
        case = random_shadows(k=k)
        assert torch.equal(lira(*case), lira(*case, variance=same_as))


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
    theirs = formulas.rmia(
        *lists, membership.tolist(), z.double().tolist(), z_shadows.double().tolist(), online, gamma, 0.3
    )
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-12)


def test_blocks_of_examples_do_not_matter(monkeypatch):
    case = random_shadows(n=50)
    whole = [lira(*case, variance=v) for v in ("pooled", "per_example")]
    monkeypatch.setattr(importlib.import_module("lightning_cwrf.attacks.lira"), "_BLOCK", 7)
    for variance, expected in zip(("pooled", "per_example"), whole, strict=True):
        torch.testing.assert_close(lira(*case, variance=variance), expected, rtol=1e-12, atol=1e-12)


def test_offline_lira_rises_with_the_signal():
    _, shadows, membership = random_shadows(n=2)
    signals = torch.linspace(-8, 8, 50)
    scores = torch.stack([lira(s.expand(2), shadows, membership, online=False) for s in signals])
    assert (scores.diff(dim=0) > 0).all()


def test_signals_against_loops_and_at_huge_logits():
    z = torch.randn(6, 5, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 4, 4])
    for i, row in enumerate(z.tolist()):
        p = formulas.softmax(row)[int(y[i])]
        assert float(true_class_probability(z, y)[i]) == pytest.approx(p)
        assert float(logit_signal(z, y)[i]) == pytest.approx(torch.logit(torch.tensor(p, dtype=torch.float64)).item())
        assert float(example_losses(z, y)[i]) == pytest.approx(formulas.cross_entropy(row, int(y[i])))
    huge = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    assert logit_signal(huge, torch.tensor([0, 0])).tolist() == [1e4, -2e4]
    stacked = torch.stack([z, z + 1])
    assert torch.allclose(logit_signal(stacked, y)[1], logit_signal(z, y))


def test_inputs_stay_as_they_were():
    target, shadows, membership = (t.double() if t.is_floating_point() else t for t in random_shadows())
    before = [t.clone() for t in (target, shadows, membership)]
    lira(target, shadows, membership)
    rmia(target.sigmoid(), shadows.sigmoid(), membership, torch.rand(5), torch.rand(6, 5))
    assert all(torch.equal(a, b) for a, b in zip(before, (target, shadows, membership), strict=True))


def test_no_signal_no_attack():
    """Independent noise: AUC within four standard errors of one half."""
    n = 4000
    torch.manual_seed(1)
    membership = balanced_membership(8, n)
    is_member = torch.rand(n) < 0.5
    for online in (True, False):
        scores = lira(torch.randn(n), torch.randn(8, n), membership, online=online)
        assert abs(float(membership_auroc(scores, is_member)) - 0.5) < 4 * (1 / (12 * n / 2)) ** 0.5 * 2**0.5


def test_gaussian_signals_reach_the_closed_form():
    """IN ~ N(1, 1), OUT ~ N(0, 1): the best attack's AUC is Φ(1/√2)."""
    n, k = 20_000, 128
    membership = balanced_membership(k, n)
    shadows = torch.randn(k, n) + membership.float()
    is_member = torch.rand(n) < 0.5
    scores = lira(torch.randn(n) + is_member.float(), shadows, membership, variance="pooled")
    best = float(torch.special.ndtr(torch.tensor(0.5**0.5)))
    assert float(membership_auroc(scores, is_member)) == pytest.approx(best, abs=0.012)


def bad(**changes):
    target, shadows, membership = random_shadows()
    case = {"target": target, "shadows": shadows, "membership": membership}
    for name, change in changes.items():
        case[name] = change(case[name])
    return case


def spoil(tensor, value, *place):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            lambda: bad(target=lambda t: spoil(t, float("nan"), 4)),
            r"target has NaN or infinite values at examples \[4\]",
        ),
        (
            lambda: bad(shadows=lambda t: spoil(t, float("inf"), 2, 7)),
            r"shadows has NaN or infinite values at examples \[7\]",
        ),
        (lambda: bad(target=lambda t: t[:-1]), "shadows must have shape"),
        (lambda: bad(target=lambda t: t[None]), "target must have shape"),
        (lambda: bad(membership=lambda t: t.long()), "membership must be bool"),
        (lambda: bad(membership=lambda t: t[1:]), "membership must be bool of shape"),
        (lambda: bad(membership=lambda t: spoil(t, True, slice(None), 3)), r"first \[3\]\) have fewer than 1 OUT"),
        (lambda: bad(membership=lambda t: spoil(t, False, slice(None), 3)), "fewer than 1 IN shadow models"),
    ],
)
def test_bad_shadow_signals(case, message):
    with pytest.raises(ValueError, match=message):
        lira(**case())


def test_too_few_shadow_models_says_how_many_are_needed():
    target, shadows, _ = random_shadows(k=2)
    pair = torch.tensor([[True], [False]]).expand(2, 9)
    with pytest.raises(ValueError, match="at least 4 shadow models"):
        lira(target, shadows, pair)
    with pytest.raises(ValueError, match=r"fewer than 2 IN .* train at least 4"):
        lira(target, shadows, pair, variance="per_example")
    with pytest.raises(ValueError, match="fewer than 1 OUT shadow models"):
        lira(target, shadows[:1], torch.ones(1, 9, dtype=torch.bool), online=False)


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
def test_bad_rmia_input(changes, message):
    case = {
        "target": torch.rand(9),
        "shadows": torch.rand(6, 9),
        "membership": balanced_membership(6, 9),
        "population_target": torch.rand(4),
        "population_shadows": torch.rand(6, 4),
    }
    with pytest.raises(ValueError, match=message):
        rmia(**{**case, **changes})


def test_the_loss_attack_is_minus_the_loss():
    losses = torch.tensor([0.1, 3.0, 0.5])
    assert loss_threshold(losses).argsort(descending=True).tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match=r"losses has NaN or infinite values at examples \[0\]"):
        loss_threshold(torch.tensor([float("nan"), 1.0]))


def test_unknown_variance():
    with pytest.raises(ValueError, match="variance must be"):
        lira(*random_shadows(), variance="fixed")
