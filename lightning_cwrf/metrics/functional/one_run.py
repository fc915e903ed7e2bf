"""Auditing with one training run: bounds on ε and on the μ of Gaussian DP from guesses which canaries were included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from scipy import special
from torch import Tensor

from lightning_cwrf.checks import check_confidence, check_integer, check_number
from lightning_cwrf.metrics.functional.roc import split_scores
from lightning_cwrf.metrics.functional.tradeoff import dp_least_fpr, gaussian_power, largest_rejected

Rejects: TypeAlias = Callable[[int, int, int, float, float], bool]

FEWEST_GUESSES = 16
"""The fewest guesses that are tried where their number is not given."""


def one_run_epsilon(
    scores: Tensor,
    included: Tensor,
    *,
    guesses: int | None = None,
    delta: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Tensor:
    """Privacy auditing with one training run (Steinke, Nasr & Jagielski 2023): a lower bound on ε at a confidence.

    Each of m canaries is included in the one training independently with probability 1/2. The auditor guesses "in" for
    the ``guesses / 2`` highest scores, "out" for as many lowest, and abstains on the rest. If the training is
    (ε, δ)-DP, v or more of the r guesses are correct with a probability of at most
    ``P(B ≥ v) + 2mδ · max_i {P(v − i ≤ B < v) / i}`` with B ~ Binomial(r, e^ε / (1 + e^ε)) (their main theorem), and
    at most by the recursion of Mahloujifar, Melis & Chaudhuri (2024), which uses the whole trade-off curve of
    (ε, δ)-DP (:func:`f_dp_rejects`). Both hold, so the bound is the largest ε that either of them rejects. Ties are
    ordered at random, so that the order of the canaries carries no information.

    Without ``guesses``, m, m/4, m/16, ... of them are tried (16 at least), g numbers in all, each at the level
    ``(1 − confidence) / g``, and the best bound is taken: by Bonferroni's inequality it is as valid as one of a number
    that was fixed beforehand.

    Args:
        scores: of the m canaries, ``(m,)``, higher = more likely included.
        included: bool ``(m,)``, whether each was included.
        guesses: r, even; fix it before looking at the scores. None: several are tried, and paid for.
        delta: δ.
        confidence: of the bound.
        seed: of the order of ties; fix it beforehand too.

    Returns:
        A scalar float64 tensor, 0 if there is no positive bound.

    Raises:
        TypeError: guesses or a seed that are not integers.
        ValueError: an odd number of guesses, or more than there are canaries; a δ or confidence out of range.

    >>> coins = torch.tensor([True, False] * 100)
    >>> round(float(one_run_epsilon(coins.double(), coins, guesses=200)), 2)  # every guess is correct
    4.19
    >>> round(float(one_run_epsilon(coins.double(), coins)), 2)
    3.98
    """
    check_number("delta", delta, low=0, high=1, high_open=True)

    def rejects(canaries: int, guesses: int, right: int, epsilon: float, level: float) -> bool:
        if one_run_p_value(canaries, guesses, right, epsilon, delta) <= level:
            return True
        # Without δ the theorem is exact, for randomised response.
        return delta > 0 and f_dp_rejects(
            lambda tpr: dp_least_fpr(tpr, epsilon, delta), canaries, guesses, right, level
        )

    return _bound(scores, included, guesses, confidence, seed, rejects)


def one_run_mu(
    scores: Tensor, included: Tensor, *, guesses: int | None = None, confidence: float = 0.95, seed: int = 0
) -> Tensor:
    """A lower bound on the μ for which one training can be μ-GDP (Mahloujifar, Melis & Chaudhuri 2024).

    As :func:`one_run_epsilon`, with the trade-off curve of Gaussian DP, ``Φ(Φ⁻¹(x) + μ)``.
    :func:`~lightning_cwrf.metrics.functional.gaussian_epsilon` gives the ε of a μ at a δ. For DP-SGD, which is nearly
    Gaussian DP, this is tighter than :func:`one_run_epsilon`, which allows for a training that is the worst for its ε.

    Args:
        scores: of the m canaries, ``(m,)``, higher = more likely included.
        included: bool ``(m,)``, whether each was included.
        guesses: as for :func:`one_run_epsilon`.
        confidence: of the bound.
        seed: of the order of ties.

    Returns:
        A scalar float64 tensor, 0 if there is no positive bound.

    Raises:
        TypeError, ValueError: as :func:`one_run_epsilon`.

    >>> coins = torch.tensor([True, False] * 100)
    >>> round(float(one_run_mu(coins.double(), coins, guesses=200)), 2)
    1.92
    """

    def rejects(canaries: int, guesses: int, right: int, mu: float, level: float) -> bool:
        return f_dp_rejects(lambda tpr: float(gaussian_power(tpr, -mu)), canaries, guesses, right, level)

    return _bound(scores, included, guesses, confidence, seed, rejects)


def f_dp_rejects(least_fpr: Callable[[float], float], canaries: int, guesses: int, right: int, level: float) -> bool:
    """Whether f-DP leaves ``right`` or more correct guesses a probability below ``level`` (Mahloujifar et al. 2024).

    Of m canaries the auditor guesses r. Let p_l be the probability of exactly l correct guesses. Turning one canary's
    coin turns a correct guess about it into a wrong one, so f-DP bounds
    ``Σ_{l ≥ i} p_l l / m`` by the power at ``Σ_{l ≥ i − 1} p_l (r − l) / m``, for every i. From a tail of ``level`` at
    v these inequalities give, going down from v to 0, the least total probability that all numbers of correct guesses
    must have. Where it exceeds 1, the tail is smaller than ``level`` (Theorem 3.2 and its algorithm, with abstention).

    Args:
        least_fpr: the lowest FPR at which the guarantee allows a TPR.
        canaries: m.
        guesses: r.
        right: v.
        level: of the test.

    >>> f_dp_rejects(lambda tpr: tpr, 20, 20, 15, 0.05), f_dp_rejects(lambda tpr: tpr, 20, 20, 14, 0.05)
    (True, False)
    """
    caught, missed = level * right / canaries, level * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        needed = max(missed, least_fpr(caught))
        caught += i / (guesses - i) * (needed - missed)
        missed = needed
        if caught + missed > guesses / canaries:
            return True
    return False


def _bound(
    scores: Tensor, included: Tensor, guesses: int | None, confidence: float, seed: int, rejects: Rejects
) -> Tensor:
    check_confidence(confidence)
    check_integer("seed", seed)
    split_scores(scores, included)
    m = len(scores)
    if guesses is not None:
        check_integer("guesses", guesses)
        if guesses % 2 or not 2 <= guesses <= m:
            raise ValueError(f"guesses must be even and between 2 and the {m} canaries, not {guesses}.")
    numbers = _numbers(m) if guesses is None else [guesses]
    level = (1 - confidence) / len(numbers)
    shuffled = torch.randperm(m, generator=torch.Generator().manual_seed(seed)).to(scores.device)
    order = included[shuffled[scores[shuffled].argsort(descending=True, stable=True)]].long().cpu()
    right = [int(order[: r // 2].sum() + (1 - order[m - r // 2 :]).sum()) for r in numbers]

    def any_rejects(value: float) -> bool:
        return any(rejects(m, r, v, value, level) for r, v in zip(numbers, right, strict=True))

    return torch.tensor(largest_rejected(any_rejects), dtype=torch.float64)


def _numbers(m: int) -> list[int]:
    """m, m/4, m/16, ..., each even.

    >>> _numbers(1001), _numbers(20)
    ([1000, 250, 62], [20])
    """
    numbers = [m - m % 2]
    while (fewer := numbers[-1] // 8 * 2) >= FEWEST_GUESSES:
        numbers.append(fewer)
    return numbers


def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """An upper bound on the probability of ``right`` or more correct guesses under (ε, δ)-DP (Steinke et al. 2023).

    Args:
        canaries: m.
        guesses: r, at most m.
        right: v, at most r.
        epsilon: ε, 0 or more; infinite is allowed.
        delta: δ.

    Raises:
        TypeError: counts that are not integers, an ε or δ that is not a number.
        ValueError: out of range.

    >>> round(one_run_p_value(10, 4, 4, 0.0, 0.0), 6)
    0.0625
    """
    check_integer("canaries", canaries, low=1)
    check_integer("guesses", guesses, low=1, high=canaries)
    check_integer("right", right, low=0, high=guesses)
    check_number("delta", delta, low=0, high=1, high_open=True)
    if epsilon != math.inf:
        check_number("epsilon", epsilon, low=0)
    q = float(special.expit(epsilon))
    tail = float(special.bdtrc(right - 1, guesses, q)) if right else 1.0
    if delta == 0.0 or right == 0:
        return min(1.0, tail)
    i = np.arange(1, right + 1)
    at_least = np.where(i == right, 1.0, special.bdtrc(right - i - 1.0, guesses, q))  # P(B >= right - i)
    return min(1.0, tail + 2 * canaries * delta * float(((at_least - tail) / i).max()))
