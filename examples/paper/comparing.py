"""Recipes on the frontier of test accuracy and an attack's AUC, compared in pairs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_cwrf import RecipeAudit
from lightning_cwrf.auditing import Difference, Estimate
from lightning_cwrf.metrics.functional import CrossedJackknife, Interval

AUC, ACCURACY = "lira/auroc", "test_accuracy"


def combined(parts: Sequence[tuple[float, CrossedJackknife]]) -> CrossedJackknife:
    """A sum of means over the same pairs and groups, with weights."""
    value = sum(weight * each.value for weight, each in parts)
    pairs = torch.stack([weight * each.without_pair for weight, each in parts]).sum(0)
    return CrossedJackknife(value, pairs, torch.stack([weight * each.cells for weight, each in parts]).sum(0))


def above_frontier(found: RecipeAudit, controls: Sequence[RecipeAudit], measure: str = AUC) -> CrossedJackknife | None:
    """How much more AUC a recipe has than the controls at the same test accuracy; None: no control has more, or less.

    The controls' AUC at that accuracy is on the line between their two neighbours. Their curve bends downwards from
    it, so the line is above the curve, which favours the recipe: the denser the controls, the less. Errors of all six
    numbers are propagated (delta method).
    """
    x = found.estimate(ACCURACY).value
    order = sorted((each for each in controls if each is not found), key=lambda each: each.estimate(ACCURACY).value)
    for a, b in itertools.pairwise(order):
        left, right = a.estimate(ACCURACY).value, b.estimate(ACCURACY).value
        if left <= x <= right and left < right:
            share = (x - left) / (right - left)
            slope = (b.estimate(measure).value - a.estimate(measure).value) / (right - left)
            weights = ((found, 1.0), (a, share - 1), (b, -share))
            return combined(
                [(weight, audit.jackknives[measure]) for audit, weight in weights]
                + [(-slope * weight, audit.jackknives[ACCURACY]) for audit, weight in weights]
            )
    return None


def difference(jackknife: CrossedJackknife) -> Difference:
    p = jackknife.p_value()
    return Difference(jackknife.value, jackknife.interval(), 2 * min(p, 1 - p))


def on_average(found: Sequence[CrossedJackknife | None]) -> CrossedJackknife | None:
    """The mean over those that exist."""
    there = [each for each in found if each is not None]
    return combined([(1 / len(there), each) for each in there]) if there else None


def compared(found: Sequence[CrossedJackknife | None]) -> str:
    """The mean over those that exist, and how many these are: the others have an accuracy that no control has."""
    mean = on_average(found)
    there = sum(each is not None for each in found)
    return f"compared at {there} of {len(found)} strengths" + ("" if mean is None else f": {difference(mean)}")


def told_above(of_way: Mapping[str, Sequence[CrossedJackknife | None]], controls: str = "r = 0") -> str:
    """The means of several ways as a sentence."""
    each = "; ".join(f"{way}, {compared(found)}" for way, found in of_way.items())
    return f"How much the LiRA AUC is above that of {controls} at equal test accuracy, on average: {each}."


def beats(jackknife: CrossedJackknife | None) -> bool:
    """Whether it is below 0 by more than two standard errors."""
    return jackknife is not None and jackknife.value + 2 * jackknife.error < 0


def cell_of(cell: Any) -> Any:
    """A cell as it is saved."""
    if isinstance(cell, CrossedJackknife):
        cell = difference(cell)
    if isinstance(cell, Difference):
        return {"difference": cell.value, "low": cell.interval.low, "high": cell.interval.high, "p": cell.p_value}
    if isinstance(cell, Estimate):
        return {"value": cell.value, "low": cell.interval.low, "high": cell.interval.high}
    return cell


def of_models(values: Sequence[float]) -> Estimate:
    """The mean over models of a number that has nothing to do with the pool, with two standard errors over models."""
    found = torch.tensor(values, dtype=torch.float64)
    reach = 2 * float(found.std()) / len(found) ** 0.5
    return Estimate(float(found.mean()), Interval(float(found.mean()) - reach, float(found.mean()) + reach))
