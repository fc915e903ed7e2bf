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

    The controls' AUC at that accuracy is on the line between their two neighbours on the frontier. Their curve bends
    downwards from it, so the line is above the curve, which favours the recipe: the denser the controls, the less.
    A control is not on the frontier where it is itself above the line between two others by more than two standard
    errors: nobody would choose it.
    """
    others = [each for each in controls if each is not found]
    order = sorted(on_frontier(others, measure), key=lambda each: each.estimate(ACCURACY).value)
    lines = (_above_line(found, a, b, measure) for a, b in itertools.pairwise(order))
    return next((each for each in lines if each is not None), None)


def on_frontier(controls: Sequence[RecipeAudit], measure: str = AUC) -> list[RecipeAudit]:
    """The controls that are not above the line between any two others by more than two standard errors."""
    return [
        each
        for each in controls
        if not any(
            exceeds(_above_line(each, a, b, measure))
            for a, b in itertools.permutations(controls, 2)
            if each is not a and each is not b
        )
    ]


def _above_line(found: RecipeAudit, a: RecipeAudit, b: RecipeAudit, measure: str) -> CrossedJackknife | None:
    """How much AUC a recipe has above the line from a to b; None: its accuracy is not between theirs.

    Errors of all six numbers are propagated (delta method).
    """
    x, left, right = (each.estimate(ACCURACY).value for each in (found, a, b))
    if not left <= x <= right or left == right:
        return None
    share = (x - left) / (right - left)
    slope = (b.estimate(measure).value - a.estimate(measure).value) / (right - left)
    weights = ((found, 1.0), (a, share - 1), (b, -share))
    return combined(
        [(weight, audit.jackknives[measure]) for audit, weight in weights]
        + [(-slope * weight, audit.jackknives[ACCURACY]) for audit, weight in weights]
    )


def difference(jackknife: CrossedJackknife) -> Difference:
    return Difference(jackknife.value, jackknife.interval(), jackknife.two_sided_p_value())


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


def exceeds(jackknife: CrossedJackknife | None) -> bool:
    """Whether it is above 0 by more than two standard errors."""
    return jackknife is not None and jackknife.value > 2 * jackknife.error


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
