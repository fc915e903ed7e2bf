"""Attack P and Attack R (Ye et al. 2022): the loss against that of a population, or of reference models."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cwrf.attacks.base import Evidence, register_attack
from lightning_cwrf.attacks.signals import check_coverage, check_finite, check_shadows, example_losses


def attack_p(losses: Tensor, population_losses: Tensor) -> Tensor:
    """Score by the share of a population whose loss under the same model is at least the example's.

    It is one global threshold on the loss, set at a quantile of the population: calling everything above 1 − f a member
    has a false positive rate of about f. Its ROC is the loss attack's, up to ties, which the loss itself breaks.

    Args:
        losses: of the audited examples, shape ``(n,)``.
        population_losses: of examples that no model was trained on, ``(m,)``.

    Returns:
        float64 scores in [0, 1], ``(n,)``.

    >>> attack_p(torch.tensor([0.1, 2.0]), torch.tensor([1.0, 0.5, 3.0, 4.0]))
    tensor([0.9818, 0.4667], dtype=torch.float64)
    """
    losses, population = check_finite("losses", losses), check_finite("population_losses", population_losses)
    if losses.ndim != 1:
        raise ValueError(f"losses must have shape (n,), not {tuple(losses.shape)}.")
    if population.ndim != 1 or len(population) == 0:
        raise ValueError(f"population_losses must have shape (m,) with m >= 1, not {tuple(population.shape)}.")
    above = len(population) - torch.searchsorted(population.sort().values, losses)
    # 1 / (1 + loss), which falls from 1 to 0, orders the losses within one step of the share.
    return (above + 1 / (1 + losses.clamp_min(0))) / (len(population) + 1)


def attack_r(losses: Tensor, shadow_losses: Tensor, membership: Tensor) -> Tensor:
    """Score by the share of OUT reference models under which the very same example's loss is at least as high.

    With c OUT models the share has c + 1 values. Examples with the same share are ordered by the distance of the loss
    below the mean of the OUT losses, in a term that is smaller than one step.

    Args:
        losses: under the audited model, shape ``(n,)``.
        shadow_losses: under the k shadow models, ``(k, n)``.
        membership: bool ``(k, n)``, True where that shadow model was trained with that example.

    Returns:
        float64 scores in [0, 1], ``(n,)``.

    >>> shadow_losses, membership = torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([[False], [False], [True]])
    >>> attack_r(torch.tensor([2.0]), shadow_losses, membership)  # one of two OUT models, at their mean
    tensor([0.5000], dtype=torch.float64)
    """
    losses, shadow_losses, membership = check_shadows(losses, shadow_losses, membership)
    check_coverage(membership, least_in=0, least_out=1)
    outside = ~membership
    count = outside.sum(0)
    above = ((shadow_losses >= losses) & outside).sum(0)
    gap = (shadow_losses * outside).sum(0) / count - losses
    return (above + torch.sigmoid(gap)) / (count + 1)


@register_attack("attack_p", "population")
def _attack_p(evidence: Evidence) -> Tensor:
    return attack_p(evidence.signal(example_losses), evidence.signal(example_losses, "population"))


@register_attack("attack_r", "shadows")
def _attack_r(evidence: Evidence) -> Tensor:
    losses, shadow_losses = evidence.signal(example_losses), evidence.shadow_signals(example_losses)
    return attack_r(losses, shadow_losses, evidence.require("membership"))
