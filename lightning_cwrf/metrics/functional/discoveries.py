"""Which single examples stand out among non-members: p-values by rank, and corrections for testing many at once."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_cwrf.checks import check_number


def conformal_p_values(scores: Tensor, null_scores: Tensor) -> Tensor:
    """``(1 + #{null scores ≥ s}) / (n + 1)`` for each score s: how often a null example would score as high.

    Valid, P(p ≤ t) ≤ t, for a score that is exchangeable with the null scores, whatever their distribution; ties count
    against it. The smallest is 1 / (n + 1). P-values that share their null scores depend on each other, and
    :func:`benjamini_hochberg` controls the false discovery rate for them all the same (Bates, Candès, Lei, Romano &
    Sesia 2023, "Testing for outliers with conformal p-values", Annals of Statistics 51).

    Args:
        scores: ``(m,)``, higher = more extreme.
        null_scores: ``(n,)``, such as those of non-members.

    Returns:
        float64 ``(m,)``.

    Raises:
        TypeError: no tensors of real numbers.
        ValueError: not one dimension, NaN, or no null scores.

    >>> conformal_p_values(torch.tensor([5.0, 2.0, 0.0]), torch.tensor([1.0, 2.0, 3.0]))
    tensor([0.2500, 0.7500, 1.0000], dtype=torch.float64)
    """
    return _ranks(scores, null_scores) / (len(null_scores) + 1)


def exposure(scores: Tensor, reference_scores: Tensor) -> Tensor:
    """Exposure of canaries (Carlini et al. 2019, "The Secret Sharer"): ``log2 |R| − log2 rank``, in bits.

    R is the canary and the references, canaries of the same kind that were not trained on; the rank of the highest
    score is 1, ties count against it. It lies between 0 and log2(n + 1): more references can show more. If nothing is
    memorised the rank is uniform, and the exposure 1.44 bits (1 / ln 2) on average, for many references. It is −log2 of
    the :func:`conformal_p_values`.

    Args:
        scores: of the canaries in the training set, ``(m,)``, higher = more likely a member.
        reference_scores: of those that are not, ``(n,)``.

    Returns:
        float64 ``(m,)``.

    Raises:
        TypeError, ValueError: as for :func:`conformal_p_values`.

    >>> exposure(torch.tensor([5.0, 2.0, 0.0]), torch.tensor([1.0, 2.0, 3.0]))
    tensor([2.0000, 0.4150, 0.0000], dtype=torch.float64)
    """
    return math.log2(len(reference_scores) + 1) - _ranks(scores, reference_scores).log2()


def benjamini_hochberg(p_values: Tensor) -> Tensor:
    """Adjusted p-values, ``min over j ≥ i of m p_(j) / j``, at most 1: those up to α have a false discovery rate of α.

    For independent p-values, and such as depend positively on each other (Benjamini & Hochberg 1995; Benjamini &
    Yekutieli 2001).

    >>> benjamini_hochberg(torch.tensor([0.01, 0.5, 0.02]))
    tensor([0.0300, 0.5000, 0.0300], dtype=torch.float64)
    """
    values, order = _sorted(p_values)
    scaled = values * len(values) / torch.arange(1, len(values) + 1, dtype=torch.float64)
    return _back(scaled.flip(0).cummin(0).values.flip(0) if len(values) else scaled, order)


def holm(p_values: Tensor) -> Tensor:
    """Adjusted p-values, ``max over j ≤ i of (m + 1 − j) p_(j)``, at most 1: those up to α have an error anywhere in at
    most α of cases, however they depend on each other (Holm 1979).

    >>> holm(torch.tensor([0.01, 0.5, 0.02]))
    tensor([0.0300, 0.5000, 0.0400], dtype=torch.float64)
    """
    values, order = _sorted(p_values)
    scaled = values * torch.arange(len(values), 0, -1, dtype=torch.float64)
    return _back(scaled.cummax(0).values if len(values) else scaled, order)


def rank_sum_p_values(scores: Tensor, is_member: Tensor) -> Tensor:
    """Exact one-sided rank-sum (Mann–Whitney) tests of many small samples; ties count against the members.

    The number of pairs in which the member is higher, compared with its distribution if all orders are equally likely.

    Args:
        scores: ``(n, k)``: n samples of k scores.
        is_member: bool ``(n, k)``; members and others in every sample.

    Returns:
        float64 ``(n,)``, the probability of as many such pairs or more.

    >>> rank_sum_p_values(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[True, True, False, False]]))
    tensor([0.1667], dtype=torch.float64)
    """
    order = scores.argsort(dim=1, stable=True)
    ordered, inside = scores.gather(1, order).contiguous(), is_member.gather(1, order)
    below = (~inside).cumsum(1).double()
    lower = torch.searchsorted(ordered, ordered)  # the number of scores that are strictly lower
    strictly = torch.nn.functional.pad(below, (1, 0)).gather(1, lower)
    won = (strictly * inside).sum(1).long()
    found = torch.empty(len(scores), dtype=torch.float64)
    sizes = inside.sum(1)
    for members in sorted(set(sizes.tolist())):
        tail = torch.from_numpy(_rank_sum_tail(members, scores.shape[1] - members))
        chosen = sizes == members
        found[chosen] = tail[won[chosen]]
    return found


def signed_rank_p_values(differences: Tensor) -> Tensor:
    """Exact one-sided signed-rank tests (Wilcoxon 1945) of many small samples; ties and zeros count against.

    The sum of the ranks by size of the differences that are above 0, compared with its distribution if every difference
    is as likely to be negative. The two values of a pair may depend on each other in any way.

    Args:
        differences: ``(n, h)``: n samples of the differences of h pairs.

    Returns:
        float64 ``(n,)``, the probability of so large a sum or larger; at least 2 to the power of −h.

    >>> signed_rank_p_values(torch.tensor([[3.0, 2.0, 1.0], [3.0, -2.0, 1.0]]))
    tensor([0.1250, 0.3750], dtype=torch.float64)
    """
    positive_first = (differences <= 0).long().argsort(dim=1, stable=True)
    values = differences.gather(1, positive_first)
    values = values.gather(1, values.abs().argsort(dim=1, stable=True))
    pairs = values.shape[1]
    found = ((values > 0) * torch.arange(1, pairs + 1)).sum(1)
    chances = np.ones(1)
    for rank in range(1, pairs + 1):
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    tail = np.asarray(np.minimum(1.0, chances[::-1].cumsum()[::-1]))
    return torch.from_numpy(tail)[found]


def _rank_sum_tail(members: int, others: int) -> NDArray[np.float64]:
    """P(U ≥ u) for u = 0, ..., members · others; U is the number of pairs in which the member is higher.

    The highest of all is a member with probability m / (m + n), and then wins n pairs. Only positive terms are added,
    so small probabilities are as exact as large ones.
    """
    rows = [np.ones(1) for _ in range(others + 1)]  # of no members: U = 0
    for m in range(1, members + 1):
        following = [np.ones(1)]
        for n in range(1, others + 1):
            chances = np.zeros(m * n + 1)
            chances[n:] += m / (m + n) * rows[n]
            chances[: m * (n - 1) + 1] += n / (m + n) * following[n - 1]
            following.append(chances)
        rows = following
    return np.asarray(np.minimum(1.0, rows[others][::-1].cumsum()[::-1]))


def fewest_nulls(fdr: float) -> int:
    """The fewest null scores with which any :func:`conformal_p_values` can be as low as ``fdr``.

    >>> fewest_nulls(0.05)
    19
    """
    check_number("fdr", fdr, low=0, high=1, low_open=True, high_open=True)
    return math.ceil(1 / fdr - 1 - 1e-9)


def _ranks(scores: Tensor, nulls: Tensor) -> Tensor:
    """1 + the number of nulls that are at least as high, float64."""
    for name, value in (("scores", scores), ("null scores", nulls)):
        if not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"{name} must be a tensor of real numbers.")
        if value.ndim != 1 or value.isnan().any():
            raise ValueError(f"{name} must have one dimension and no NaN; their shape is {tuple(value.shape)}.")
    if len(nulls) == 0:
        raise ValueError("there are no null scores to compare with.")
    ordered = nulls.double().sort().values
    return 1.0 + len(nulls) - torch.searchsorted(ordered, scores.double().contiguous()).double()


def _sorted(p_values: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(p_values, Tensor) or p_values.ndim != 1:
        raise TypeError("p_values must be a tensor of one dimension.")
    if not bool(((p_values >= 0) & (p_values <= 1)).all()):
        raise ValueError("p-values must lie between 0 and 1, and some do not, or are NaN.")
    found = p_values.double().sort()
    return found.values, found.indices


def _back(values: Tensor, order: Tensor) -> Tensor:
    found = torch.empty_like(values)
    found[order] = values.clamp(max=1)
    return found
