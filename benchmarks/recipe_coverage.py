"""How often the intervals of an audited recipe hold the mean over other pools and models, over simulated recipes.

Models are binary. The margin of an example is its own, N(1, 4), plus noise N(0, 1); a member's is higher by the leak of
the example, |N(0, 1)| times ``leak``, times a factor of the model, N(1, 0.04). ``docs/numbers.md`` has the output.

    python benchmarks/recipe_coverage.py [--draws 200]
"""

from __future__ import annotations

import argparse

import torch
from scipy import stats
from torch.utils.data import TensorDataset

from lightning_cwrf import audit_recipe
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership
from lightning_cwrf.shadows.store import ShadowStore

CASES = ((8, 96, 0.0), (8, 96, 2.0), (16, 96, 0.0), (16, 96, 2.0))  # models, examples, leak
MEASURES = (
    "loss/auroc", "lira/auroc", "lira/tpr_at_fpr_0.001", "lira/advantage", "rmia/auroc", "train_accuracy", "loss_gap"
)  # fmt: skip
POPULATION = 96


def simulated(models: int, examples: int, leak: float, seed: int) -> ShadowOutputs:
    """Outputs of models on a pool, both drawn by the seed."""
    drawn = torch.Generator().manual_seed(seed)
    membership = balanced_membership(models, examples, seed)
    own = 1 + 2 * torch.randn(examples, generator=drawn)
    leaks = leak * torch.randn(examples, generator=drawn).abs()
    factor = 1 + 0.2 * torch.randn(models, 1, generator=drawn)
    margin = own + factor * leaks * membership + torch.randn(models, examples, generator=drawn)
    outside = 1 + 2 * torch.randn(POPULATION, generator=drawn) + torch.randn(models, POPULATION, generator=drawn)
    names = torch.randn(POPULATION, 1, generator=drawn)  # so that each example of the population is another one
    return ShadowOutputs(
        logits=torch.stack([margin, torch.zeros_like(margin)], -1),
        membership=membership,
        targets=torch.zeros(examples, dtype=torch.long),
        digests=[str(i).encode() for i in range(examples)],
        population=TensorDataset(names, torch.zeros(POPULATION, dtype=torch.long)),
        population_logits=torch.stack([outside, torch.zeros_like(outside)], -1),
        store=ShadowStore("nowhere", "key"),
    )


def main(draws: int) -> None:
    torch.set_num_threads(1)
    print("| models | pool | leak | measure | mean | its spread over draws | mean error | coverage of 95 % |")
    print("|---|---|---|---|---|---|---|---|")
    for models, examples, leak in CASES:
        audits = [
            audit_recipe(simulated(models, examples, leak, seed), attacks=["loss", "lira", "rmia"], progress=False)
            for seed in range(draws)
        ]
        for name in MEASURES:
            found = [each.jackknives[name] for each in audits]
            values = torch.tensor([each.value for each in found])
            truth = float(values.mean())
            error = sum(each.error for each in found) / draws
            held = sum(low <= truth <= high for low, high in (each.interval() for each in found))
            low, high = stats.binomtest(held, draws).proportion_ci(method="exact")
            spread, coverage = float(values.std()), f"{held / draws:.2f} [{low:.2f}, {high:.2f}]"
            cells = (models, examples, f"{leak:g}", name, f"{truth:.3f}", f"{spread:.4f}", f"{error:.4f}", coverage)
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=200)
    main(parser.parse_args().draws)
