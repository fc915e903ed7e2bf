"""Lower bounds on ε: against loops and the theorem, and calibrated."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_cwrf.metrics import (
    EpsilonLowerBound,
)
from lightning_cwrf.metrics.functional import (
    epsilon_lower_bound,
    one_run_epsilon,
    one_run_p_value,
)
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
        above += float(one_run_epsilon(correct, coins)) > 0
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


@pytest.mark.parametrize("settings", [{"guesses": 2.0}, {"guesses": True}, {"guesses": "2"}, {"seed": 0.5}])
def test_one_run_epsilon_takes_integers(settings):
    with pytest.raises(TypeError, match=f"{next(iter(settings))} must be an integer"):
        one_run_epsilon(*groups(0, 5, 5), **settings)


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


@pytest.mark.parametrize("settings", [{"delta": 1.0}, {"delta": -0.1}, {"confidence": 95}])
def test_invalid_settings_raise(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a number in"):
        EpsilonLowerBound(**settings)
    for function in (epsilon_lower_bound, one_run_epsilon):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a number in"):
            function(*groups(0, 5, 5), **settings)
