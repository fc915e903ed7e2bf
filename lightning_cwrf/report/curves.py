"""What plots draw: rates and shares, as numbers. No drawing is here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cwrf.auditing import AuditResult, RecipeAudit
from lightning_cwrf.metrics import Interval
from lightning_cwrf.metrics.functional.intervals import tpr_interval
from lightning_cwrf.metrics.functional.roc import count_scores, membership_roc
from lightning_cwrf.metrics.membership import FPRS
from lightning_cwrf.report.table import AnyAudit

_SMALLEST_LOSS = 1e-6  # a logarithmic axis cannot show a loss of 0


class Band(NamedTuple):
    """Pointwise intervals of the TPR at some FPRs, each a list of numbers."""

    fpr: list[float]
    low: list[float]
    high: list[float]


class LossHistograms(NamedTuple):
    """Histograms of losses on one axis.

    ``edges`` has one element more than there are bins. ``shares`` has for each audit the shares of its members and of
    its non-members in each bin. ``odd`` has the number of each audit's losses that are NaN or infinite, in no bin.
    """

    edges: list[float]
    shares: list[tuple[list[float], list[float]]]
    odd: list[int]


def smallest_rate(results: Iterable[AnyAudit]) -> float:
    """Half a false positive, the smallest rate that the samples can show: where logarithmic axes begin."""
    return min(0.5 / int((~result.is_member.view(-1, len(result.targets))[0]).sum()) for result in results)


def tpr_band(result: AuditResult, attack: str, floor: float, points: int = 60) -> Band:
    """Pointwise intervals of an attack's TPR at FPRs from ``floor`` to 1, evenly spaced in their logarithms."""
    counts = count_scores(result.scores[attack], result.is_member)
    fpr = torch.logspace(torch.tensor(floor).log10().item(), 0, points, dtype=torch.float64).clamp(max=1).tolist()
    found = [tpr_interval(counts, rate, result.confidence) for rate in fpr[:-1]]
    low, high = ([float(bound) for bound in bounds] for bounds in zip(*found, strict=True))
    return Band(fpr, [*low, 1.0], [*high, 1.0])  # everybody is accused


def mean_roc(result: RecipeAudit, attack: str, floor: float, points: int = 200) -> list[tuple[float, float]]:
    """The mean TPR over a recipe's models at FPRs from ``floor`` to 1, evenly spaced in their logarithms."""
    grid = torch.logspace(torch.tensor(floor).log10().item(), 0, points, dtype=torch.float64).clamp(max=1)
    total = torch.zeros_like(grid)
    for scores, inside in zip(result.scores[attack], result.is_member, strict=True):
        fpr, tpr, _ = membership_roc(scores, inside)
        total += tpr[torch.searchsorted(fpr.contiguous(), grid, right=True) - 1].double()
    return list(zip(grid.tolist(), (total / len(result)).tolist(), strict=True))


def measured_rates(result: RecipeAudit, attack: str) -> list[tuple[float, Interval]]:
    """The FPRs at which a recipe's mean TPR was measured with an interval, and that interval."""
    found = result.estimates.get(attack, {})
    named = ((rate, found.get(f"tpr_at_fpr_{rate:g}")) for rate in FPRS)
    return [
        (rate, each.interval)
        for rate, each in named
        if each is not None and all(map(math.isfinite, (each.value, *each.interval)))
    ]


def loss_histograms(results: Iterable[AnyAudit], bins: int) -> LossHistograms:
    """Shares of members and of non-members by loss, in bins of one logarithmic axis; losses below it are in the first.

    >>> loss_histograms([], 2).edges
    [1e-06, 0.001, 1.0]
    """
    results = list(results)
    finite = [result.losses[result.losses.isfinite()] for result in results]
    largest = max((float(losses.max()) for losses in finite if len(losses)), default=1.0)
    edges = torch.logspace(-6, torch.tensor(max(largest, 1.0)).log10().item(), bins + 1, dtype=torch.float64)
    shares = [
        (
            _shares(result.losses[result.is_member], edges),
            _shares(result.losses[~result.is_member], edges),
        )
        for result in results
    ]
    odd = [result.losses.numel() - len(losses) for result, losses in zip(results, finite, strict=True)]
    return LossHistograms([round(edge, 12) for edge in edges.tolist()], shares, odd)


def _shares(losses: Tensor, edges: Tensor) -> list[float]:
    inside = losses[losses.isfinite()].double().clamp(min=_SMALLEST_LOSS, max=edges[-1].item())
    places = torch.bucketize(inside, edges[1:-1], right=True)
    found: list[float] = (torch.bincount(places, minlength=len(edges) - 1).double() / len(losses)).tolist()
    return found
