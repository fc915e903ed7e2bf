"""Label-only attacks on the digits: AUC by the number of queries for each example.

The models are those of ``few_shadows.py``, with their weights. Sixteen of the models in turn play the audited one, of
which the attacker sees labels alone; 14 of the others are shadow models of the attacker's own. The table shows the mean
AUC over the sixteen with its standard error, and the queries that were really used.

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
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.outputs import collect_view_logits

MODELS, SHADOWS = 32, 14
BUDGETS = (1, 3, 10, 30, 100, 300, 1000)
SHOTS = {1: (0.1,), 3: (0.5, 0.1, 0.01), 9: (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)}
"""Thresholds of OSLO by their number."""


def table(store: Path) -> str:
    recipe, pool, population = recipe_and_data()
    shadowed = train_shadows(
        recipe, pool, MODELS, population=population, store=store, stack=MODELS // 2, keep_weights=True
    )
    images = torch.stack([image for image, _ in pool])
    data = TensorDataset(images, shadowed.targets)
    membership, models, own = shadowed.membership, [], []
    for i in range(TARGETS + SHADOWS):
        models.append(recipe.build().eval())
        models[-1].load_state_dict(shadowed.weights(i))
        own.append(boundary_distance(models[-1], data, budget=BUDGETS[-1], curve=BUDGETS, clip=(0, 1)))
    others = slice(TARGETS, TARGETS + SHADOWS)
    distances = torch.stack([each.distances for each in own], 1)  # (budgets, models, n)
    rows: dict[tuple[str, str], list[float]] = {}

    def note(name: str, queries: str, scores: Tensor, target: int) -> None:
        rows.setdefault((name, queries), []).append(float(membership_auroc(scores, membership[target])))

    for target in range(TARGETS):
        logits = shadowed.logits[target].float()
        note("correctness", "1", correctness(logits, shadowed.targets), target)
        views = collect_view_logits(models[target], data, default_views())
        right = views.argmax(-1) == shadowed.targets
        note("augmentation, 9 views", "9", augmentation_attack(right), target)
        for row, budget in zip(distances, BUDGETS, strict=True):
            note("boundary distance", f"{budget}", row[target], target)
        for row, budget in zip(distances, BUDGETS, strict=True):
            scores = lira(row[target], row[others], membership[others], variance="pooled")
            note("LiRA with that distance as its signal", f"{budget}", scores, target)
        for shots, thresholds in SHOTS.items():
            found = oslo(models[target], data, models[others], membership[others], thresholds=thresholds, clip=(0, 1))
            note("OSLO", f"{shots}", found.scores, target)
        note("loss (sees confidences)", "1", -example_losses(logits, shadowed.targets), target)
    lines = ["| attack | queries | AUC |", "|---|---|---|"]
    for (name, queries), aucs in rows.items():
        found_aucs = torch.tensor(aucs)
        lines.append(f"| {name} | {queries} | {found_aucs.mean():.3f} ± {found_aucs.std() / TARGETS**0.5:.3f} |")
    used = torch.stack([each.queries for each in own]).double().mean()
    return "\n".join([*lines, f"\nQueries really used by the largest budget, on average: {used:.0f}"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(Path(sys.argv[1] if len(sys.argv) > 1 else "out/few_shadows")))
