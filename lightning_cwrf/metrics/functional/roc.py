"""The ROC of a membership attack, and the measures derived from it.

Equal scores are one step of the curve. Every measure, and every interval, is a function of two rows of counts over the
distinct scores, highest first: the numbers of members and of non-members with each score.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_cwrf.checks import check_number


class ScoreCounts(NamedTuple):
    """Members and non-members per distinct score, highest score first.

    ``members`` and ``nonmembers`` are float64 of shape ``(..., g)``; leading dimensions are independent samples.
    """

    scores: Tensor
    members: Tensor
    nonmembers: Tensor


def check_scores(scores: Tensor, is_member: Tensor) -> None:
    """Raise unless both are 1-D tensors of the same length, ``is_member`` is bool, and no score is NaN or complex."""
    for name, value in (("scores", scores), ("is_member", is_member)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not a {type(value).__name__}; use torch.as_tensor({name}).")
    if scores.ndim != 1 or scores.shape != is_member.shape:
        raise ValueError(
            f"scores and is_member must be 1-D and of one length, not {tuple(scores.shape)} and "
            f"{tuple(is_member.shape)}."
        )
    if is_member.dtype != torch.bool:
        raise ValueError(f"is_member must be a bool tensor, not {is_member.dtype}; use is_member.bool().")
    if scores.is_complex():
        raise TypeError(f"scores must be real numbers, which can be ordered, not {scores.dtype}.")
    bad = scores.isnan().nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{len(bad)} scores are NaN (first at {bad[:10]}).")


def split_scores(scores: Tensor, is_member: Tensor) -> tuple[Tensor, Tensor]:
    """The members' and the non-members' scores, checked; both must be present."""
    check_scores(scores, is_member)
    members, nonmembers = scores[is_member], scores[~is_member]
    if len(members) == 0 or len(nonmembers) == 0:
        raise ValueError(f"both groups are needed: there are {len(members)} members, {len(nonmembers)} non-members.")
    return members, nonmembers


def count_scores(scores: Tensor, is_member: Tensor) -> ScoreCounts:
    """Count members and non-members at each distinct score, highest first."""
    kept = _KEPT.get()
    for each in kept or ():
        if _same(each.scores, scores) and _same(each.is_member, is_member):
            return each.counts
    split_scores(scores, is_member)
    distinct, group = torch.unique(scores, sorted=True, return_inverse=True)
    members = torch.bincount(group[is_member], minlength=len(distinct)).flip(0).double()
    nonmembers = torch.bincount(group[~is_member], minlength=len(distinct)).flip(0).double()
    counts = ScoreCounts(distinct.flip(0), members, nonmembers)
    if kept is not None:
        kept.appendleft(_Counted(scores.clone(), is_member.clone(), counts))
    return counts


class _Counted(NamedTuple):
    """Copies, which nobody else can write to, of what was counted."""

    scores: Tensor
    is_member: Tensor
    counts: ScoreCounts


_KEPT: ContextVar[deque[_Counted] | None] = ContextVar("kept", default=None)


@contextmanager
def counted_once() -> Iterator[None]:
    """Inside, scores that are counted again after the last two others are not sorted again: the counts are kept.

    For several measures of one attack, each of which counts the scores, for its value, interval and p-value. Scores are
    recognised by content, which costs less than sorting. Do not write into the counts.
    """
    token = _KEPT.set(deque(maxlen=2))
    try:
        yield
    finally:
        _KEPT.reset(token)


def _same(known: Tensor, given: Any) -> bool:
    """Whether it is the same, bit for bit but for the sign of zeros, type and device included."""
    return (
        isinstance(given, Tensor)
        and (known.dtype, known.device, known.shape) == (given.dtype, given.device, given.shape)
        and torch.equal(known, given)
    )


def membership_roc(scores: Tensor, is_member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ROC curve, from (0, 0) to (1, 1), with one point per distinct score.

    Args:
        scores: shape ``(n,)``, higher = more likely a member.
        is_member: bool, shape ``(n,)``.

    Returns:
        FPR, TPR (float64) and thresholds, each of shape ``(distinct + 1,)``; the first threshold is infinite.
        Thresholds of integer or bool scores are float64.

    >>> fpr, tpr, thresholds = membership_roc(torch.tensor([2.0, 1.0, 1.0]), torch.tensor([True, True, False]))
    >>> fpr.tolist(), tpr.tolist(), thresholds.tolist()
    ([0.0, 0.0, 1.0], [0.0, 0.5, 1.0], [inf, 2.0, 1.0])
    """
    counts = count_scores(scores, is_member)
    fpr, tpr = _rates(counts)
    thresholds = counts.scores if counts.scores.is_floating_point() else counts.scores.double()
    return fpr, tpr, torch.cat([torch.full_like(thresholds[:1], torch.inf), thresholds])


def membership_auroc(scores: Tensor, is_member: Tensor) -> Tensor:
    """Area under the ROC curve: the probability that a member scores above a non-member, ties counting one half.

    >>> membership_auroc(torch.zeros(4), torch.tensor([True, True, False, False]))
    tensor(0.5000, dtype=torch.float64)
    """
    return auroc_of(count_scores(scores, is_member))


def tpr_at_fpr(scores: Tensor, is_member: Tensor, max_fpr: float = 1e-3) -> Tensor:
    """The highest TPR of any threshold whose FPR is at most ``max_fpr``.

    With fewer than ``1 / max_fpr`` non-members this is the TPR at zero false positives.

    >>> tpr_at_fpr(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]), max_fpr=0.5)
    tensor(0.5000, dtype=torch.float64)
    """
    check_number("max_fpr", max_fpr, low=0, high=1)
    return tpr_of(count_scores(scores, is_member), max_fpr)


def attack_advantage(scores: Tensor, is_member: Tensor) -> Tensor:
    """Membership advantage, the maximum of TPR − FPR over all thresholds (Yeom et al. 2018).

    >>> attack_advantage(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, True, False]))
    tensor(1., dtype=torch.float64)
    """
    return advantage_of(count_scores(scores, is_member))


def balanced_accuracy(scores: Tensor, is_member: Tensor) -> Tensor:
    """Balanced accuracy of the attack at its best threshold: (TPR + 1 − FPR) / 2 = (1 + advantage) / 2; ½ is chance.

    >>> balanced_accuracy(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, False]))
    tensor(1., dtype=torch.float64)
    """
    return (1 + attack_advantage(scores, is_member)) / 2


def p1_score(accuracy: Tensor | float, advantage: Tensor | float) -> Tensor:
    """P1 = 2·Acc·(1 − Adv) / (Acc + 1 − Adv), the harmonic mean of utility and privacy (as in PAST, Hu et al. 2024).

    Raises:
        TypeError: neither numbers nor tensors of numbers.
        ValueError: an accuracy or advantage outside [0, 1].

    >>> p1_score(1.0, 0.0)
    tensor(1., dtype=torch.float64)
    """
    utility, lost = (_rate(*given) for given in (("accuracy", accuracy), ("advantage", advantage)))
    privacy = 1 - lost
    total = utility + privacy
    return torch.where(total > 0, 2 * utility * privacy / total.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def loss_gap(losses: Tensor, is_member: Tensor) -> Tensor:
    """Mean loss of the non-members minus mean loss of the members.

    >>> loss_gap(torch.tensor([0.5, 2.0]), torch.tensor([True, False]))
    tensor(1.5000, dtype=torch.float64)
    """
    members, nonmembers = split_scores(losses, is_member)
    return nonmembers.double().mean() - members.double().mean()


def auroc_of(counts: ScoreCounts) -> Tensor:
    """AUC of counts: each member wins against the non-members below it, and half of those with its own score."""
    members, nonmembers = counts.members, counts.nonmembers
    below = nonmembers.sum(-1, keepdim=True) - nonmembers.cumsum(-1)
    won = (members * (below + nonmembers / 2)).sum(-1)
    return won / (members.sum(-1) * nonmembers.sum(-1))


def tpr_of(counts: ScoreCounts, max_fpr: float) -> Tensor:
    """Highest TPR at an FPR of at most ``max_fpr``."""
    fpr, tpr = _rates(counts)
    return torch.where(fpr <= max_fpr, tpr, 0.0).amax(-1)


def advantage_of(counts: ScoreCounts) -> Tensor:
    """Maximum of TPR − FPR."""
    fpr, tpr = _rates(counts)
    return (tpr - fpr).amax(-1)


def _rate(name: str, value: Tensor | float) -> Tensor:
    """A number or a tensor of numbers in [0, 1], as float64."""
    if not isinstance(value, Tensor):
        check_number(name, value, low=0, high=1)
        return torch.tensor(float(value), dtype=torch.float64)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be a number, not of {value.dtype}.")
    rates = value.double()
    if not bool(((rates >= 0) & (rates <= 1)).all()):
        raise ValueError(f"{name} must be a number in [0, 1], not {value.tolist()}.")
    return rates


def _rates(counts: ScoreCounts) -> tuple[Tensor, Tensor]:
    def rate(part: Tensor) -> Tensor:
        steps = torch.cat([torch.zeros_like(part[..., :1]), part.cumsum(-1)], -1)
        return steps / steps[..., -1:]

    return rate(counts.nonmembers), rate(counts.members)
