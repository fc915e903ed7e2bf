"""Label-only attacks on the digits: AUC by the number of queries for each example.

The models are those of ``few_shadows.py``, with their weights. Eight of the models in turn play the audited one, of
which the attacker sees labels alone; 14 of the others are shadow models of the attacker's own. The table shows the mean
AUC over the eight with its standard error, the mean TPR at 1 % FPR, and the queries that were really used.

    python benchmarks/label_only.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from few_shadows import TARGETS, recipe_and_data
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_cwrf import train_shadows
from lightning_cwrf.attacks import (
    augmentation_attack,
    boundary_distance,
    correctness,
    example_losses,
    lira,
    oslo,
)
from lightning_cwrf.attacks.augmentation import default_views
from lightning_cwrf.metrics.functional import membership_auroc, tpr_at_fpr
from lightning_cwrf.outputs import collect_view_logits

MODELS, SHADOWS = 32, 14
AUDITED = range(0, TARGETS, 2)
"""One of each pair."""
BUDGETS = (1, 3, 10, 30, 100, 300, 1000)
THRESHOLDS = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
SHOTS = {"threshold 0.5": (2,), "threshold 0.1": (5,), "0.5, 0.1, 0.01": (2, 5, 8), "nine thresholds": range(9)}
"""OSLO's thresholds, by their places."""


def table(store: Path) -> str:
    recipe, pool, population = recipe_and_data()
    shadowed = train_shadows(
        recipe, pool, MODELS, population=population, store=store, stack=MODELS // 2, keep_weights=True
    )
    images = torch.stack([pool[i][0] for i in range(len(shadowed.targets))])
    data = TensorDataset(images, shadowed.targets)
    membership, others = shadowed.membership, slice(TARGETS, TARGETS + SHADOWS)
    models, own = {}, {}
    for i in (*AUDITED, *range(TARGETS, TARGETS + SHADOWS)):
        models[i] = recipe.build().eval()
        models[i].load_state_dict(shadowed.weights(i))
        own[i] = boundary_distance(models[i], data, budget=BUDGETS[-1], curve=BUDGETS, clip=(0, 1))
    ours = [models[i] for i in range(TARGETS, TARGETS + SHADOWS)]
    theirs = torch.stack([own[i].distances for i in range(TARGETS, TARGETS + SHADOWS)], 1)  # (budgets, models, n)
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def note(name: str, queries: str, scores: Tensor, target: int) -> None:
        inside = membership[target]
        measures = float(membership_auroc(scores, inside)), float(tpr_at_fpr(scores, inside, 0.01))
        rows.setdefault((name, queries), []).append(measures)

    used = {}
    for target in AUDITED:
        logits = shadowed.logits[target].float()
        note("loss (sees confidences)", "1", -example_losses(logits, shadowed.targets), target)
        note("correctness", "1", correctness(logits, shadowed.targets), target)
        right = collect_view_logits(models[target], data, default_views()).argmax(-1) == shadowed.targets
        note("augmentation", "9", augmentation_attack(right), target)
        for i, budget in enumerate(BUDGETS):
            note("boundary distance", f"{budget}", own[target].distances[i], target)
        for i, budget in enumerate(BUDGETS):
            scores = lira(own[target].distances[i], theirs[i], membership[others], variance="pooled")
            note("LiRA with the distance as its signal", f"{budget}", scores, target)
        found = oslo(models[target], data, ours, membership[others], thresholds=THRESHOLDS, clip=(0, 1))
        for name, places in SHOTS.items():
            note(f"OSLO, {name}", f"{len(places)}", found.survived[list(places)].double().mean(0), target)
        used[target] = own[target].queries.double().mean(), found.queries.double().mean()
    lines = ["| attack | queries | AUC | TPR at 1 % FPR |", "|---|---|---|---|"]
    for (name, queries), measures in rows.items():
        auc, tpr = torch.tensor(measures).T
        error = float(auc.std()) / len(auc) ** 0.5
        lines.append(f"| {name} | {queries} | {auc.mean():.3f} ± {error:.3f} | {tpr.mean():.3f} |")
    by_distance, by_oslo = torch.tensor(list(used.values())).mean(0).tolist()
    lines.append(f"\nQueries really used, at most {BUDGETS[-1]}: {by_distance:.0f}; of nine, OSLO: {by_oslo:.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(Path(sys.argv[1] if len(sys.argv) > 1 else "out/few_shadows")))
