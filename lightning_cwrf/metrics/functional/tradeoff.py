"""The power that a guarantee allows an attack: the highest TPR at an FPR, of (ε, δ)-DP and of Gaussian DP."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from lightning_cwrf.checks import check_number

HIGHEST = 64.0
"""No larger ε or μ is looked for."""


def dp_power(fpr: NDArray[np.float64], epsilon: float, delta: float) -> NDArray[np.float64]:
    """The highest TPR under (ε, δ)-DP: ``min(1, δ + e^ε x, 1 − e^−ε (1 − δ − x))`` (Wasserman & Zhou 2010).

    >>> dp_power(np.array([0.1]), math.log(2), 0.0).tolist()
    [0.2]
    """
    up = math.exp(epsilon)
    return np.minimum(1.0, np.minimum(delta + up * fpr, 1 - (1 - delta - fpr) / up))


def dp_least_fpr(tpr: float, epsilon: float, delta: float) -> float:
    """The lowest FPR at which (ε, δ)-DP allows this TPR, the inverse of :func:`dp_power`."""
    up = math.exp(epsilon)
    return max(0.0, (tpr - delta) / up, 1 - delta - up * (1 - tpr))


def gaussian_power(fpr: NDArray[np.float64] | float, mu: float) -> NDArray[np.float64]:
    """The highest TPR under μ-GDP, ``Φ(Φ⁻¹(x) + μ)`` (Dong, Roth & Su 2022); with −μ the lowest FPR at a TPR.

    >>> round(float(gaussian_power(np.array(0.5), 1.0)), 4)
    0.8413
    """
    return np.asarray(special.ndtr(special.ndtri(fpr) + mu))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The δ for which μ-GDP is (ε, δ)-DP: Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) (Dong, Roth & Su 2022, Corollary 1).

    Args:
        mu: μ, 0 or more.
        epsilon: ε, 0 or more.

    Raises:
        TypeError: not numbers.
        ValueError: out of range.

    >>> round(gaussian_delta(1.0, 1.0), 4), gaussian_delta(0.0, 1.0)
    (0.1269, 0.0)
    """
    check_number("mu", mu, low=0)
    check_number("epsilon", epsilon, low=0)
    return _delta_and_error(mu, epsilon)[0]


def _delta_and_error(mu: float, epsilon: float) -> tuple[float, float]:
    """δ, and a bound on its rounding error.

    With a = μ/2 − ε/μ and b = μ/2 + ε/μ, ``e^ε φ(b) = φ(a)``, so that ``e^ε Φ(−b) = ½ e^(−a²/2) erfcx(b/√2)``, in which
    nothing overflows or cancels.
    """
    if mu == 0:
        return 0.0, 0.0
    a, b = mu / 2 - epsilon / mu, mu / 2 + epsilon / mu
    density = math.exp(-a * a / 2)
    if a < 0 and density == 0:
        return 0.0, sys.float_info.min
    second = density * float(special.erfcx(b / math.sqrt(2))) / 2
    first = density * float(special.erfcx(-a / math.sqrt(2))) / 2 if a < 0 else float(special.ndtr(a))
    one = sys.float_info.epsilon
    rounded = 4 * one * b * (1 + min(abs(a), 64.0)) * density  # of a and b
    error = rounded + 16 * one * (first + second) * (1 + min(a * a, 4096.0) * (a < 0))
    return max(0.0, first - second), error + sys.float_info.min


def _at_most(mu: float, epsilon: float, delta: float) -> bool:
    """Whether μ-GDP is (ε, δ)-DP, also if all rounding went the other way."""
    found, error = _delta_and_error(mu, epsilon)
    return mu == 0 or found + error <= delta


def gaussian_epsilon(mu: float | Tensor, delta: float) -> float:
    """The ε for which μ-GDP is (ε, δ)-DP, the inverse of :func:`gaussian_delta` (Dong, Roth & Su 2022, Corollary 1).

    It is rounded up. A lower bound on μ says that no Gaussian mechanism with less explains an attack; the ε of that μ
    is a lower bound on the training's own ε at this δ only so far as the training is Gaussian DP, as DP-SGD over many
    steps nearly is.

    Args:
        mu: μ, 0 or more; or a scalar tensor of it.
        delta: δ, above 0.

    Raises:
        TypeError: not numbers.
        ValueError: out of range.

    >>> round(gaussian_epsilon(1.0, 1e-5), 2)
    4.38
    """
    mu = float(mu) if isinstance(mu, Tensor) and mu.ndim == 0 else mu  # as mu_lower_bound returns it
    check_number("mu", mu, low=0)
    mu = float(mu)
    check_number("delta", delta, low=0, high=1, low_open=True, high_open=True)

    if _at_most(mu, 0.0, delta):
        return 0.0
    low, high = 0.0, 1.0
    while not _at_most(mu, high, delta):
        low, high = high, 2 * high
        if math.isinf(high):
            raise ValueError(f"mu={mu:g} is too large for an ε that floating point can hold.")
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if _at_most(mu, middle, delta) else (middle, high)
    return high


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest μ for which μ-GDP is (ε, δ)-DP, the inverse of :func:`gaussian_epsilon`, by bisection from below.

    Args:
        epsilon: ε, 0 or more.
        delta: δ, above 0.

    Raises:
        TypeError: not numbers.
        ValueError: out of range.

    >>> round(gaussian_mu(1.0, 1e-5), 5)
    0.26805
    """
    check_number("epsilon", epsilon, low=0)
    check_number("delta", delta, low=0, high=1, low_open=True, high_open=True)
    low, high = 0.0, 1.0
    while _at_most(high, epsilon, delta):
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _at_most(middle, epsilon, delta) else (low, middle)
    return low


def largest_rejected(rejects: Callable[[float], bool]) -> float:
    """The largest value from 0 to :data:`HIGHEST` that is rejected, as all below it are; 0 if none is. By bisection.

    >>> round(largest_rejected(lambda value: value < 1.5), 9)
    1.5
    """
    low, high = 0.0, 1.0
    if not rejects(1e-9):
        return 0.0
    while high < HIGHEST and rejects(high):
        low, high = high, 2 * high
    for _ in range(32):
        middle = (low + high) / 2
        low, high = (middle, high) if rejects(middle) else (low, middle)
    return low
