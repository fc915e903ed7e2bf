"""Lower bounds on ε, and on the μ of Gaussian DP, from the success of an attack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from lightning_cwrf.checks import check_confidence, check_integer, check_number
from lightning_cwrf.metrics.functional.roc import split_scores
from lightning_cwrf.metrics.functional.tradeoff import dp_power, gaussian_power, largest_rejected

Array: TypeAlias = NDArray[np.float64]
_Test: TypeAlias = tuple[Array, Array, int, int]  # rates beyond a threshold, their weights, hits beyond it, of how many

NODES = 201
"""Points of the integral over an unknown FPR; the trapezoid rule needs no more."""


def epsilon_lower_bound(
    scores: Tensor, is_member: Tensor, *, delta: float = 0.0, confidence: float = 0.95, seed: int = 0
) -> Tensor:
    """A lower bound on the training's ε, from several thresholds at once, with all examples.

    The thresholds are non-members: of n, the highest, the 3rd, 9th, 27th, ... highest, up to the half. The FPR above
    the j-th highest of n non-members is Beta(j, n + 1 − j) distributed, whatever the scores' distribution. If the
    training is (ε, δ)-DP, the TPR there is at most ``power(FPR) = min(1, δ + e^ε FPR, 1 − e^−ε (1 − δ − FPR))``, so
    that M or more of m members are above it with a probability of at most ``E[P(Bin(m, power(FPR)) ≥ M)]``, the mean
    over that Beta distribution. The same below the lowest members. The bound is the largest ε that one of the t tests
    rejects at the level ``(1 − confidence) / t`` (Bonferroni). Nothing is estimated, so this is exact for
    independent examples; for one trained model that is an assumption, which
    :func:`~lightning_cwrf.metrics.functional.one_run_epsilon` does not need. The test is ours.

    Args:
        scores: shape ``(n,)``, higher = more likely a member.
        is_member: bool ``(n,)``.
        delta: δ of the guarantee that is tested.
        confidence: of the bound.
        seed: of the order of equal scores, which is random.

    Returns:
        A scalar float64 tensor, 0 if there is no positive bound.

    Raises:
        ValueError: wrong shapes, NaN scores, one group missing, a δ or confidence out of range.

    >>> separated = torch.arange(400.0)
    >>> round(float(epsilon_lower_bound(separated, separated >= 200)), 1)
    4.3
    """
    check_number("delta", delta, low=0, high=1, high_open=True)
    return _lower_bound(scores, is_member, partial(_dp, delta=delta), confidence, seed)


def mu_lower_bound(scores: Tensor, is_member: Tensor, *, confidence: float = 0.95, seed: int = 0) -> Tensor:
    """A lower bound on the μ for which the training can be μ-GDP (Dong, Roth & Su 2022), as that on ε is made.

    Under μ-GDP the TPR is at most ``Φ(Φ⁻¹(FPR) + μ)``.
    :func:`~lightning_cwrf.metrics.functional.gaussian_epsilon` gives the ε of a μ at a δ.

    Args:
        scores: shape ``(n,)``, higher = more likely a member.
        is_member: bool ``(n,)``.
        confidence: of the bound.
        seed: of the order of equal scores, which is random.

    Returns:
        A scalar float64 tensor, 0 if there is no positive bound.

    Raises:
        ValueError: wrong shapes, NaN scores, one group missing, a confidence out of range.

    >>> scores = torch.cat([torch.linspace(-1, 3, 500), torch.linspace(-2, 2, 500)])
    >>> round(float(mu_lower_bound(scores, torch.arange(1000) < 500)), 1)
    1.6
    """
    return _lower_bound(scores, is_member, gaussian_power, confidence, seed)


def largest_epsilon_bound(members: int, nonmembers: int, *, delta: float = 0.0, confidence: float = 0.95) -> float:
    """The bound on ε of so many members that all score above so many non-members: no attack can show more.

    >>> round(largest_epsilon_bound(200, 200), 1), largest_epsilon_bound(2, 2)
    (4.3, 0.0)
    """
    ranks = [_ranks(nonmembers), _ranks(members)]
    hits = [np.full(len(ranks[0]), members), np.full(len(ranks[1]), nonmembers)]
    return _bound(hits, ranks, (members, nonmembers), partial(_dp, delta=delta), confidence)


def _dp(fpr: Array, epsilon: float, delta: float) -> Array:
    return dp_power(fpr, epsilon, delta)


def _lower_bound(
    scores: Tensor, is_member: Tensor, power: Callable[[Array, float], Array], confidence: float, seed: int
) -> Tensor:
    check_confidence(confidence)
    check_integer("seed", seed)
    members, nonmembers = (len(part) for part in split_scores(scores, is_member))
    # Equal scores are shuffled, from an order that does not depend on that of the examples.
    order = scores.argsort()
    order = order[is_member[order].to(torch.uint8).argsort(stable=True)]
    shuffled = order[torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed)).to(order.device)]
    flags = is_member[shuffled[scores[shuffled].argsort(stable=True)]].cpu().numpy()
    above = np.flatnonzero(~flags)[::-1]  # places of the non-members, the highest first
    below = np.flatnonzero(flags)  # places of the members, the lowest first
    ranks = [_ranks(nonmembers), _ranks(members)]
    total = len(flags) - 1
    # Above the j-th highest non-member there are j − 1 non-members; the rest are members. Likewise below.
    hits = [total - above[ranks[0] - 1] - (ranks[0] - 1), below[ranks[1] - 1] - (ranks[1] - 1)]
    bound = _bound(hits, ranks, (members, nonmembers), power, confidence)
    return torch.tensor(bound, dtype=torch.float64)


def _ranks(count: int) -> NDArray[np.int64]:
    """1, 3, 9, 27, ... up to half of the examples."""
    ranks = [1]
    while 3 * ranks[-1] <= count / 2:
        ranks.append(3 * ranks[-1])
    return np.array(ranks)


def _bound(
    hits: list[NDArray[np.int64]],
    ranks: list[NDArray[np.int64]],
    counts: tuple[int, int],
    power: Callable[[Array, float], Array],
    confidence: float,
) -> float:
    """The largest value that a test above a non-member or below a member rejects."""
    members, nonmembers = counts
    level = (1 - confidence) / sum(len(part) for part in ranks)
    tests = []
    for part, found, reference, trials in (
        (ranks[0], hits[0], nonmembers, members),
        (ranks[1], hits[1], members, nonmembers),
    ):
        tests += [(*each, trials) for each in zip(*_rates(part, reference), found, strict=True) if each[-1] > 0]

    def rejects(value: float) -> bool:
        nonlocal tests
        rejecting = [test for test in tests if _p_value(test, power, value) <= level]
        tests = rejecting or tests  # a test that does not reject here rejects no larger value
        return bool(rejecting)

    return largest_rejected(rejects)


def _p_value(test: _Test, power: Callable[[Array, float], Array], value: float) -> float:
    rates, weights, found, trials = test
    return float(special.bdtrc(found - 1.0, trials, power(rates, value)) @ weights)


def _rates(ranks: NDArray[np.int64], count: int) -> tuple[Array, Array]:
    """Values of the rate beyond the j-th of ``count`` ordered examples, and their weights, ``(ranks, NODES)`` each."""
    beta = stats.beta(ranks[:, None], count + 1 - ranks[:, None])
    low, high = (special.logit(beta.ppf(tail)) for tail in (1e-12, 1 - 1e-12))
    logits = low + (high - low) * np.linspace(0, 1, NODES)
    rates = special.expit(logits)
    # The density of the log odds is that of the rate times rate (1 − rate).
    logs = beta.logpdf(rates) + special.log_expit(logits) + special.log_expit(-logits)
    weights = np.exp(logs - logs.max(1, keepdims=True))
    return rates, weights / weights.sum(1, keepdims=True)
