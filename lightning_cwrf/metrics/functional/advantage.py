"""Intervals of the membership advantage and the balanced accuracy, maxima over thresholds and so biased upwards."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_cwrf.checks import check_confidence
from lightning_cwrf.metrics.functional.intervals import normal_quantile, wilson
from lightning_cwrf.metrics.functional.roc import ScoreCounts


def advantage_interval(counts: ScoreCounts, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """An interval of the population's maximum of TPR − FPR.

    At one threshold, Newcombe's (1998, method 10) score interval bounds TPR − FPR. The population's best threshold is
    among all thresholds, so the largest upper bound is an upper bound of the maximum. The lower bound must hold at all
    thresholds at once, since the highest is chosen: it is k standard errors wide, with
    ``Q(k) + k φ(k) Λ / 2 = (1 − confidence) / 2``, the probability that the standardised curve exceeds k anywhere,
    where Λ is the length of that curve (for a Brownian bridge, the range of log odds). A first band, over all
    thresholds, leaves those that can be the best one; a second, over these, gives the bound (Chernozhukov, Lee & Rosen
    2013).

    Returns:
        The two bounds, float64 of the leading shape of ``counts``, in [0, 1].

    >>> perfect = ScoreCounts(torch.arange(2.0), torch.tensor([50.0, 0.0]), torch.tensor([0.0, 50.0]))
    >>> [round(float(bound), 2) for bound in advantage_interval(perfect)]
    [0.65, 1.0]
    """
    check_confidence(confidence)
    tail = (1 - confidence) / 2
    found, false = (_steps(part.cpu().double()) for part in (counts.members, counts.nonmembers))
    high = _newcombe_bounds(found, false, normal_quantile(confidence) * torch.ones_like(found[..., :1]))[1].amax(-1)
    lengths = _lengths(found, false)
    low, reach = _newcombe_bounds(found, false, _crossing(lengths.sum(-1, keepdim=True), tail))
    best = reach >= low.amax(-1, keepdim=True)  # thresholds that can be the best
    near = (lengths * (best[..., 1:] | best[..., :-1])).sum(-1, keepdim=True)
    low, _ = _newcombe_bounds(found, false, _crossing(near, tail))
    return torch.where(best, low, 0.0).amax(-1).clamp_min(0), high.clamp_max(1)


def balanced_accuracy_interval(counts: ScoreCounts, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """An interval of the population's largest balanced accuracy, (1 + advantage) / 2: that of the advantage."""
    low, high = advantage_interval(counts, confidence)
    return (1 + low) / 2, (1 + high) / 2


def _steps(part: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(part[..., :1]), part.cumsum(-1)], -1)


def _newcombe_bounds(found: Tensor, false: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    (p, p_low, p_high), (q, q_low, q_high) = (_wilson(part, z) for part in (found, false))
    low = p - q - ((p - p_low).square() + (q_high - q).square()).sqrt()
    return low, p - q + ((p_high - p).square() + (q - q_low).square()).sqrt()


def _wilson(part: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    trials = part[..., -1:]
    rate = part / trials
    return (rate, *wilson(rate, trials, z))


def _lengths(found: Tensor, false: Tensor) -> Tensor:
    """The length of each step of the standardised curve of TPR − FPR: the variance of the step over the curve's own."""
    moved = torch.zeros_like(found[..., 1:])
    variance = torch.zeros_like(found)
    for part in (found, false):
        trials = part[..., -1:]
        rate = (part + 0.5) / (trials + 1)  # never 0 or 1
        variance = variance + rate * (1 - rate) / trials
        moved = moved + part.diff(dim=-1) / trials.square()
    return moved / ((variance[..., 1:] + variance[..., :-1]) / 2)


def _crossing(length: Tensor, tail: float) -> Tensor:
    """The k that a standardised curve of this length exceeds with the probability ``tail``, by bisection."""
    low, high = torch.zeros_like(length), torch.full_like(length, 40.0)
    for _ in range(60):
        k = (low + high) / 2
        density = torch.exp(-k * k / 2) / math.sqrt(2 * math.pi)
        over = torch.special.ndtr(-k) + k * density * length / 2 > tail
        low, high = torch.where(over, k, low), torch.where(over, high, k)
    return high
