"""Lower bounds on ε from the success of an attack."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import special
from torch import Tensor

from lightning_cwrf.checks import check_confidence, check_integer, check_number
from lightning_cwrf.metrics.functional.intervals import clopper_pearson, wilson
from lightning_cwrf.metrics.functional.roc import membership_roc, split_scores


def epsilon_lower_bound(
    scores: Tensor, is_member: Tensor, *, delta: float = 0.0, confidence: float = 0.95, seed: int = 0
) -> Tensor:
    """A lower bound on the training's ε: ``log((TPR − δ) / FPR)``, ``log((TNR − δ) / FNR)``, or 0.

    A random half of the members and of the non-members chooses the threshold and which of the two ratios; the other
    half measures, with Clopper–Pearson bounds of both rates, so the choice does not bias the bound. Examples count as
    independent trials; for one trained model that is an assumption, which :func:`one_run_epsilon` does not need.

    Args:
        scores: shape ``(n,)``, higher = more likely a member.
        is_member: bool ``(n,)``.
        delta: δ of the guarantee that is tested.
        confidence: of both bounds together.
        seed: of the split.

    Returns:
        A scalar float64 tensor, 0 if there is no positive bound.

    Raises:
        ValueError: wrong shapes, NaN scores, one group missing, a δ or confidence out of range.

    >>> separated = torch.arange(400.0)
    >>> round(float(epsilon_lower_bound(separated, separated >= 200)), 1)
    3.3
    """
    check_confidence(confidence)
    check_number("delta", delta, low=0, high=1, high_open=True)
    check_integer("seed", seed)
    members, nonmembers = split_scores(scores, is_member)
    generator = torch.Generator().manual_seed(seed)
    if len(members) < 2 or len(nonmembers) < 2:
        return torch.zeros((), dtype=torch.float64)
    choose, measure = [], []
    for part in (members, nonmembers):
        part = part.sort().values  # so that the split does not depend on the order of the examples
        order = torch.randperm(len(part), generator=generator).to(part.device)
        choose.append(part[order[: len(part) // 2]])
        measure.append(part[order[len(part) // 2 :]])
    threshold, high = _best_test(*choose, delta=delta, confidence=confidence)
    hits, false = (int((part >= threshold).sum()) for part in measure)
    tpr, fpr = clopper_pearson(hits, len(measure[0]), confidence), clopper_pearson(false, len(measure[1]), confidence)
    top, bottom = (tpr.low, fpr.high) if high else (1 - fpr.high, 1 - tpr.low)
    bound = max(0.0, math.log((top - delta) / bottom)) if top > delta else 0.0
    return torch.tensor(bound, dtype=torch.float64)


def _best_test(members: Tensor, nonmembers: Tensor, *, delta: float, confidence: float) -> tuple[float, bool]:
    """The threshold with the largest bound, and whether to test above it (TPR / FPR) or below it (TNR / FNR).

    By Wilson's intervals, for all thresholds at once. Any choice is valid, as the other half measures.
    """
    scores = torch.cat([members, nonmembers])
    fpr, tpr, thresholds = membership_roc(scores, torch.arange(len(scores), device=scores.device) < len(members))
    z = float(special.ndtri((1 + confidence) / 2))
    tpr_low, _ = wilson(tpr[1:], len(members), z)
    _, fpr_high = wilson(fpr[1:], len(nonmembers), z)
    above = (tpr_low - delta).clamp_min(0) / fpr_high
    below = (1 - fpr_high - delta).clamp_min(0) / (1 - tpr_low)
    high = bool(above.max() >= below.max())
    return float(thresholds[1:][(above if high else below).argmax()]), high


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
    ``P(B ≥ v) + 2mδ · max_i {P(v − i ≤ B < v) / i}`` with B ~ Binomial(r, e^ε / (1 + e^ε)) (their main theorem); the
    bound is the largest ε that this rejects. Ties are ordered at random, so that the order of the canaries carries no
    information.

    Args:
        scores: of the m canaries, ``(m,)``, higher = more likely included.
        included: bool ``(m,)``, whether each was included.
        guesses: r, even; fix it before looking at the scores. None: all canaries.
        delta: δ.
        confidence: of the bound.
        seed: of the order of ties; fix it beforehand too.

    Returns:
        A scalar float64 tensor, 0 if there is no positive bound.

    Raises:
        TypeError: guesses or a seed that are not integers.
        ValueError: an odd number of guesses, or more than there are canaries; a δ or confidence out of range.

    >>> coins = torch.tensor([True, False] * 100)
    >>> round(float(one_run_epsilon(coins.double(), coins)), 2)  # every guess is correct
    4.19
    """
    check_confidence(confidence)
    check_number("delta", delta, low=0, high=1, high_open=True)
    check_integer("seed", seed)
    split_scores(scores, included)
    m = len(scores)
    if guesses is not None:
        check_integer("guesses", guesses)
    r = m - m % 2 if guesses is None else guesses
    if r % 2 or not 2 <= r <= m:
        raise ValueError(f"guesses must be even and between 2 and the {m} canaries, not {guesses}.")
    shuffled = torch.randperm(m, generator=torch.Generator().manual_seed(seed)).to(scores.device)
    order = shuffled[scores[shuffled].argsort(descending=True, stable=True)]
    right = int(included[order[: r // 2]].sum() + (~included[order[m - r // 2 :]]).sum())
    low, high = 0.0, 1.0
    while one_run_p_value(m, r, right, high, delta) <= 1 - confidence and high < 64:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if one_run_p_value(m, r, right, middle, delta) <= 1 - confidence else (low, middle)
    return torch.tensor(low, dtype=torch.float64)


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
