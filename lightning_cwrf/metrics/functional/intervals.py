"""Confidence intervals of an attack's measures. ``docs/numbers.md`` has their simulated coverage.

Those of the ROC's measures are functions of counts per distinct score, as the measures are. They work along the last
dimension: leading dimensions are independent samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from lightning_cwrf.checks import check_confidence, check_integer
from lightning_cwrf.metrics.functional.roc import ScoreCounts, auroc_of, split_scores

FEW = 4.0
"""The number of misordered examples at which DeLong's and Newcombe's variance of the AUC have equal weight."""


class Interval(NamedTuple):
    """A two-sided confidence interval."""

    low: float
    high: float


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """The exact (Clopper–Pearson) interval of a binomial proportion.

    Raises:
        TypeError: counts that are not integers, a confidence that is not a number.
        ValueError: counts or confidence out of range.

    >>> low, high = clopper_pearson(0, 10)
    >>> round(low, 4), round(high, 4)
    (0.0, 0.3085)
    """
    check_integer("trials", trials, low=1)
    check_integer("successes", successes, low=0, high=trials)
    low, high = proportion_interval(torch.tensor(float(successes)), trials, confidence)
    return Interval(float(low), float(high))


def proportion_interval(successes: Tensor, trials: int, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """:func:`clopper_pearson` of many counts of successes in as many trials; float64 of their shape.

    >>> proportion_interval(torch.tensor([0, 10]), 10)[0]
    tensor([0.0000, 0.6915], dtype=torch.float64)
    """
    check_confidence(confidence)
    tail, found = (1 - confidence) / 2, successes.double().cpu().numpy()
    return torch.from_numpy(_at_least(found, trials, tail)), torch.from_numpy(_at_most(found, trials, tail))


def tpr_interval(counts: ScoreCounts, max_fpr: float, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """An interval of the highest TPR of any threshold whose *population* FPR is at most ``max_fpr``.

    The threshold with that FPR is unknown. For each threshold, one test asks whether the N of n non-members above it
    can be Binomial(n, ``max_fpr``), and another which TPRs let the M of m members above it be Binomial(m, TPR). Each
    bound is the extreme over all thresholds at which the two together do not reject: of their normal scores z₁ and z₂,
    counted as 0 where they point the other way, ``z₁² + z₂² < z²`` with Q(z) = (1 − confidence) / 2. Both tests are
    exact, so a smooth ROC is covered in small samples as in large ones, and so are ties. If the ROC has a corner
    exactly at ``max_fpr``, a 95 % interval may hold in 88 % of samples only. With fewer non-members than
    :func:`fewest_nonmembers` the lower bound is 0.

    Args:
        counts: members and non-members at each distinct score.
        max_fpr: the FPR allowed.
        confidence: of the interval.

    Returns:
        The two bounds, float64 of the leading shape of ``counts``.

    >>> counts = ScoreCounts(torch.arange(2.0), torch.tensor([60.0, 40.0]), torch.tensor([0.0, 1000.0]))
    >>> [round(float(bound), 3) for bound in tpr_interval(counts, 0.01)]
    [0.497, 0.697]
    """
    check_confidence(confidence)
    radius = normal_quantile(confidence)
    above = counts.members.cumsum(-1).cpu() - counts.members.cpu()  # members strictly above each score
    seen = counts.nonmembers.cumsum(-1).cpu()
    m, n = round(float(counts.members.sum(-1).flatten()[0])), round(float(seen[..., -1].flatten()[0]))
    ks = np.arange(n + 1)
    too_many = special.ndtri(special.bdtr(ks - 1.0, n, max_fpr))
    too_many[0] = -np.inf  # no non-member above is never too many
    too_few = special.ndtri(special.bdtrc(ks.astype(float), n, max_fpr))

    def left(scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """The tail probability that the first test leaves for the second."""
        return np.asarray(special.ndtr(-np.sqrt(radius**2 - np.clip(scores, 0, None) ** 2)))

    # Of thresholds whose first score is 0, only the one with the most members (the fewest) can be the extreme.
    usable = ks[(too_many < radius) & (ks >= ks[too_many <= 0].max())]
    found = _members_above(above, seen, torch.from_numpy(usable) + 1, m)
    high = _at_most(found, m, left(too_many[usable])).max(-1)
    usable = ks[(too_few < radius) & (ks <= ks[too_few <= 0].min())]
    found = _members_above(above, seen, torch.from_numpy(usable), m)
    low = _at_least(found, m, left(too_few[usable])).min(-1)
    return torch.from_numpy(np.asarray(low)), torch.from_numpy(np.asarray(high))


def fewest_nonmembers(max_fpr: float, confidence: float = 0.95) -> float:
    """The non-members below which :func:`tpr_interval` bounds no TPR from below; infinite at an FPR of 0.

    >>> fewest_nonmembers(1e-3)
    3688
    """
    if max_fpr <= 0:
        return math.inf
    return 1 if max_fpr >= 1 else math.ceil(math.log((1 - confidence) / 2) / math.log1p(-max_fpr))


def auroc_interval(counts: ScoreCounts, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """An interval of the AUC A: all a with ``|A − a| ≤ z·√(a (1 − a) κ)``.

    κ is DeLong's variance over A (1 − A). Near 0 and 1 few examples are misordered and DeLong's variance is often too
    small; there κ is shrunk towards that of Newcombe (2006, method 5), if that is larger, with the weight
    ``4 / (4 + J)``, where J is Kish's effective number of misordered members or non-members. If A is 0 or 1 the bound
    is exact: k = min(m, n) disjoint pairs are independent, so all are ordered with a probability of at most aᵏ.

    Returns:
        The two bounds, float64 of the leading shape of ``counts``.

    >>> perfect = ScoreCounts(torch.arange(2.0), torch.tensor([50.0, 0.0]), torch.tensor([0.0, 50.0]))
    >>> [round(float(bound), 3) for bound in auroc_interval(perfect)]
    [0.929, 1.0]
    """
    check_confidence(confidence)
    members, nonmembers = counts.members.cpu(), counts.nonmembers.cpu()
    m, n = members.sum(-1), nonmembers.sum(-1)
    auc = auroc_of(ScoreCounts(counts.scores, members, nonmembers))
    below = (n[..., None] - nonmembers.cumsum(-1) + nonmembers / 2) / n[..., None]  # of non-members, for a member
    over = (members.cumsum(-1) - members / 2) / m[..., None]  # of members, for a non-member
    inside, outside = auc * (1 - auc), torch.zeros_like(auc)
    wrong = torch.full_like(auc, math.inf)
    for weight, share, size in ((members, below, m), (nonmembers, over, n)):
        spread = (weight * (share - auc[..., None]).square()).sum(-1) / (size - 1).clamp_min(1)
        outside = outside + spread / size
        for part in (share, 1 - share):
            effective = (weight * part).sum(-1).square() / (weight * part.square()).sum(-1).clamp_min(1e-300)
            wrong = torch.minimum(wrong, effective)
    delong = outside / inside.clamp_min(1e-300)
    weight = FEW / (FEW + wrong)
    kappa = delong + weight * (_newcombe(auc, m, n) - delong).clamp_min(0)
    z2 = normal_quantile(confidence) ** 2 * kappa
    reach = (z2 * inside + z2.square() / 4).sqrt()
    low, high = (auc + z2 / 2 - reach) / (1 + z2), (auc + z2 / 2 + reach) / (1 + z2)
    exact = ((1 - confidence) / 2) ** (1 / torch.minimum(m, n))
    low = torch.where(auc == 1, exact, torch.where(auc == 0, 0.0, low))
    high = torch.where(auc == 0, 1 - exact, torch.where(auc == 1, 1.0, high))
    return low, high


def mean_interval(values: Tensor, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """An interval of a mean: the wider bounds of Student's t, plain and with Hall's (1992) correction.

    Hall's cubic transformation removes the skewness of the values, which t ignores: for losses its bound on the long
    tail's side fails too often.

    Args:
        values: independent, ``(..., n)``.
        confidence: of the interval.

    Returns:
        The two bounds, float64 ``(...)``; infinite for a single value.

    >>> low, high = mean_interval(torch.arange(11.0))
    >>> round(float(low), 3), round(float(high), 3)
    (2.772, 7.228)
    """
    return _t_interval([_moments(values)], [1.0], confidence)


def mean_difference_interval(first: Tensor, second: Tensor, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """An interval of mean(first) − mean(second): the wider bounds of Welch's t, plain and without skewness.

    The correction for skewness is that of :func:`mean_interval`, for two samples (Zhou & Dinh 2005).

    Args:
        first: independent values, ``(..., m)``.
        second: ``(..., n)``.
        confidence: of the interval.

    Returns:
        The two bounds, float64 ``(...)``; infinite if a side has a single value.

    >>> low, high = mean_difference_interval(torch.arange(11.0), torch.zeros(2))
    >>> round(float(low), 3), round(float(high), 3)
    (2.772, 7.228)
    """
    return _t_interval([_moments(first), _moments(second)], [1.0, -1.0], confidence)


def loss_gap_interval(losses: Tensor, is_member: Tensor, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """:func:`mean_difference_interval` of the non-members' losses minus the members'."""
    members, nonmembers = split_scores(losses, is_member)
    return mean_difference_interval(nonmembers, members, confidence)


def welch_freedom(variances: list[Tensor], sizes: list[int]) -> Tensor:
    """Welch–Satterthwaite's degrees of freedom; ``variances`` are those of the means."""
    total = torch.stack(variances).sum(0)
    parts = sum(v.square() / max(size - 1, 1) for v, size in zip(variances, sizes, strict=True))
    freedom = total.square() / torch.as_tensor(parts).clamp_min(1e-300)
    return torch.where(total > 0, freedom, float(min(sizes) - 1))


class _Moments(NamedTuple):
    mean: Tensor
    variance: Tensor  # of the mean
    third: Tensor  # third central moment of the mean
    size: int


def _moments(values: Tensor) -> _Moments:
    values = values.detach().cpu().double()
    size = values.shape[-1]
    mean = values.mean(-1)
    centred = values - mean[..., None]
    return _Moments(mean, centred.square().sum(-1) / max(size - 1, 1) / size, centred.pow(3).mean(-1) / size**2, size)


def _t_interval(parts: list[_Moments], signs: list[float], confidence: float) -> tuple[Tensor, Tensor]:
    check_confidence(confidence)
    centre = torch.stack([s * p.mean for s, p in zip(signs, parts, strict=True)]).sum(0)
    if min(p.size for p in parts) < 2:
        return torch.full_like(centre, -math.inf), torch.full_like(centre, math.inf)
    error = torch.stack([p.variance for p in parts]).sum(0).sqrt()
    third = torch.stack([s * p.third for s, p in zip(signs, parts, strict=True)]).sum(0)
    skewness = torch.where(error > 0, third / error.pow(3).clamp_min(1e-300), 0.0)
    freedom = welch_freedom([p.variance for p in parts], [p.size for p in parts])
    reach = torch.from_numpy(np.asarray(special.stdtrit(freedom.numpy(), (1 + confidence) / 2)))
    right = torch.maximum(reach, _unskewed(reach, skewness))
    left = torch.minimum(-reach, _unskewed(-reach, skewness))
    return centre - error * right, centre - error * left


def _unskewed(quantile: Tensor, skewness: Tensor) -> Tensor:
    """The inverse of Hall's transformation ``t + s (t² / 3 + 1 / 6) + s² t³ / 27``, which is nearly normal."""
    flat = skewness.abs() < 1e-6  # where the formula divides by nearly 0
    s = torch.where(flat, 1.0, skewness)
    inside = 1 + s * (quantile - s / 6)
    found = 3 / s * (inside.sign() * inside.abs().pow(1 / 3) - 1)
    return torch.where(flat, quantile, found)


def _members_above(above: Tensor, seen: Tensor, ks: Tensor, m: int) -> NDArray[np.float64]:
    """The number of members strictly above the k-th highest non-member: 0 for k = 0, all m beyond the last one."""
    wanted = ks.to(seen.dtype).expand(*seen.shape[:-1], len(ks)).contiguous()
    places = torch.searchsorted(seen.contiguous(), wanted)
    found = above.gather(-1, places.clamp_max(above.shape[-1] - 1))
    found = torch.where(places == above.shape[-1], float(m), found)
    return torch.where(wanted == 0, 0.0, found).numpy()


def _at_least(successes: NDArray[np.float64], trials: int, tail: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """The rate at which this many successes or more have the probability ``tail``."""
    bound = special.betaincinv(np.maximum(successes, 1), trials - np.maximum(successes, 1) + 1, tail)
    return np.asarray(np.where(successes == 0, 0.0, bound))


def _at_most(successes: NDArray[np.float64], trials: int, tail: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """The rate at which this many successes or fewer have the probability ``tail``."""
    return np.asarray(1 - _at_least(trials - successes, trials, tail))


def _newcombe(auc: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """Variance of the AUC over A (1 − A), by Newcombe (2006); A is kept away from 0 and 1."""
    pairs, more = m * n, (m + n) / 2 - 1
    a = (auc * pairs + 0.5) / (pairs + 1)
    return (1 + more * ((1 - a) / (2 - a) + a / (1 + a))) / pairs


def wilson(rate: Tensor, trials: Tensor | int, z: Tensor | float) -> tuple[Tensor, Tensor]:
    """Wilson's score interval of a proportion, ``z`` standard deviations to both sides."""
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    reach = z / scale * (rate * (1 - rate) / trials + z * z / (4 * trials**2)).sqrt()
    return centre - reach, centre + reach


def normal_quantile(confidence: float) -> float:
    """The half-width of a two-sided normal interval, in standard deviations."""
    return float(special.ndtri((1 + confidence) / 2))
