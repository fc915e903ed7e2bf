"""P-values against chance: the probability of such a result if members and non-members do not differ."""

from __future__ import annotations

import math

import torch
from scipy import special
from torch import Tensor

from lightning_cwrf.checks import check_confidence, check_integer
from lightning_cwrf.metrics.functional.intervals import welch_freedom
from lightning_cwrf.metrics.functional.roc import (
    ScoreCounts,
    advantage_of,
    auroc_of,
    count_scores,
    split_scores,
    tpr_at_fpr,
)


def auroc_p_value(scores: Tensor, is_member: Tensor) -> float:
    """One-sided Mann–Whitney test of AUC > ½: normal approximation, with the correction for ties.

    If at least nine in ten examples have the same score and the rest are all above it, or all below, the AUC depends on
    how many of the rest are members, and the normal approximation fails for few of them (p ≤ 0.001 in 2 % of audits of
    1,000 members and 100 non-members that do not differ). There p is at least that of the exact test of this number.

    >>> auroc_p_value(torch.zeros(4), torch.tensor([True, True, False, False]))
    1.0
    """
    counts = count_scores(scores, is_member)
    m, n = float(counts.members.sum()), float(counts.nonmembers.sum())
    tied = counts.members + counts.nonmembers
    ties = float((tied**3 - tied).sum()) / ((m + n) * (m + n - 1))
    variance = m * n / 12 * (m + n + 1 - ties)
    if variance <= 0:
        return 1.0
    excess = float(auroc_of(counts)) * m * n - m * n / 2 - 0.5  # the continuity correction
    tail = min(1.0, 0.5 * math.erfc(excess / math.sqrt(variance) / math.sqrt(2)))
    return max(tail, _few_apart_p_value(counts))


def _few_apart_p_value(counts: ScoreCounts) -> float:
    """The exact p-value where few scores differ from the most common one, all to one side of it; else 0."""
    tied = counts.members + counts.nonmembers
    most = int(tied.argmax())
    m, n = int(counts.members.sum()), int(counts.nonmembers.sum())
    above, below = int(tied[:most].sum()), int(tied[most + 1 :].sum())
    if above + below > (m + n) / 10 or (above and below):
        return 0.0
    if above:
        return hypergeometric_cdf(int(counts.nonmembers[:most].sum()), m, n, above)
    return hypergeometric_cdf(int(counts.members[most + 1 :].sum()), n, m, below)


def resolvable_auc(members: int, nonmembers: int, confidence: float = 0.95) -> float:
    """The smallest AUC distinguishable from chance by :func:`auroc_p_value`: ``p <= 1 - confidence``, without ties.

    It depends on the numbers of examples only, so it is known before the audit. Infinity if there are so few examples
    that not even an AUC of 1 is distinguishable from chance.

    Args:
        members: their number.
        nonmembers: their number.
        confidence: of the one-sided test.

    Raises:
        TypeError: numbers of examples that are not integers, a confidence that is not a number.
        ValueError: a group is empty; a confidence out of range.

    >>> round(resolvable_auc(100, 100), 3), resolvable_auc(1, 2)
    (0.567, inf)
    """
    check_confidence(confidence)
    check_integer("members", members)
    check_integer("nonmembers", nonmembers)
    if members < 1 or nonmembers < 1:
        raise ValueError(f"both groups are needed: there are {members} members, {nonmembers} non-members.")
    pairs = members * nonmembers
    z = float(special.ndtri(confidence))
    least = pairs / 2 + 0.5 + z * math.sqrt(pairs * (members + nonmembers + 1) / 12)
    won = math.ceil(least - 1e-9)  # pairs in which the member scores higher
    return won / pairs if won <= pairs else math.inf


def tpr_p_value(scores: Tensor, is_member: Tensor, max_fpr: float) -> float:
    """Exact one-sided test of the TPR at an FPR: the probability that as many members rank as high by chance.

    If all orders of members and non-members are equally likely, x members rank above all but f of the non-members if
    and only if at most f non-members are among the x + f highest: a hypergeometric probability.

    >>> round(tpr_p_value(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, False]), 0.0), 6)
    0.333333
    """
    members, nonmembers = split_scores(scores, is_member)
    found = round(float(tpr_at_fpr(scores, is_member, max_fpr)) * len(members))
    false = math.floor(max_fpr * len(nonmembers) + 1e-9)
    if found == 0:
        return 1.0
    drawn = min(found + false, len(scores))
    return hypergeometric_cdf(false, len(members), len(nonmembers), drawn)


def advantage_p_value(scores: Tensor, is_member: Tensor) -> float:
    """One-sided Kolmogorov–Smirnov test of max(TPR − FPR) > 0, asymptotic: ``exp(−2 d² m n / (m + n))``.

    >>> advantage_p_value(torch.zeros(4), torch.tensor([True, True, False, False]))
    1.0
    """
    members, nonmembers = split_scores(scores, is_member)
    m, n = len(members), len(nonmembers)
    return math.exp(-2 * float(advantage_of(count_scores(scores, is_member))) ** 2 * m * n / (m + n))


def loss_gap_p_value(losses: Tensor, is_member: Tensor) -> float:
    """One-sided test of a positive loss gap: Welch's t, the difference of means over its standard error.

    >>> round(loss_gap_p_value(torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([True, True, False, False])), 3)
    0.5
    """
    members, nonmembers = (part.double() for part in split_scores(losses, is_member))
    if len(members) < 2 or len(nonmembers) < 2:
        return 1.0
    variances = [part.var() / len(part) for part in (members, nonmembers)]
    error = math.sqrt(float(sum(variances)))
    gap = float(nonmembers.mean() - members.mean())
    if error == 0:
        return 0.0 if gap > 0 else 1.0
    freedom = float(welch_freedom(variances, [len(members), len(nonmembers)]))
    return float(special.stdtr(freedom, -gap / error))


def hypergeometric_cdf(k: int, others: int, marked: int, drawn: int) -> float:
    """P(at most k marked ones among ``drawn`` of ``marked + others``), summed in log space."""
    i = torch.arange(max(0, drawn - others), min(k, marked, drawn) + 1, dtype=torch.float64)

    def log_choose(n: float, r: Tensor) -> Tensor:
        return torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64)) - torch.lgamma(r + 1) - torch.lgamma(n - r + 1)

    total = log_choose(float(marked + others), torch.tensor(float(drawn), dtype=torch.float64))
    return float(
        torch.exp(log_choose(float(marked), i) + log_choose(float(others), drawn - i) - total).sum().clamp(max=1)
    )
