"""P-values and bounds on ε: against scipy, against brute force, and calibrated on data without a signal."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_cwrf.metrics import (
    AttackAdvantage,
    BalancedAccuracy,
    EpsilonLowerBound,
    LossGap,
    MembershipAUROC,
    P1Score,
    TPRAtFPR,
)
from lightning_cwrf.metrics.functional import (
    advantage_p_value,
    auroc_p_value,
    epsilon_lower_bound,
    loss_gap_p_value,
    membership_auroc,
    one_run_epsilon,
    one_run_p_value,
    resolvable_auc,
    tpr_at_fpr,
    tpr_p_value,
)
from tests.oracles import intervals as oracle


def groups(seed, m, n, levels=None, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(m + n, generator=generator, dtype=torch.float64)
    scores[:m] += shift
    if levels:
        scores = (scores * levels).round()
    return scores, torch.arange(m + n) < m


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
    told = 0
    for order in orders:
        small = auroc_p_value(scores, order) <= 1 - confidence
        assert small == (float(membership_auroc(scores, order)) >= least - 1e-12)
        told += small
    assert told / len(orders) <= 1.3 * (1 - confidence)  # a normal approximation of so few
    assert (told == 0) == (least == math.inf)


def test_resolvable_auc_is_told_at_the_stated_rate():
    least, runs = resolvable_auc(60, 80, 0.9), 2000
    told = sum(float(membership_auroc(*groups(run, 60, 80))) >= least for run in range(runs))
    assert stats.binom.ppf(0.0001, runs, 0.095) <= told <= stats.binom.ppf(0.9999, runs, 0.1)
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


@given(st.integers(2, 40), st.integers(0, 40), st.floats(0, 4), st.sampled_from([0.0, 1e-5, 1e-2]))
def test_one_run_p_value_is_the_theorem_term_by_term(r, v, epsilon, delta):
    v, m = min(v, r), r + 10
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    worst = (
        max((stats.binom.cdf(v - 1, r, q) - stats.binom.cdf(v - i - 1, r, q)) / i for i in range(1, v + 1)) if v else 0
    )
    expected = min(1.0, stats.binom.sf(v - 1, r, q) + 2 * m * delta * worst)
    assert one_run_p_value(m, r, v, epsilon, delta) == pytest.approx(expected, abs=1e-9)


def test_one_run_bound_is_where_the_p_value_meets_the_level():
    coins = torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.5
    scores = coins.double() + torch.randn(400, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    epsilon = float(one_run_epsilon(scores, coins, guesses=200, delta=1e-5))
    order = scores.argsort(descending=True)
    right = int(coins[order[:100]].sum() + (~coins[order[300:]]).sum())
    assert one_run_p_value(400, 200, right, epsilon, 1e-5) == pytest.approx(0.05, abs=1e-6)
    with pytest.raises(ValueError, match="guesses must be even and between 2 and the 400 canaries, not 7"):
        one_run_epsilon(scores, coins, guesses=7)


def test_one_run_bound_covers_randomised_response():
    """Randomised response is exactly tight: the bound exceeds its ε in 5 % of runs at most, and comes near it."""
    epsilon, runs, above, bounds = 1.0, 200, 0, []
    keep = math.exp(epsilon) / (1 + math.exp(epsilon))
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        coins = torch.rand(500, generator=generator) < 0.5
        answers = torch.where(torch.rand(500, generator=generator) < keep, coins, ~coins)
        scores = answers.double() + 1e-6 * torch.rand(500, generator=generator, dtype=torch.float64)
        # Half of the canaries may be called in, half out; those beyond the answers' own number are coin tosses.
        bounds.append(float(one_run_epsilon(scores, coins, guesses=300)))
        above += bounds[-1] > epsilon
    assert above <= stats.binom.ppf(0.9999, runs, 0.05)
    assert max(bounds) > 0.7


@pytest.mark.parametrize("first", [True, False])
def test_equal_scores_tell_nothing_of_the_coins_in_any_order(first):
    """Correctness scores of a model that saw nothing, the included canaries first (or last): 40 simulated audits."""
    above = 0
    for seed in range(40):
        coins = torch.tensor([first] * 150 + [not first] * 150)
        correct = (torch.rand(300, generator=torch.Generator().manual_seed(seed)) < 0.8).double()
        above += float(one_run_epsilon(correct, coins)) > 0
    assert above <= stats.binom.ppf(0.999, 40, 0.05)
    # The order of constant scores is the seed's alone.
    bounds = {float(one_run_epsilon(torch.zeros(300), coins, seed=seed)) for seed in range(40)}
    assert 0.0 in bounds
    assert sum(float(one_run_epsilon(torch.zeros(300), coins, seed=s)) > 0 for s in range(40)) <= 6
    assert float(one_run_epsilon(coins.double(), coins)) > 3  # what scores do tell is told


def test_one_run_p_value_of_large_epsilons():
    for epsilon in (36.0, 40.0, 700.0, 1e6, math.inf):
        assert one_run_p_value(10, 4, 4, epsilon, 0.0) == pytest.approx(1.0)
        assert one_run_p_value(10, 4, 4, epsilon, 1e-5) == pytest.approx(1.0)
        assert one_run_p_value(10, 4, 0, epsilon, 1e-5) == 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 4, 4, math.nan, 0.0), ValueError, "epsilon must be a number of at least 0, not nan"),
        ((10, 4, 4, -1.0, 0.0), ValueError, "epsilon must be a number of at least 0"),
        ((10, 4, 4, "1", 0.0), TypeError, "epsilon must be a number"),
        ((10, 4, 4, 1.0, 1.0), ValueError, "delta must be a number in"),
        ((10, 4, 5, 1.0, 0.0), ValueError, "right must be an integer from 0 to 4, not 5"),
        ((10, 11, 5, 1.0, 0.0), ValueError, "guesses must be an integer from 1 to 10, not 11"),
        ((10.0, 4, 4, 1.0, 0.0), TypeError, "canaries must be an integer"),
    ],
)
def test_one_run_p_value_refuses_what_is_no_case(arguments, error, message):
    with pytest.raises(error, match=message):
        one_run_p_value(*arguments)


@pytest.mark.parametrize("settings", [{"guesses": 2.0}, {"guesses": True}, {"guesses": "2"}, {"seed": 0.5}])
def test_one_run_epsilon_takes_integers(settings):
    with pytest.raises(TypeError, match=f"{next(iter(settings))} must be an integer"):
        one_run_epsilon(*groups(0, 5, 5), **settings)


@pytest.mark.parametrize(("fpr", "n", "found"), [(0.29, 100, 7), (0.0, 40, 1), (0.05, 30, 9), (1.0, 12, 11)])
def test_tpr_p_value_is_scipys_hypergeometric(fpr, n, found):
    """Of 11 members ``found`` rank above all but the allowed non-members; 0.29 · 100 falls short of 29 in floats."""
    false = round(fpr * 100) * n // 100
    order = [False] * false + [True] * found + [False] * (n - false) + [True] * (11 - found)
    scores = torch.arange(len(order), 0, -1).double()
    assert float(tpr_at_fpr(scores, torch.tensor(order), fpr)) == pytest.approx(found / 11)
    expected = stats.hypergeom.cdf(false, 11 + n, n, found + false)
    assert tpr_p_value(scores, torch.tensor(order), fpr) == pytest.approx(expected, rel=1e-9)


def test_a_loss_gap_without_spread_is_certain_or_nothing():
    is_member = torch.tensor([True, True, False, False])
    assert loss_gap_p_value(torch.tensor([0.0, 0.0, 2.0, 2.0]), is_member) == 0.0
    assert loss_gap_p_value(torch.tensor([1.0, 1.0, 1.0, 1.0]), is_member) == 1.0
    assert loss_gap_p_value(torch.tensor([2.0, 2.0, 1.0, 1.0]), is_member) == 1.0
    # One example of a group says nothing of its spread.
    assert loss_gap_p_value(torch.tensor([0.0, 2.0, 3.0, 5.0]), torch.tensor([True, False, False, False])) == 1.0
    assert loss_gap_p_value(torch.tensor([0.0, 1.0, 0.0, 5.0]), torch.tensor([True, True, True, False])) == 1.0


@given(
    st.integers(0, 999),
    st.integers(2, 40),
    st.integers(2, 40),
    st.sampled_from([None, 2]),
    st.floats(-3, 3),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([0.2, 0.6, 0.9]),
)
def test_epsilon_is_that_of_loops_over_thresholds(seed, m, n, levels, shift, delta, confidence):
    scores, is_member = groups(seed, m, n, levels, shift)
    found = float(epsilon_lower_bound(scores, is_member, delta=delta, confidence=confidence, seed=seed))
    expected = oracle.epsilon(scores[is_member], scores[~is_member], delta, confidence, seed)
    assert any(found == pytest.approx(bound, abs=1e-9) for bound in expected)


@pytest.mark.parametrize(("canaries", "guesses", "used"), [(41, None, 40), (40, 40, 40), (40, 2, 2), (60, 20, 20)])
def test_one_run_bound_of_guesses_that_are_all_right(canaries, guesses, used):
    """Without δ the p-value is q^r, so the bound is the log odds of 0.1^(1/r)."""
    coins = torch.arange(canaries) < canaries // 2
    found = float(one_run_epsilon(-torch.arange(float(canaries)), coins, guesses=guesses, confidence=0.9))
    q = 0.1 ** (1 / used)
    assert found == pytest.approx(max(0.0, math.log(q / (1 - q))), abs=1e-9)


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


def test_small_p_values_and_lower_bounds_agree():
    """Where an interval says that an attack beats chance, the one-sided p-value is small: it asks for half as much.

    The advantage's are of two tests: its interval weighs the ends of the ROC more than Kolmogorov–Smirnov does.
    """
    shown = dict.fromkeys(("auc", "advantage", "gap"), 0)
    for seed in range(150):
        scores, is_member = groups(seed, 80, 60, shift=0.3)
        for name, metric, values, chance in (
            ("auc", MembershipAUROC(), scores, 0.5),
            ("advantage", AttackAdvantage(), scores, 0.0),
            ("gap", LossGap(), -scores, 0.0),
        ):
            metric.update(values, is_member)
            if metric.interval().low > chance:
                shown[name] += 1
                assert metric.p_value() < (0.1 if name == "advantage" else 0.05), (name, seed)
    assert min(shown.values()) > 5


NULLS = 200


def null(run):
    return groups(1000 + run, 60, 80)


def test_on_data_without_signal_nothing_is_shown():
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


def test_intervals_of_the_auc_cover_one_half():
    covered = 0
    for run in range(NULLS):
        metric = MembershipAUROC(seed=run)
        metric.update(*null(run))
        low, high = metric.interval(0.95)
        covered += low <= 0.5 <= high
    assert covered >= stats.binom.ppf(0.0001, NULLS, 0.95)


def test_a_strong_signal_is_shown():
    scores, is_member = groups(0, 300, 300, shift=3.0)
    for metric in (MembershipAUROC(), TPRAtFPR(0.05), AttackAdvantage(), BalancedAccuracy(), P1Score(accuracy=0.9)):
        metric.update(scores, is_member)
        assert metric.p_value() < 1e-6
    gap = LossGap()
    gap.update(-scores, is_member)
    assert gap.p_value() < 1e-6
    epsilon = EpsilonLowerBound(delta=1e-5)
    epsilon.update(scores, is_member)
    assert 1 < float(epsilon.compute()) < float(epsilon.interval(0.5).low) < epsilon.interval().high == math.inf
    assert "cannot show an ε above 3" in epsilon.note
    assert float(one_run_epsilon(scores, is_member)) > 1


@pytest.mark.parametrize("settings", [{"delta": 1.0}, {"delta": -0.1}, {"confidence": 95}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a number in"):
        EpsilonLowerBound(**settings)
    for function in (epsilon_lower_bound, one_run_epsilon):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a number in"):
            function(*groups(0, 5, 5), **settings)
