"""Recipes whose models are drawn at random, with a leak that is known."""

import warnings

import torch
from torch.utils.data import TensorDataset

from lightning_cwrf import audit_recipe
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership
from lightning_cwrf.shadows.store import ShadowStore


def simulated(models=8, examples=96, seed=0, leak=0.0, better=0.0, population=40):
    """Binary models whose margin is the example's own, more for members by its own leak, and noise."""
    drawn = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=drawn)

    membership = balanced_membership(models, examples, seed)
    own, leaks = 2 * normal(examples), leak * normal(examples).abs()
    margin = 1 + better + own + leaks * membership + normal(models, examples)
    outside = 1 + better + 2 * normal(population) + normal(models, population)
    data = TensorDataset(normal(population, 3), torch.zeros(population, dtype=torch.long))
    return ShadowOutputs(
        logits=torch.stack([margin, torch.zeros_like(margin)], -1),
        membership=membership,
        targets=torch.zeros(examples, dtype=torch.long),
        digests=[str(i).encode() for i in range(examples)],
        population=data,
        population_logits=torch.stack([outside, torch.zeros_like(outside)], -1),
        store=ShadowStore("nowhere", "key"),
    )


def run(shadows, attacks=("lira",), **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return audit_recipe(shadows, attacks=list(attacks), progress=False, **settings)
