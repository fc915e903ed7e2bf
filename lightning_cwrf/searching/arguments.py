"""The checks of a search's arguments that need no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_cwrf.attacks import create_attacks
from lightning_cwrf.auditing.recipe_audit import leak_metrics
from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.recipes import ShadowRecipe
from lightning_cwrf.searching.result import BASE


def check_search(
    base: Any,
    candidates: Any,
    *,
    floor: Any,
    measure: Any,
    models: Any,
    budget: Any,
    minutes: Any,
    seed: Any,
    stack: Any,
) -> None:
    """Raise for wrong arguments of :func:`search_recipes`, whatever the data are."""
    _check_recipes(base, candidates)
    check_number("floor", floor, low=0, high=1, hint="It is a share: 0.02 is two points of test accuracy.")
    check_integer("seed", seed, low=0)
    check_integer("stack", stack, low=1)
    if not isinstance(measure, str) or measure.count("/") != 1:
        raise ValueError(f"measure must be '<attack>/<metric>', such as 'lira/auroc', not {measure!r}.")
    attack, _, metric = measure.partition("/")
    create_attacks([attack])  # an error names the known ones
    if metric not in leak_metrics():
        raise ValueError(
            f"{measure!r} is no measure that is lower the less a model leaks; of every attack these are "
            f"{', '.join(leak_metrics())}."
        )
    rounds = list(models) if isinstance(models, Sequence) else []
    for each in rounds:
        check_integer("models", each, low=8)
    if not rounds or any(each % 2 for each in rounds) or rounds != sorted(set(rounds)):
        raise ValueError(f"models must be increasing even numbers of at least 8, such as (8, 16, 32), not {models!r}.")
    if minutes is not None:
        check_number("minutes", minutes, low=0, low_open=True)
    if budget is not None:
        hint = "The first round alone needs that many models: pass fewer candidates, or a larger budget."
        check_integer("budget", budget, low=len(candidates) * rounds[0], hint=hint)


def _check_recipes(base: Any, candidates: Any) -> None:
    if not isinstance(candidates, Mapping):
        raise TypeError(f"candidates must be recipes by name, not a {type(candidates).__name__}.")
    for name, recipe in {"base": base, **candidates}.items():
        if not isinstance(recipe, ShadowRecipe):
            raise TypeError(f"{name} must be a ShadowRecipe, not {type(recipe).__name__}.")
    if base.defense is not None or base.cwrf is not None:
        raise ValueError("base must be the training of the finished model, without defense and cwrf.")
    if BASE in candidates or "base" in candidates:
        raise ValueError(f"{BASE!r} and 'base' name the base models: give the candidate another name.")
    if len(candidates) < 2:
        raise ValueError(f"a search needs at least two candidates, not {len(candidates)}.")
    if all(recipe.cwrf is not None for recipe in candidates.values()):
        raise ValueError("one candidate at least must not rewind (cwrf=None): it shows what rewinding adds.")
