"""Lower bounds on ε: against loops and the theorem, and calibrated."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_cwrf.metrics import (
    EpsilonLowerBound,
)
from lightning_cwrf.metrics.functional import (
    epsilon_lower_bound,
    f_dp_rejects,
    gaussian_epsilon,
    largest_epsilon_bound,
    mu_lower_bound,
    one_run_epsilon,
    one_run_mu,
    one_run_p_value,
)
from lightning_cwrf.metrics.functional.tradeoff import dp_least_fpr, gaussian_power
from tests.metrics.cases import groups
from tests.oracles import intervals as oracle


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
def test_ties_give_no_bound_in_any_order(first):
    """Correctness scores of a model that saw nothing, the included canaries first (or last): 40 simulated audits."""
    above = 0
    for seed in range(40):
        coins = torch.tensor([first] * 150 + [not first] * 150)
        correct = (torch.rand(300, generator=torch.Generator().manual_seed(seed)) < 0.8).double()
        above += float(one_run_epsilon(correct, coins, seed=seed)) > 0  # the coins are not random here, the order is
    assert above <= stats.binom.ppf(0.999, 40, 0.05)
    # The order of constant scores depends on the seed only.
    bounds = {float(one_run_epsilon(torch.zeros(300), coins, seed=seed)) for seed in range(40)}
    assert 0.0 in bounds
    assert sum(float(one_run_epsilon(torch.zeros(300), coins, seed=s)) > 0 for s in range(40)) <= 6
    assert float(one_run_epsilon(coins.double(), coins)) > 3  # informative scores give a bound


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
def test_invalid_arguments_of_the_one_run_p_value_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        one_run_p_value(*arguments)


@pytest.mark.parametrize("wrong", [{"guesses": 2.0}, {"guesses": True}, {"guesses": "2"}, {"seed": 0.5}])
def test_one_run_epsilon_takes_integers(wrong):
    with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be an integer"):
        one_run_epsilon(*groups(0, 5, 5), **wrong)


def dp(fpr, epsilon, delta):
    up = math.exp(epsilon)
    return np.clip(np.minimum(delta + up * fpr, 1 - (1 - delta - fpr) / up), 0, 1)


def gdp(fpr, mu):
    return stats.norm.cdf(stats.norm.ppf(fpr) + mu)


@pytest.mark.slow
@given(
    st.integers(0, 999),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([None, 2]),
    st.floats(-3, 3),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([0.2, 0.6, 0.9]),
)
@settings(max_examples=10, deadline=None)
def test_bounds_are_those_of_loops_over_thresholds(seed, m, n, levels, shift, delta, confidence):
    scores, is_member = groups(seed, m, n, levels, shift)
    case = scores[is_member], scores[~is_member]
    found = float(epsilon_lower_bound(scores, is_member, delta=delta, confidence=confidence, seed=seed))
    expected = oracle.privacy_bound(*case, lambda fpr, value: dp(fpr, value, delta), confidence, seed)
    assert found == pytest.approx(expected, abs=2e-3)
    found = float(mu_lower_bound(scores, is_member, confidence=confidence, seed=seed))
    assert found == pytest.approx(oracle.privacy_bound(*case, gdp, confidence, seed), abs=2e-3)


def test_bounds_do_not_depend_on_the_order_of_the_examples():
    scores, is_member = groups(0, 60, 50, 4, 1.5)
    order = torch.randperm(110)
    for function in (epsilon_lower_bound, mu_lower_bound):
        assert function(scores[order], is_member[order]) == function(scores, is_member) > 0


def test_a_perfect_attack_shows_the_largest_bound():
    for m, n in ((5, 5), (40, 60), (300, 300)):
        is_member = torch.arange(m + n) < m
        for delta in (0.0, 1e-3):
            found = float(epsilon_lower_bound(is_member.double(), is_member, delta=delta, confidence=0.9))
            assert found == largest_epsilon_bound(m, n, delta=delta, confidence=0.9) > 0
    assert largest_epsilon_bound(2, 2) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mu", [0.0, 1.0, 2.5])
def test_bounds_from_all_thresholds_are_below_the_truth(mu):
    """200 audits of a Gaussian mechanism, exactly μ-GDP: above the truth in at most 5 %, and not far below."""
    runs, n, truth = 200, 500, gaussian_epsilon(mu, 1e-5)
    epsilons, mus = torch.zeros(runs), torch.zeros(runs)
    is_member = torch.arange(2 * n) < n
    for run in range(runs):
        generator = torch.Generator().manual_seed(run)
        scores = torch.randn(2 * n, generator=generator, dtype=torch.float64) + mu * is_member
        epsilons[run] = epsilon_lower_bound(scores, is_member, delta=1e-5)
        mus[run] = mu_lower_bound(scores, is_member)
    most = stats.binom.ppf(0.999, runs, 0.05)
    assert int((epsilons > truth).sum()) <= most
    assert int((mus > mu).sum()) <= most
    assert float(mus.mean()) >= 0.8 * mu


def test_bounds_with_2000_examples_per_side():
    """2,000 members N(1, 1) and 2,000 non-members N(0, 1): halves gave 1.27 on average, the truth is 4.38."""
    bounds = []
    for run in range(20):
        scores = torch.randn(4000, generator=torch.Generator().manual_seed(run), dtype=torch.float64)
        is_member = torch.arange(4000) < 2000
        bounds.append(float(epsilon_lower_bound(scores + is_member, is_member, delta=1e-5)))
    assert 1.7 < sum(bounds) / 20 < max(bounds) < 4.38


@given(st.floats(0.01, 5), st.sampled_from([1e-6, 1e-3, 0.1]))
def test_the_epsilon_of_a_mu_is_where_its_delta_is(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    spent = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    assert spent == pytest.approx(delta, rel=1e-6) if epsilon > 0 else spent <= delta
    # Both guarantees allow the same power at one FPR, and ε's the more everywhere else.
    fprs = np.linspace(1e-6, 1 - 1e-6, 2000)
    assert (dp(fprs, epsilon, delta) - gdp(fprs, mu)).min() > -1e-7


def test_the_epsilon_of_a_mu_at_its_ends():
    assert gaussian_epsilon(0.0, 1e-5) == 0
    assert gaussian_epsilon(torch.tensor(1.0, dtype=torch.float64), 1e-5) == gaussian_epsilon(1.0, 1e-5)
    assert gaussian_epsilon(1e-6, 1e-5) == 0
    assert gaussian_epsilon(30.0, 1e-9) > 450
    for wrong in ({"mu": -1.0, "delta": 0.1}, {"mu": 1.0, "delta": 0.0}, {"mu": 1.0, "delta": 1.0}):
        with pytest.raises(ValueError, match=r"(mu|delta) must be a number"):
            gaussian_epsilon(**wrong)


@given(st.integers(2, 12), st.integers(0, 8), st.integers(0, 12), st.floats(0, 3), st.sampled_from([0.0, 0.01, 0.2]))
@settings(max_examples=40, deadline=None)
def test_f_dp_rejects_what_the_linear_program_does_not_allow(guesses, abstained, right, epsilon, delta):
    right, canaries, up = min(right, guesses), guesses + abstained, math.exp(epsilon)
    lines = [(1.0, 0.0), (delta, up), (1 - (1 - delta) / up, 1 / up)]
    tail = oracle.largest_tail(lines, canaries, guesses, right)

    def rejects(level):
        return f_dp_rejects(lambda tpr: dp_least_fpr(tpr, epsilon, delta), canaries, guesses, right, level)

    assert not rejects(max(0.0, tail * (1 - 1e-6) - 1e-9))
    assert rejects(tail * (1 + 1e-6) + 1e-9) or tail > 1 - 1e-6


@pytest.mark.slow
@given(st.integers(2, 10), st.integers(0, 8), st.integers(1, 10), st.floats(0.05, 2))
@settings(max_examples=20, deadline=None)
def test_f_dp_of_a_gaussian_rejects_what_the_linear_program_does_not_allow(guesses, abstained, right, mu):
    right, canaries = min(right, guesses), guesses + abstained
    points = stats.norm.cdf(np.linspace(-6, 6, 600))
    slopes = np.exp(-mu * stats.norm.ppf(points) - mu**2 / 2)
    lines = [(float(g - s * x), float(s)) for g, s, x in zip(gdp(points, mu), slopes, points, strict=True)]
    tail = oracle.largest_tail([(1.0, 0.0), *lines], canaries, guesses, right)  # tangents, so it is slightly high

    def rejects(level):
        return f_dp_rejects(lambda tpr: float(gaussian_power(tpr, -mu)), canaries, guesses, right, level)

    assert not rejects(tail * 0.998 - 1e-6) or tail < 1e-4
    assert rejects(tail * 1.0001 + 1e-7) or tail > 1 - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("guesses", [None, 60])
def test_one_run_bounds_are_below_the_truth(guesses):
    """200 one-run audits of the Gaussian mechanism (each canary's score is its own), in at most 5 % above."""
    runs, m, mu = 200, 240, 1.0
    truth, above, mus = gaussian_epsilon(mu, 1e-5), {"epsilon": 0, "mu": 0}, []
    for run in range(runs):
        generator = torch.Generator().manual_seed(run)
        coins = torch.rand(m, generator=generator) < 0.5
        scores = torch.randn(m, generator=generator, dtype=torch.float64) + mu * coins
        mus.append(float(one_run_mu(scores, coins, guesses=guesses)))
        above["mu"] += mus[-1] > mu
        above["epsilon"] += float(one_run_epsilon(scores, coins, guesses=guesses, delta=1e-5)) > truth
    most = stats.binom.ppf(0.999, runs, 0.05)
    assert max(above.values()) <= most, above
    assert sum(mus) / runs > 0.15


@pytest.mark.slow
@pytest.mark.parametrize(("m", "mu"), [(240, 2.0), (1000, 1.0)])
def test_bounds_without_a_number_of_guesses_are_near_the_best(m, mu):
    """Of 10 audits on average at least 80 % of the best fixed number, which nobody knows beforehand."""
    numbers = [None, *(r for r in (m, m // 2, m // 4, m // 10, m // 20, m // 40) if r >= 6)]
    found = dict.fromkeys(numbers, 0.0)
    for run in range(10):
        generator = torch.Generator().manual_seed(run)
        coins = torch.rand(m, generator=generator) < 0.5
        scores = torch.randn(m, generator=generator, dtype=torch.float64) + mu * coins
        for r in numbers:
            found[r] += float(one_run_epsilon(scores, coins, guesses=r and r // 2 * 2, delta=1e-5)) / 10
    free = found.pop(None)
    assert free > 0.8 * max(found.values()) > 0
    assert free > 1.5 * found[m]


def test_the_f_dp_bound_is_never_below_that_of_the_theorem():
    """Of one training with δ = 1e-2, where the theorem's term 2 m δ is large."""
    coins = torch.rand(200, generator=torch.Generator().manual_seed(3)) < 0.5
    order = torch.rand(200, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = float(one_run_epsilon(coins + 0.2 * order, coins, guesses=100, delta=1e-2))
    assert one_run_p_value(200, 100, 100, found - 1e-3, 1e-2) > 0.05
    assert found > 1


@pytest.mark.parametrize("wrong", [{"guesses": 2.0}, {"guesses": True}, {"seed": 0.5}])
def test_one_run_mu_takes_integers(wrong):
    with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be an integer"):
        one_run_mu(*groups(0, 5, 5), **wrong)


@pytest.mark.parametrize(
    ("canaries", "guesses", "used"), [(41, 40, 40), (41, None, 40), (40, 40, 40), (40, 2, 2), (60, 20, 20)]
)
def test_one_run_bound_of_guesses_that_are_all_right(canaries, guesses, used):
    """Without δ the p-value is q^r, so the bound is the log odds of 0.1^(1/r)."""
    coins = torch.arange(canaries) < canaries // 2
    found = float(one_run_epsilon(-torch.arange(float(canaries)), coins, guesses=guesses, confidence=0.9))
    q = 0.1 ** (1 / used)
    assert found == pytest.approx(max(0.0, math.log(q / (1 - q))), abs=1e-9)


@pytest.mark.parametrize("settings", [{"delta": 1.0}, {"delta": -0.1}, {"confidence": 95}])
def test_invalid_settings_raise(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a number in"):
        EpsilonLowerBound(**settings)
    for function in (
        epsilon_lower_bound,
        one_run_epsilon,
        *([] if "delta" in settings else [mu_lower_bound, one_run_mu]),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a number in"):
            function(*groups(0, 5, 5), **settings)
