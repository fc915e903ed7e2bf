"""Attacks with a limited number of shadow models: the measures of every target, and what an interval needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_cwrf.attacks import Attack
from lightning_cwrf.auditing.recipe_targets import Measures, RecipeTargets, in_groups, jackknives_of
from lightning_cwrf.metrics.functional import CrossedJackknife, membership_auroc, tpr_at_fpr

FPR = 0.01


def chosen_pairs(pairs: int, target: int, m: int, without: int | None = None) -> list[int]:
    """The m pairs that come after a target's own, less one that is left out."""
    after = [(target // 2 + step) % pairs for step in range(1, pairs)]
    return [pair for pair in after if pair != without][:m]


def measured_by(targets: RecipeTargets, attack: Attack, m: int) -> dict[str, CrossedJackknife]:
    """The measures of an attack with m pairs of shadow models; the next one takes the place of a pair left out."""
    pairs = len(targets) // 2
    evidence = [targets.evidence(target) for target in range(len(targets))]

    def scores(target: int, without: int | None) -> Tensor:
        models = [2 * pair + half for pair in chosen_pairs(pairs, target, m, without) for half in (0, 1)]
        return attack(evidence[target].with_models(torch.tensor(models)))

    def same(target: int, without: int) -> bool:
        return not any(need.startswith("shadow") for need in attack.needs) or without not in chosen_pairs(
            pairs, target, m
        )

    return _jackknives(targets, scores, same)


def over_targets(targets: RecipeTargets, scores: Sequence[Tensor]) -> dict[str, CrossedJackknife]:
    """The measures of scores that depend on no shadow model."""
    return _jackknives(targets, lambda target, without: scores[target], lambda target, without: True)


def _jackknives(
    targets: RecipeTargets, scores: Callable[[int, int | None], Tensor], same: Callable[[int, int], bool]
) -> dict[str, CrossedJackknife]:
    pairs, examples = len(targets) // 2, len(targets.targets)
    found, without_pair = [], [[] for _ in range(pairs)]
    for i in range(len(targets)):
        own = scores(i, None)

        def measured(kept: Tensor, own: Tensor = own, i: int = i) -> Measures:
            return _measures(own[kept[:examples]], targets.membership[i][kept[:examples]])

        found.append(in_groups(measured, targets.groups))
        for pair in range(pairs):
            if pair != i // 2:
                less = found[-1].whole if same(i, pair) else _measures(scores(i, pair), targets.membership[i])
                without_pair[pair].append(less)
    return jackknives_of(found, without_pair)


def _measures(scores: Tensor, is_member: Tensor) -> Measures:
    return {
        "auroc": float(membership_auroc(scores, is_member)),
        "tpr": float(tpr_at_fpr(scores, is_member, FPR)),
    }
