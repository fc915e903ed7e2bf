"""Defenses that are more than a loss, on the digits: DMP, SELENA, and what is done to the outputs of a finished model.

Each way of training is audited as a whole (``audit_recipe``): eight models on halves of 600 digits, each attacked by
the others but its complement, which went through the same defense. The network is that of
``examples/harden_digits.py``, 60 epochs. DMP distils on 500 further digits, without their labels; SELENA's ensembles
have 20 models each; MemGuard's network learns from a model's own members and from 497 further digits. The table shows
the mean test accuracy on the non-members and the mean AUCs, with 95 % intervals over models and pools.

    python benchmarks/more_defenses.py
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from digits import BATCH, DigitsClassifier, digits, quiet, split

from lightning_cwrf import DMP, SELENARecipe, ShadowRecipe, train_shadows
from lightning_cwrf.auditing import audit_recipe
from lightning_cwrf.defenses import MemGuardOutput, RoundedOutput
from lightning_cwrf.shadows import ShadowOutputs

MODELS = 8
PLAIN = ShadowRecipe(functools.partial(DigitsClassifier, 60), {"max_epochs": 60}, batch_size=BATCH)


@dataclass(frozen=True)
class DMPRecipe:
    """A teacher on the data to protect, then a student on reference data."""

    reference: Dataset[Any]

    def __call__(self, members: Dataset[Any], seed: int) -> nn.Module:
        teacher = PLAIN(members, seed)
        return replace(PLAIN, defense=DMP(teacher=teacher))(self.reference, seed + 1)


def shown(shadows: ShadowOutputs, wrap: Callable[..., Tensor]) -> ShadowOutputs:
    """The outputs after ``wrap(logits, membership, population's logits)`` of each model."""
    assert shadows.population_logits is not None
    models = zip(shadows.logits, shadows.membership, shadows.population_logits, strict=True)
    return replace(shadows, logits=torch.stack([wrap(*model) for model in models]))


def rounding(digits: int, logits: Tensor, *_: Tensor) -> Tensor:
    return RoundedOutput(nn.Identity(), digits)(logits)


def memguard(epsilon: float, targets: Tensor, logits: Tensor, inside: Tensor, others: Tensor) -> Tensor:
    members = TensorDataset(logits[inside], targets[inside])
    nonmembers = TensorDataset(others, torch.zeros(len(others), dtype=torch.long))  # whose labels are not used
    return MemGuardOutput(nn.Identity(), members, nonmembers, epsilon=epsilon)(logits)


def main(store: Path) -> None:
    parts = split(digits(), seed=0)
    reference, population = (Subset(parts.population, range(*ends)) for ends in ((500,), (500, 997)))
    common = {"store": store, "progress": False}
    plain = train_shadows(PLAIN, parts.pool, MODELS, stack=MODELS, workers=1, population=population, **common)
    ways: dict[str, Callable[[], ShadowOutputs]] = {
        "none": lambda: plain,
        "rounded to 1 decimal": lambda: shown(plain, functools.partial(rounding, 1)),
        "rounded to 3 decimals": lambda: shown(plain, functools.partial(rounding, 3)),
        "MemGuard, ε = 0.3": lambda: shown(plain, functools.partial(memguard, 0.3, plain.targets)),
        "MemGuard, ε = 1": lambda: shown(plain, functools.partial(memguard, 1.0, plain.targets)),
        "DMP": lambda: train_shadows(DMPRecipe(reference), parts.pool, MODELS, **common),
        "SELENA, 20 models": lambda: train_shadows(SELENARecipe(PLAIN, 20, stack=20), parts.pool, MODELS, **common),
    }
    print("| defense | test accuracy | loss attack AUC | LiRA AUC |\n|---|---|---|---|", flush=True)
    for name, make in ways.items():
        shadows = replace(make(), population=None, population_logits=None)  # accuracies of the same examples
        result = audit_recipe(shadows, attacks=["loss", "lira"], progress=False)
        cells = [result.model_metrics["test_accuracy"], *(result.estimates[a]["auroc"] for a in ("loss", "lira"))]
        told = " | ".join(f"{c.value:.3f} [{c.interval[0]:.3f}, {c.interval[1]:.3f}]" for c in cells)
        print(f"| {name} | {told} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    quiet()
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/more_defenses"))
