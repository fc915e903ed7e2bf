"""Confidence intervals: against slow oracles, on ties and extremes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import binomtest

from lightning_cwrf.metrics import (
    MembershipAUROC,
    P1Score,
    TPRAtFPR,
)
from lightning_cwrf.metrics import functional as MF
from lightning_cwrf.metrics.functional.roc import ScoreCounts, count_scores
from tests.metrics.cases import floats, levels
from tests.oracles import intervals as oracle


@st.composite
def sides(draw, least=1):
    """Members and non-members, with ties more often than not."""
    value = st.integers(-3, 3).map(float) if draw(st.booleans()) else st.floats(-3, 3)
    return tuple(draw(st.lists(value, min_size=least, max_size=25)) for _ in range(2))


def counted(members, nonmembers):
    scores = torch.tensor([*members, *nonmembers], dtype=torch.float64)
    return count_scores(scores, torch.arange(len(scores)) < len(members))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(sides(), st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0]), levels)
def test_tpr_interval_is_that_of_loops_over_thresholds(case, fpr, confidence):
    found = floats(MF.tpr_interval(counted(*case), fpr, confidence))
    assert found == pytest.approx(oracle.tpr(*case, fpr, confidence), abs=1e-7)


@settings(deadline=None, max_examples=60)
@given(sides(), levels)
def test_auroc_interval_is_that_of_loops_over_pairs(case, confidence):
    assert floats(MF.auroc_interval(counted(*case), confidence)) == pytest.approx(
        oracle.auroc(*case, confidence), abs=1e-7
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(sides(), levels)
def test_advantage_interval_is_that_of_loops_over_thresholds(case, confidence):
    found = floats(MF.advantage_interval(counted(*case), confidence))
    assert found == pytest.approx(oracle.advantage(*case, confidence), abs=1e-7)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 999), st.integers(2, 20), st.integers(2, 20), levels)
def test_mean_intervals_are_those_of_roots(seed, m, n, confidence):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(size, generator=generator, dtype=torch.float64).exp() for size in (m, n))
    expected = oracle.mean_difference(first.tolist(), second.tolist(), confidence)
    assert floats(MF.mean_difference_interval(first, second, confidence)) == pytest.approx(expected, rel=1e-6)
    # One sample: the other side is practically constant, at 0.
    tiny = [0.0] * 10**4
    tiny[0] = 1e-12
    expected = oracle.mean_difference(first.tolist(), tiny, confidence)
    assert floats(MF.mean_interval(first, confidence)) == pytest.approx(expected, rel=1e-6)


def test_means_of_symmetric_values_have_students_interval():
    values = torch.tensor([-3.0, -1, 0, 1, 3])
    theirs = stats.t.interval(0.9, 4, 0, stats.sem(values.numpy()))
    assert floats(MF.mean_interval(values, 0.9)) == pytest.approx(theirs)
    assert floats(MF.mean_interval(torch.tensor([2.0]))) == (-math.inf, math.inf)
    assert floats(MF.mean_interval(torch.full((5,), 2.0))) == (2.0, 2.0)  # nothing says that others would differ
    other = torch.tensor([-2.0, 2, 0])
    theirs = stats.ttest_ind(values.numpy(), other.numpy(), equal_var=False).confidence_interval(0.9)
    assert floats(MF.mean_difference_interval(values, other, 0.9)) == pytest.approx((theirs.low, theirs.high))


def test_leading_dimensions_are_samples_of_their_own():
    first = torch.tensor([[0.0, 1, 5], [2, 2, 9], [-4, 0, 1]])
    second = torch.tensor([[1.0, 1, 2, 8], [0, 5, 5, 5], [7, 7, 7, 8]])
    grid = torch.arange(4, 0, -1).double()
    members, nonmembers = torch.tensor([[3.0, 1, 1, 0], [0, 2, 2, 1]]), torch.tensor([[0.0, 2, 0, 2], [1, 0, 1, 2]])
    counts = ScoreCounts(grid, members, nonmembers)
    for function, arguments in (
        (MF.mean_interval, [first]),
        (MF.mean_difference_interval, [first, second]),
        (MF.auroc_interval, [counts]),
        (MF.advantage_interval, [counts]),
        (lambda counts: MF.tpr_interval(counts, 0.3), [counts]),
    ):
        together = torch.stack(function(*arguments), -1)
        for i, found in enumerate(together):
            alone = [
                ScoreCounts(grid, part.members[i], part.nonmembers[i]) if isinstance(part, ScoreCounts) else part[i]
                for part in arguments
            ]
            assert floats(function(*alone)) == pytest.approx(found.tolist(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("fpr", [0.3, 0.01, 1e-3])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_fewest_nonmembers_that_bound_a_tpr_from_below(fpr, confidence):
    """All members above all non-members: one more non-member, and the lower bound is no longer 0."""
    fewest = MF.fewest_nonmembers(fpr, confidence)
    for n, shown in ((fewest - 1, False), (fewest, True)):
        counts = ScoreCounts(torch.arange(2.0), torch.tensor([400.0, 0.0]), torch.tensor([0.0, float(n)]))
        assert (float(MF.tpr_interval(counts, fpr, confidence)[0]) > 0) == shown
    assert MF.fewest_nonmembers(0.0) == math.inf
    assert MF.fewest_nonmembers(1.0) == 1


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_clopper_pearson_is_scipys(counts, confidence):
    theirs = binomtest(*counts).proportion_ci(confidence, method="exact")
    assert MF.clopper_pearson(*counts, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TPRAtFPR("0.1"), TypeError, "max_fpr must be a number, not the str '0.1'"),
        (lambda: TPRAtFPR(True), TypeError, "max_fpr must be a number"),
        (lambda: TPRAtFPR(math.nan), ValueError, "max_fpr must be a number in"),
        (lambda: TPRAtFPR(None), TypeError, "max_fpr must be a number, not None"),
        (lambda: P1Score("0.9"), TypeError, "accuracy must be a number"),
        (lambda: P1Score(math.nan), ValueError, "accuracy must be a number in"),
        (lambda: P1Score(0.9, accuracy_examples=3.0), TypeError, "accuracy_examples must be an integer"),
        (lambda: P1Score(0.9, accuracy_examples=0), ValueError, "accuracy_examples must be an integer of at least 1"),
        (lambda: MembershipAUROC(seed=1.5), TypeError, "seed must be an integer"),
        (lambda: MF.clopper_pearson(1.0, 2), TypeError, "successes must be an integer"),
        (lambda: MF.clopper_pearson(3, 2), ValueError, "successes must be an integer from 0 to 2, not 3"),
        (lambda: MF.clopper_pearson(0, 0), ValueError, "trials must be an integer of at least 1"),
        (lambda: MF.clopper_pearson(1, 2, "0.95"), TypeError, "confidence must be a number"),
        (lambda: MF.clopper_pearson(1, 2, True), TypeError, "confidence must be a number"),
        (lambda: MF.p1_score(0.9, -0.5), ValueError, r"advantage must be a number in \[0, 1\], not -0.5"),
        (lambda: MF.p1_score(0.9, torch.tensor([0.1, -0.5])), ValueError, "advantage must be a number in"),
        (lambda: MF.p1_score(torch.tensor(True), 0.5), TypeError, "accuracy must be a number"),
        (lambda: MF.p1_score("0.9", 0.5), TypeError, "accuracy must be a number"),
        (lambda: MF.p1_score(math.nan, 0.5), ValueError, "accuracy must be a number in"),
        (lambda: MF.resolvable_auc(10.0, 10), TypeError, "members must be an integer"),
        (lambda: MF.resolvable_auc(10, "10"), TypeError, "nonmembers must be an integer"),
    ],
)
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_settings_out_of_range_raise():
    with pytest.raises(ValueError, match="max_fpr"):
        TPRAtFPR(max_fpr=2)
    with pytest.raises(ValueError, match="confidence"):
        MF.clopper_pearson(1, 2, 95)
