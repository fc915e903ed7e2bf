"""P-values: against scipy, against brute force, and calibrated on data without a signal."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_cwrf.metrics.functional import (
    advantage_p_value,
    auroc_p_value,
    epsilon_lower_bound,
    loss_gap_p_value,
    membership_auroc,
    one_run_epsilon,
    resolvable_auc,
    tpr_at_fpr,
    tpr_p_value,
)
from tests.metrics.cases import NULLS, groups, null


@pytest.mark.slow
@given(st.integers(0, 999), st.integers(2, 30), st.integers(2, 30), st.sampled_from([None, 1, 3]))
def test_auc_p_value_is_scipys(seed, m, n, levels):
    scores, is_member = groups(seed, m, n, levels)
    if len(scores.unique()) == 1:
        assert auroc_p_value(scores, is_member) == 1.0
        return
    theirs = stats.mannwhitneyu(scores[is_member], scores[~is_member], alternative="greater", method="asymptotic")
    if max(scores.unique(return_counts=True)[1]) >= 0.9 * (m + n):
        assert auroc_p_value(scores, is_member) >= float(theirs.pvalue) - 1e-12
        return
    assert auroc_p_value(scores, is_member) == pytest.approx(float(theirs.pvalue), abs=1e-12)


@pytest.mark.parametrize("side", ["below", "above"])
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("errors", [1, 2, 5, 12])
def test_auc_p_value_of_few_examples_apart_from_all_others(side, distinct, errors):
    """A model that is nearly always right: over all ways in which its errors can fall, p <= level as often as it says.

    1,000 on one side, 100 on the other, one error: the normal approximation gave p <= 0.001 in one of 11 cases.
    """
    m, n = (1000, 100) if side == "below" else (100, 1000)
    few = n if side == "below" else m
    apart = torch.arange(1.0, errors + 1) if distinct else torch.ones(errors)
    chances, p_values = [], []
    for k in range(errors + 1):  # of them, so many on the smaller side
        inside = torch.arange(errors) < k
        flags = torch.cat([inside, torch.arange(m + n - errors) < few - k])  # True: on the smaller side
        scores = torch.cat([apart if side == "above" else -apart, torch.zeros(m + n - errors)])
        p_values.append(auroc_p_value(scores, flags if side == "above" else ~flags))
        chances.append(stats.hypergeom.pmf(k, m + n, few, errors))
    for level in (0.05, 0.01, 0.001):
        assert sum(c for c, p in zip(chances, p_values, strict=True) if p <= level) <= level * (1 + 1e-9)
    assert max(p_values) <= 1
    assert min(p_values) == pytest.approx(float(stats.hypergeom.pmf(errors, m + n, few, errors)), rel=1e-6)


@pytest.mark.parametrize(("m", "n"), [(1, 3), (3, 3), (3, 7), (5, 5), (2, 12), (6, 5)])
@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_resolvable_auc_over_every_order(m, n, confidence):
    """Over all orders of m members and n non-members, the p-value is small exactly from that AUC on."""
    orders = [torch.tensor([i in chosen for i in range(m + n)]) for chosen in itertools.combinations(range(m + n), m)]
    scores, least = torch.arange(m + n).double(), resolvable_auc(m, n, confidence)
    small = 0
    for order in orders:
        significant = auroc_p_value(scores, order) <= 1 - confidence
        assert significant == (float(membership_auroc(scores, order)) >= least - 1e-12)
        small += significant
    assert small / len(orders) <= 1.3 * (1 - confidence)  # the normal approximation is rough for this few
    assert (small == 0) == (least == math.inf)


@pytest.mark.slow
def test_resolvable_auc_is_exceeded_by_chance_at_the_stated_rate():
    least, runs = resolvable_auc(60, 80, 0.9), 2000
    found = sum(float(membership_auroc(*groups(run, 60, 80))) >= least for run in range(runs))
    assert stats.binom.ppf(0.0001, runs, 0.095) <= found <= stats.binom.ppf(0.9999, runs, 0.1)
    assert resolvable_auc(6000, 8000) < resolvable_auc(600, 800) < resolvable_auc(600, 800, 0.99)
    with pytest.raises(ValueError, match="0 non-members"):
        resolvable_auc(3, 0)
    with pytest.raises(ValueError, match="confidence must be a number in"):
        resolvable_auc(3, 3, 95)


@pytest.mark.parametrize("max_fpr", [0.0, 0.25, 0.5])
def test_tpr_p_value_counts_every_order(max_fpr):
    """Over all orders of 3 members and 4 non-members, the share with a TPR at least as high."""
    orders = [torch.tensor([i in chosen for i in range(7)]) for chosen in itertools.combinations(range(7), 3)]
    scores = torch.arange(7.0)
    tprs = [float(tpr_at_fpr(scores, order, max_fpr)) for order in orders]
    for order, tpr in zip(orders, tprs, strict=True):
        expected = sum(other >= tpr for other in tprs) / len(tprs)
        assert tpr_p_value(scores, order, max_fpr) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("fpr", "n", "found"), [(0.29, 100, 7), (0.0, 40, 1), (0.05, 30, 9), (1.0, 12, 11)])
def test_tpr_p_value_is_scipys_hypergeometric(fpr, n, found):
    """Of 11 members ``found`` rank above all but the allowed non-members; 0.29 · 100 falls short of 29 in floats."""
    false = round(fpr * 100) * n // 100
    order = [False] * false + [True] * found + [False] * (n - false) + [True] * (11 - found)
    scores = torch.arange(len(order), 0, -1).double()
    assert float(tpr_at_fpr(scores, torch.tensor(order), fpr)) == pytest.approx(found / 11)
    expected = stats.hypergeom.cdf(false, 11 + n, n, found + false)
    assert tpr_p_value(scores, torch.tensor(order), fpr) == pytest.approx(expected, rel=1e-9)


def test_p_value_of_a_loss_gap_without_spread():
    is_member = torch.tensor([True, True, False, False])
    assert loss_gap_p_value(torch.tensor([0.0, 0.0, 2.0, 2.0]), is_member) == 0.0
    assert loss_gap_p_value(torch.tensor([1.0, 1.0, 1.0, 1.0]), is_member) == 1.0
    assert loss_gap_p_value(torch.tensor([2.0, 2.0, 1.0, 1.0]), is_member) == 1.0
    # One example of a group says nothing of its spread.
    assert loss_gap_p_value(torch.tensor([0.0, 2.0, 3.0, 5.0]), torch.tensor([True, False, False, False])) == 1.0
    assert loss_gap_p_value(torch.tensor([0.0, 1.0, 0.0, 5.0]), torch.tensor([True, True, True, False])) == 1.0


@given(st.integers(0, 999), st.integers(2, 12), st.integers(2, 12), st.floats(-2, 2))
def test_loss_gap_p_value_is_welchs(seed, m, n, shift):
    losses, is_member = groups(seed, m, n, shift=shift)
    theirs = stats.ttest_ind(losses[~is_member], losses[is_member], equal_var=False, alternative="greater")
    assert loss_gap_p_value(losses, is_member) == pytest.approx(float(theirs.pvalue), abs=1e-12)


@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 12), st.sampled_from([None, 1, 3]))
def test_advantage_p_value_is_the_one_sided_asymptotic_of_kolmogorov_and_smirnov(seed, m, n, levels):
    scores, is_member = groups(seed, m, n, levels)
    d = float(stats.ks_2samp(scores[~is_member], scores[is_member], alternative="greater").statistic)
    assert advantage_p_value(scores, is_member) == pytest.approx(math.exp(-2 * d * d * m * n / (m + n)), abs=1e-9)


@pytest.mark.slow
def test_p_values_and_bounds_are_calibrated_on_noise():
    """200 audits of noise: p-values below 5 % come in at most 5 % of them (to the binomial band), ε bounds likewise."""
    most = stats.binom.ppf(0.9999, NULLS, 0.05)
    small = dict.fromkeys(("auc", "tpr", "advantage", "gap", "epsilon", "one run"), 0)
    for run in range(NULLS):
        scores, is_member = null(run)
        small["auc"] += auroc_p_value(scores, is_member) < 0.05
        small["tpr"] += tpr_p_value(scores, is_member, 0.05) < 0.05
        small["advantage"] += advantage_p_value(scores, is_member) < 0.05
        small["gap"] += loss_gap_p_value(-scores, is_member) < 0.05
        small["epsilon"] += float(epsilon_lower_bound(scores, is_member, seed=run)) > 0
        small["one run"] += float(one_run_epsilon(scores, is_member)) > 0
    assert all(count <= most for count in small.values()), small
    assert small["auc"] > 0  # the test is not void
