"""How good LiRA, BaVarIA and RMIA are when there are few shadow models, on the digits.

The unprotected classifier of ``examples/harden_digits.py`` is trained on 32 balanced halves of 600 digits. Sixteen of
the models in turn play the audited one, whose membership is known; 4, 8 or 14 of the others, in complementary pairs,
are its shadow models. The table shows, over the sixteen, the mean AUC, the mean difference to LiRA of pooled variance
with its standard error, and the mean TPR at 1 % FPR.

    python benchmarks/few_shadows.py
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from digits import BATCH, DigitsClassifier, digits, split

from lightning_cwrf import ShadowRecipe, train_shadows
from lightning_cwrf.attacks import Evidence, create_attack
from lightning_cwrf.metrics.functional import membership_auroc, tpr_at_fpr
from lightning_cwrf.shadows import ShadowOutputs

MODELS, TARGETS = 32, 16
BUDGETS = (4, 8, 14)
ATTACKS = {
    "LiRA, pooled variance": create_attack("lira", variance="pooled"),
    "LiRA, variance per example": create_attack("lira", variance="per_example"),
    "BaVarIA-t": create_attack("bavaria"),
    "BaVarIA-n": create_attack("bavaria", predictive="normal"),
    "RMIA, BASE": create_attack("rmia"),
    "RMIA, temperature tuned": create_attack("rmia", temperature="tuned"),
    "LiRA offline, pooled variance": create_attack("lira", online=False, variance="pooled"),
    "BaVarIA-t offline": create_attack("bavaria", online=False),
    "RMIA offline, as published": create_attack("rmia", online=False, temperature=1.0, offline_a=0.3),
    "RMIA offline, a tuned": create_attack("rmia", online=False, temperature=1.0),
    "RMIA offline": create_attack("rmia", online=False),
    "RMIA offline, trimmed": create_attack("rmia", online=False, trim=0.2),
}


def recipe_and_data() -> tuple[ShadowRecipe, Dataset[Any], Dataset[Any]]:
    """How the models are trained, the pool and the population."""
    *_, reference, population, pool = split(digits(), seed=0)
    recipe = ShadowRecipe(functools.partial(DigitsClassifier, 60), {"max_epochs": 60}, batch_size=BATCH)
    return recipe, pool, ConcatDataset([reference, population])


def shadows(store: Path) -> ShadowOutputs:
    recipe, pool, population = recipe_and_data()
    return train_shadows(recipe, pool, MODELS, population=population, store=store, stack=MODELS // 2)


def scores(shadowed: ShadowOutputs, target: int, budget: int) -> dict[str, tuple[float, float]]:
    """AUC and TPR of every attack on one model, by shadow models of the other half of the pairs."""
    others = list(range(TARGETS, TARGETS + budget))
    evidence = Evidence(
        logits=shadowed.logits[target],
        targets=shadowed.targets,
        shadow_logits=shadowed.logits[others],
        membership=shadowed.membership[others],
        population_logits=shadowed.population_logits[target],
        population_targets=torch.tensor([int(y) for _, y in shadowed.population]),
        shadow_population_logits=shadowed.population_logits[others],
    )
    inside = shadowed.membership[target]
    found = {}
    for name, attack in ATTACKS.items():
        score = attack(evidence)
        found[name] = float(membership_auroc(score, inside)), float(tpr_at_fpr(score, inside, 0.01))
    return found


def table(store: Path) -> str:
    shadowed = shadows(store)
    lines = ["| attack | " + " | ".join(f"{b} shadow models" for b in BUDGETS) + " |", "|---|" + "---|" * len(BUDGETS)]
    every = {b: [scores(shadowed, target, b) for target in range(TARGETS)] for b in BUDGETS}
    for name in ATTACKS:
        cells = []
        for b in BUDGETS:
            auc, tpr, first = (
                torch.tensor([found[key][column] for found in every[b]])
                for key, column in ((name, 0), (name, 1), ("LiRA, pooled variance", 0))
            )
            gain = auc - first
            error = float(gain.std()) / TARGETS**0.5
            cells.append(f"{auc.mean():.3f} ({gain.mean():+.3f} ± {error:.3f}), {tpr.mean():.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(Path(sys.argv[1] if len(sys.argv) > 1 else "out/few_shadows")))
