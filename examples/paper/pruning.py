"""Fig. 1 and Fig. 4: does pruning the weights that matter least for accuracy make a model safer?

One shot: the weights with the lowest learnability scores of the finished model are set to zero (M3), and the rest may
be tuned further, or rewound to its initial values and trained again (M2), with the zeros held. M1 is the finished
model. Control: random weights are pruned.

    python examples/paper/pruning.py
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comparing import ACCURACY, AUC
from study import Study, parse, parser
from tables import figure
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from lightning_cwrf import RecipeAudit, ShadowRecipe, WeightMask
from lightning_cwrf.data import SeededOrder
from lightning_cwrf.recipes.stacking import StackedBatches, train_stack
from lightning_cwrf.shadows.jobs import seed_all
from lightning_cwrf.weights import learnability_scores

M1, M2, M3 = "M1: unpruned", "M2: pruned, rewound, retrained", "M3: pruned"
TUNED, RANDOM = "pruned, tuned", "random weights pruned"
SPARSITIES = [0.3, 0.5, 0.7, 0.85, 0.9]
CLAIMS = (
    "pruned without retraining, up to 90 %, the accuracy stays within a point",
    "LiRA's AUC is not lower there",
    "at 85 %, M2 has the accuracy of M1 within a point",
    "at 85 %, M3 has less accuracy than M1 by more than a point",
)
RULE = (
    "reproduced if all four claims of the paper are true, of the means, and the second unless the AUC is lower by more "
    "than two standard errors of the paired difference; not if none is; else partly"
)


@dataclass(frozen=True)
class Pruned:
    """Prunes a finished model, and trains what is left by a recipe; the pruned weights stay at zero.

    Args:
        build: builds the untrained model.
        recipe: of the training after the pruning; None: there is none.
        sparsity: the share of the weights that is pruned.
        rewind: whether the rest starts from its initial values.
        random: whether the weights are chosen at random.
        steps: of the scoring.
    """

    build: ShadowRecipe
    sparsity: float
    recipe: ShadowRecipe | None = None
    rewind: bool = False
    random: bool = False
    steps: int = 30

    def prune(self, members: Dataset[Any], seed: int, base: Mapping[str, Tensor]) -> tuple[Any, WeightMask]:
        seed_all(seed)
        model = self.build.build()
        initial = copy.deepcopy(model.state_dict())
        model.load_state_dict(base)
        scores = learnability_scores(model, members, steps=self.steps)
        if self.random:
            scores = {name: torch.rand_like(score) for name, score in scores.items()}
        pruned = ~WeightMask.top(scores, 1 - self.sparsity)
        if self.rewind:
            model.load_state_dict(initial)
        pruned.rewind_(model, {name: torch.zeros_like(score) for name, score in scores.items()})
        return model, pruned

    def __call__(self, members: Dataset[Any], seed: int, base: Mapping[str, Tensor]) -> nn.Module:
        places = range(len(members))  # type: ignore[arg-type]
        return self.train_stack(members, [places], [seed], [base])[0]

    def train_stack(
        self,
        pool: Dataset[Any],
        members: Sequence[Sequence[int]],
        seeds: Sequence[int],
        bases: Sequence[Mapping[str, Tensor]],
    ) -> list[Any]:
        pruned = [self.prune(Subset(pool, m), s, b) for m, s, b in zip(members, seeds, bases, strict=True)]
        models = [model for model, _ in pruned]
        if self.recipe is None:
            return models
        orders = [SeededOrder(len(places), seed) for places, seed in zip(members, seeds, strict=True)]
        batches = StackedBatches(pool, members, orders, self.recipe.batch_size, False)
        return train_stack(models, seeds, batches, [mask for _, mask in pruned], self.recipe.trainer_kwargs)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__file__, __doc__)
    made.add_argument("--sparsities", type=float, nargs="+", help="shares of the weights to prune")
    made.add_argument("--retrained", type=float, nargs="+", default=[0.85], help="the shares that are trained further")
    arguments = parse(made, words)
    arguments.sparsities = arguments.sparsities or (SPARSITIES[3:4] if arguments.quick else SPARSITIES)
    study = Study(f"pruning-{arguments.data}", "Pruning the least important weights", arguments)
    plain, tuning = study.recipe(), study.tuning(None)
    found: dict[tuple[str, float], RecipeAudit] = {(M1, 0.0): study.unprotected()}
    ways: dict[str, dict[str, Any]] = {
        M3: {},
        TUNED: {"recipe": tuning},
        M2: {"recipe": plain, "rewind": True},
        RANDOM: {"random": True},
        f"{RANDOM}, rewound, retrained": {"recipe": plain, "rewind": True, "random": True},
    }
    for way, settings in ways.items():
        for sparsity in arguments.retrained if "recipe" in settings else arguments.sparsities:
            found[way, sparsity] = study.tuned(
                f"{way}, {sparsity:.0%}", Pruned(plain, sparsity, steps=study.task.steps, **settings)
            )
    _plot(study, found)
    first = found[M1, 0.0]
    rows = [
        [way, f"{sparsity:.0%}", *(audit.estimate(m) for m in (ACCURACY, "train_loss", "test_loss", AUC))]
        + ([None, None] if audit is first else [audit.minus(first, m) for m in (ACCURACY, AUC)])
        for (way, sparsity), audit in found.items()
    ]
    head = ["way", "sparsity", "test accuracy", "train loss", "test loss", "LiRA AUC"]
    return study.write([*head, "accuracy minus M1's", "AUC minus M1's"], rows, _verdict(found))


def _verdict(found: dict[tuple[str, float], RecipeAudit]) -> dict[str, str]:
    first = found[M1, 0.0]
    plain = [audit for (way, _), audit in found.items() if way == M3]
    differences = [audit.jackknives[AUC] - first.jackknives[AUC] for audit in plain]
    held = [
        all(_lost(first, audit) <= 0.01 for audit in plain),
        all(each.value + 2 * each.error >= 0 for each in differences),
        _lost(first, found.get((M2, 0.85))) <= 0.01,
        _lost(first, found.get((M3, 0.85))) > 0.01,
    ]
    word = "reproduced" if all(held) else "partly" if any(held) else "not"
    told = "; ".join(f"{claim}: {'yes' if yes else 'no'}" for claim, yes in zip(CLAIMS, held, strict=True))
    return {"word": word, "sentence": f"{told}.", "rule": RULE}


def _lost(first: RecipeAudit, audit: RecipeAudit | None) -> float:
    """The test accuracy that was lost; NaN where there is no such audit, so that every claim on it is false."""
    return float("nan") if audit is None else first.estimate(ACCURACY).value - audit.estimate(ACCURACY).value


def _plot(study: Study, found: dict[tuple[str, float], RecipeAudit]) -> None:
    measures = (ACCURACY, "test_loss", AUC)
    with figure(study.out / f"{study.name}.png", len(measures)) as panels:
        for axes, measure in zip(panels, measures, strict=True):
            for way in dict.fromkeys(way for way, _ in found):
                points = [(s, audit.estimate(measure).value) for (own, s), audit in found.items() if own in (way, M1)]
                axes.plot([100 * s for s, _ in points], [value for _, value in points], "o-", label=way)
            axes.set(xlabel="sparsity (%)", title=measure.replace("_", " "))
        panels[0].legend(fontsize="small")


if __name__ == "__main__":
    main()
