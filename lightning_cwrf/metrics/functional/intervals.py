"""Confidence intervals: exact for a proportion, by stratified bootstrap over examples for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cwrf.metrics.functional.roc import ScoreCounts, count_scores, split_scores

REPLICATES = 1000
_CELLS = 1 << 24  # counts held at a time, 128 MB each for members and non-members


class Interval(NamedTuple):
    """A two-sided confidence interval."""

    low: float
    high: float


def check_confidence(confidence: float) -> None:
    """Raise a ValueError unless ``confidence`` lies strictly between 0 and 1."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}.")


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """The exact (Clopper–Pearson) interval of a binomial proportion.

    >>> low, high = clopper_pearson(0, 10)
    >>> round(low, 4), round(high, 4)
    (0.0, 0.3085)
    """
    check_confidence(confidence)
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"need 0 <= successes <= trials and trials > 0, not {successes} of {trials}.")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _solve(lambda p: 1 - _binomial_cdf(successes - 1, trials, p), tail)
    high = 1.0 if successes == trials else _solve(lambda p: -_binomial_cdf(successes, trials, p), -tail)
    return Interval(low, high)


def bootstrap_counts(
    statistic: Callable[[ScoreCounts], Tensor],
    scores: Tensor,
    is_member: Tensor,
    confidence: float,
    seed: int,
    replicates: int = REPLICATES,
) -> Interval:
    """Percentile interval of a statistic of counts; members and non-members are resampled apart.

    Args:
        statistic: maps :class:`ScoreCounts` of shape ``(b, g)`` to ``(b,)``.
        scores: shape ``(n,)``.
        is_member: bool ``(n,)``.
        confidence: for example 0.95.
        seed: of a generator of its own; the caller's random state is not touched.
        replicates: number of bootstrap samples.
    """
    check_confidence(confidence)
    counts = count_scores(scores.cpu(), is_member.cpu())
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _CELLS // len(counts.scores))
    values = []
    for done in range(0, replicates, step):
        size = min(step, replicates - done)
        resampled = (_resample(part, size, generator) for part in (counts.members, counts.nonmembers))
        values.append(statistic(ScoreCounts(counts.scores, *resampled)))
    return percentile(torch.cat(values), confidence)


def bootstrap_means(losses: Tensor, is_member: Tensor, confidence: float, seed: int) -> Interval:
    """Percentile interval of the non-members' mean minus the members' mean."""
    check_confidence(confidence)
    generator = torch.Generator().manual_seed(seed)
    means = [_resampled_means(part.cpu().double(), generator) for part in split_scores(losses, is_member)]
    return percentile(means[1] - means[0], confidence)


def percentile(values: Tensor, confidence: float) -> Interval:
    """The central interval of ``confidence`` of the replicates."""
    tail = (1 - confidence) / 2
    low, high = torch.quantile(values.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)


def _resample(counts: Tensor, size: int, generator: torch.Generator) -> Tensor:
    total = int(counts.sum())
    owners = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
    drawn = owners[torch.randint(total, (size, total), generator=generator)]
    return torch.zeros(size, len(counts), dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones((), dtype=torch.float64).expand_as(drawn)
    )


def _resampled_means(values: Tensor, generator: torch.Generator) -> Tensor:
    size, step = len(values), max(1, _CELLS // len(values))
    chunks = []
    for done in range(0, REPLICATES, step):
        drawn = torch.randint(size, (min(step, REPLICATES - done), size), generator=generator)
        chunks.append(values[drawn].mean(1))
    return torch.cat(chunks)


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X ≤ k) for X ~ Binomial(n, p), summed in log space."""
    if p <= 0.0 or p >= 1.0:
        return 1.0 if p <= 0.0 or k >= n else 0.0
    i = torch.arange(k + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    return float(torch.exp(log_choose + i * math.log(p) + (n - i) * math.log1p(-p)).sum().clamp(max=1.0))


def _solve(rising: Callable[[float], float], goal: float) -> float:
    """The p in [0, 1] at which a rising function reaches ``goal``, by bisection to full precision."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < goal else (low, middle)
        if high - low < 1e-15:
            break
    return (low + high) / 2
