"""LiRA: against loops, by hand, against the authors' code, and on bad input."""

import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_cwrf.attacks import (
    create_attack,
    lira,
    logit_signal,
)
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.shadows import balanced_membership
from tests.attacks.cases import close, evidence, seeds, shadowed, tensor
from tests.oracles import attacks as oracle


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(["pooled", "per_example", "auto"]))
def test_lira_against_loops(seed, online, variance):
    target, shadows, membership = shadowed(seed=seed)
    ours = lira(target, shadows, membership, online=online, variance=variance)
    theirs = oracle.lira(
        target.tolist(), shadows.tolist(), membership.tolist(), online, pooled=variance != "per_example"
    )
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_auto_variance_is_per_example_from_64_models_on():
    for k, same_as in ((62, "pooled"), (64, "per_example")):
        case = shadowed(k=k)
        assert torch.equal(lira(*case), lira(*case, variance=same_as))


def test_the_block_size_does_not_matter(monkeypatch):
    case = shadowed(n=50)
    whole = [lira(*case, variance=v) for v in ("pooled", "per_example")]
    monkeypatch.setattr(importlib.import_module("lightning_cwrf.attacks.lira"), "BLOCK", 7)
    for variance, expected in zip(("pooled", "per_example"), whole, strict=True):
        torch.testing.assert_close(lira(*case, variance=variance), expected, rtol=1e-12, atol=1e-12)


def test_offline_lira_increases_with_the_signal():
    _, shadows, membership = shadowed(n=2)
    signals = torch.linspace(-8, 8, 50)
    scores = torch.stack([lira(s.expand(2), shadows, membership, online=False) for s in signals])
    assert (scores.diff(dim=0) > 0).all()


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


def test_lira_by_hand():
    """IN models say 3 and 5, OUT models 0 and 2: means 4 and 1, variances 2 and 2; pooled with (1, 1), (0, 4)."""
    shadows = tensor([3, 1], [5, 1], [0, 0], [2, 4])
    membership = torch.tensor([[True, True]] * 2 + [[False, False]] * 2)
    target = tensor(2, 1)
    own = lira(target, shadows, membership, variance="per_example")
    # Equal variances: ((x − μ_out)² − (x − μ_in)²) / 2σ².
    assert float(own[0]) == pytest.approx((1 - 4) / 4)
    # IN squares 2 + 0 over 2 degrees of freedom, OUT squares 2 + 8 over 2.
    pooled = lira(target, shadows, membership, variance="pooled")
    expected = [stats.norm.logpdf(2, 4, 1) - stats.norm.logpdf(2, 1, 5**0.5)]
    expected += [stats.norm.logpdf(1, 1, 1) - stats.norm.logpdf(1, 2, 5**0.5)]
    assert pooled.tolist() == pytest.approx(expected, rel=1e-9)
    offline = lira(target, shadows, membership, online=False, variance="pooled")
    assert offline.tolist() == pytest.approx([stats.norm.logcdf(1 / 5**0.5), stats.norm.logcdf(-1 / 5**0.5)])
    assert torch.equal(lira(target, shadows, membership), pooled)


def test_offline_auto_variance_counts_out_models_only():
    torch.manual_seed(0)
    shadows, target = torch.randn(36, 5), torch.randn(5)
    for out, same_as in ((32, "per_example"), (31, "pooled")):
        membership = (torch.arange(36) >= out)[:, None].expand(36, 5)
        case = target, shadows, membership
        assert torch.equal(lira(*case, online=False), lira(*case, online=False, variance=same_as))
        assert not torch.equal(
            lira(*case, online=False),
            lira(*case, online=False, variance="pooled" if same_as == "per_example" else "per_example"),
        )
        assert torch.equal(lira(*case), lira(*case, variance="pooled"))  # 4 or 5 IN models


@pytest.mark.parametrize("variance", ["pooled", "per_example"])
def test_identical_shadow_models_do_not_divide_by_zero(variance):
    shadows, membership = torch.ones(4, 1), torch.tensor([[True], [True], [False], [False]])
    scores = [
        float(lira(tensor(1 + d), shadows, membership, online=False, variance=variance)) for d in (0, 1e-6, -2e-6)
    ]
    assert scores == pytest.approx([stats.norm.logcdf(z) for z in (0, 1, -2)], rel=1e-6)
    assert float(lira(tensor(7), shadows, membership, variance=variance)) == 0
    assert float(lira(tensor(1), shadows, membership, online=False, variance="reference_code")) == pytest.approx(
        30 * math.log(10) * -1 + math.log(2 * math.pi) / 2
    )


def test_per_example_variance_needs_two_models_and_pooled_one():
    shadows, target = torch.randn(3, 2), torch.randn(2)
    one_in = torch.tensor([[True, True], [False, False], [False, False]])
    with pytest.raises(ValueError, match="fewer than 2 IN"):
        lira(target, shadows, one_in, variance="per_example")
    assert lira(target, shadows, one_in, variance="per_example", online=False).shape == (2,)
    some = torch.tensor([[True, False], [False, True], [False, False]])
    with pytest.raises(ValueError, match="pooled variance needs"):
        lira(target, shadows, some)
    assert lira(target, torch.randn(4, 2), torch.tensor([[1, 1], [1, 0], [0, 0], [0, 0]]) > 0).shape == (2,)


@given(seeds, st.booleans(), st.sampled_from([1, 3]), st.booleans())
def test_lira_of_the_reference_code_against_that_code(seed, online, queries, balanced):
    torch.manual_seed(seed)
    target, shadows = torch.randn(queries, 9).double(), torch.randn(queries, 7 + balanced, 9).double()
    membership = balanced_membership(8, 9, seed)
    if not balanced:  # some examples have more models of a side than others
        membership = membership[:7]
    expected = oracle.lira_reference_code(target.tolist(), shadows.tolist(), membership.tolist(), online)
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


def test_lira_over_views_is_the_mean_over_them():
    seen, _ = evidence(n=30, k=8, m=30)
    expected = torch.zeros(30, dtype=torch.float64)
    for view in range(3):
        own = logit_signal(seen.view_logits[view], seen.targets)
        shadows = torch.stack([logit_signal(seen.shadow_view_logits[k, view], seen.targets) for k in range(8)])
        expected += lira(own, shadows, seen.membership, variance="pooled") / 3
    torch.testing.assert_close(create_attack("lira_views", variance="pooled")(seen), expected)


def bad(**changes):
    target, shadows, membership = shadowed()
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
def test_invalid_shadow_signals_raise(case, message):
    with pytest.raises(ValueError, match=message):
        lira(**case())


def test_too_few_shadow_models_raise_with_the_number_needed():
    target, shadows, _ = shadowed(k=2)
    pair = torch.tensor([[True], [False]]).expand(2, 9)
    with pytest.raises(ValueError, match="at least 4 shadow models"):
        lira(target, shadows, pair)
    with pytest.raises(ValueError, match=r"fewer than 2 IN .* train at least 4"):
        lira(target, shadows, pair, variance="per_example")
    with pytest.raises(ValueError, match="fewer than 1 OUT shadow models"):
        lira(target, shadows[:1], torch.ones(1, 9, dtype=torch.bool), online=False)


def test_an_unknown_variance_raises():
    with pytest.raises(ValueError, match="variance must be"):
        lira(*shadowed(), variance="fixed")
