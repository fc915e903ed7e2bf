"""ε, δ and μ of Gaussian DP: against Opacus, and against one another."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.gdp import eps_from_mu
from scipy import stats

from lightning_cwrf.metrics.functional import gaussian_delta, gaussian_epsilon, gaussian_mu

TABLE = {0.5: 0.14221, 1.0: 0.26805, 2.0: 0.50155, 4.0: 0.92493, 8.0: 1.66603}


@pytest.mark.parametrize(("epsilon", "mu"), TABLE.items())
def test_mu_of_an_epsilon(epsilon, mu):
    assert gaussian_mu(epsilon, 1e-5) == pytest.approx(mu, abs=1e-5)
    assert gaussian_delta(gaussian_mu(epsilon, 1e-5), epsilon) <= 1e-5
    assert eps_from_mu(mu=gaussian_mu(epsilon, 1e-5), delta=1e-5) == pytest.approx(epsilon, abs=1e-6)


@given(st.floats(0.01, 30), st.floats(1e-9, 0.1))
@settings(max_examples=25, deadline=None)
def test_mu_and_epsilon_are_inverse(epsilon, delta):
    assert gaussian_epsilon(gaussian_mu(epsilon, delta), delta) == pytest.approx(epsilon, abs=1e-9, rel=1e-9)


@given(st.floats(0.05, 5), st.floats(0, 8))
@settings(max_examples=25, deadline=None)
def test_delta_is_the_largest_gap_between_the_tails_of_two_normals(mu, epsilon):
    """Over thresholds t: P(N(μ, 1) > t) − e^ε P(N(0, 1) > t), which is largest at t = ε/μ + μ/2."""
    gaps = [
        stats.norm.sf(t - mu) - math.exp(epsilon) * stats.norm.sf(t)
        for t in (epsilon / mu + mu / 2 + step / 1000 for step in range(-20, 21))
    ]
    assert gaussian_delta(mu, epsilon) == pytest.approx(max(gaps), rel=1e-9, abs=1e-15)


def test_epsilon_is_zero_where_delta_is_large():
    assert gaussian_epsilon(0.1, 0.5) == 0.0
    assert gaussian_epsilon(0.0, 1e-5) == 0.0
    assert gaussian_delta(0.0, 0.0) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("draws", [1, 10, 30])
def test_the_prv_accountant_of_dpsgd_agrees_at_a_sampling_rate_of_one(draws):
    """It is an upper bound, so it is never below, and above by its own tolerance."""
    mu = gaussian_mu(2.0, 1e-5)
    accountant = PRVAccountant()
    for _ in range(draws):
        accountant.step(noise_multiplier=math.sqrt(draws) / mu, sample_rate=1.0)
    assert 0 <= accountant.get_epsilon(1e-5) - 2.0 <= 0.02


@pytest.mark.parametrize("function", [gaussian_mu, gaussian_delta])
def test_wrong_arguments_raise(function):
    with pytest.raises(ValueError, match="of at least 0, not -1"):
        function(-1.0, 0.5)
    with pytest.raises(TypeError, match="must be a number"):
        function("1", 0.5)
    with pytest.raises(ValueError, match="delta must be a number in"):
        gaussian_mu(1.0, 0.0)


def test_epsilon_and_mu_at_extremes_are_on_the_safe_side():
    """True values by arithmetic of 120 digits."""
    mp = pytest.importorskip("mpmath")
    with mp.workdps(120):

        def delta_of(mu, epsilon):
            mu, epsilon = mp.mpf(mu), mp.mpf(epsilon)
            up = mp.erfc((epsilon / mu - mu / 2) / mp.sqrt(2)) / 2
            return up - mp.e**epsilon * mp.erfc((epsilon / mu + mu / 2) / mp.sqrt(2)) / 2

        for delta in (1e-300, 1e-50, 1e-20, 1e-5, 0.5):
            for mu in (1e-12, 1e-9, 1e-3, 1.0, 1e3, 1e6, 1e9):
                assert delta_of(mu, gaussian_epsilon(mu, delta)) <= delta
            for epsilon in (0.0, 1e-12, 1e-6, 1.0, 1e6, 1e18):
                mu = gaussian_mu(epsilon, delta)
                assert mu == 0 or delta_of(mu, epsilon) <= delta
