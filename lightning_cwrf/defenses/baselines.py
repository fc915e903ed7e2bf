"""The plain regularisers that PAST is compared with: label smoothing, confidence penalty, and ℓ1 or ℓ2 penalties.

Dropout is ``torch.nn.Dropout`` in the model, early stopping is Lightning's ``EarlyStopping`` callback.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_cwrf.checks import check_number
from lightning_cwrf.classification import check_targets
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.composition import base_loss, check_on
from lightning_cwrf.defenses.registry import register_defense
from lightning_cwrf.defenses.settings import Defense
from lightning_cwrf.weights.descent import trainable_parameters


def label_smoothing_loss(logits: Tensor, targets: Tensor, *, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy to targets mixed with the uniform distribution (Szegedy et al. 2016).

    Args:
        logits: shape ``(n, K)``.
        targets: class indices ``(n,)``.
        smoothing: share of the uniform distribution, in [0, 1).

    >>> label_smoothing_loss(torch.zeros(1, 2), torch.tensor([0]), smoothing=0.5)
    tensor(0.6931)
    """
    LabelSmoothing(smoothing=smoothing)
    targets = check_targets(logits, targets)
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def confidence_penalty_loss(logits: Tensor, targets: Tensor, *, beta: float = 0.1) -> Tensor:
    """Cross-entropy minus β times the mean entropy of the predictions (Pereyra et al. 2017).

    Args:
        logits: shape ``(n, K)``.
        targets: class indices ``(n,)``.
        beta: β ≥ 0, the weight of the entropy.

    >>> confidence_penalty_loss(torch.zeros(1, 2), torch.tensor([0]), beta=1.0)
    tensor(0.)
    """
    ConfidencePenalty(beta=beta)
    targets = check_targets(logits, targets)
    log_p = logits.log_softmax(-1)
    return F.cross_entropy(logits, targets) + beta * (log_p.exp() * log_p).sum(-1).mean()


def weight_penalty(parameters: list[Tensor], *, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    """``l1 · Σ|θ| + l2 · Σθ²`` over all given parameters.

    >>> weight_penalty([torch.tensor([1.0, -2.0])], l1=1.0, l2=0.5)
    tensor(5.5000)
    """
    WeightPenalty(l1=l1, l2=l2)
    if not parameters:
        raise ValueError("there are no parameters to penalise: all weights are frozen (requires_grad=False).")
    return torch.stack([l1 * p.abs().sum() + l2 * p.square().sum() for p in parameters]).sum()


@register_defense("label_smoothing")
@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Defense):
    """The settings of :func:`label_smoothing_loss`."""

    per_example = True
    strengths = tuple({"smoothing": smoothing} for smoothing in (0.1, 0.2, 0.4, 0.6))
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_number("smoothing", self.smoothing, low=0, high=1, high_open=True)


class LabelSmoothingMixin(DefenseMixin, settings=LabelSmoothing):
    """Trains a LightningModule with :func:`label_smoothing_loss`."""

    def defense_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Smoothed cross-entropy."""
        return label_smoothing_loss(logits, targets, **self.defense.settings)


@register_defense("confidence_penalty")
@dataclass(frozen=True, kw_only=True)
class ConfidencePenalty(Defense):
    """The settings of :func:`confidence_penalty_loss`."""

    per_example = True
    strengths = tuple({"beta": beta} for beta in (0.1, 0.5, 1.0, 2.0))
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0)


class ConfidencePenaltyMixin(DefenseMixin, settings=ConfidencePenalty):
    """Trains a LightningModule with :func:`confidence_penalty_loss`."""

    def defense_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with a confidence penalty."""
        return confidence_penalty_loss(logits, targets, **self.defense.settings)


@register_defense("weight_penalty")
@dataclass(frozen=True, kw_only=True)
class WeightPenalty(Defense):
    """The settings of :func:`weight_penalty`, and ``on``: the defense whose loss it is added to (cross-entropy)."""

    l1: float = 0.0
    l2: float = 0.0
    on: Defense | None = None

    def __post_init__(self) -> None:
        check_number("l1", self.l1, low=0)
        check_number("l2", self.l2, low=0)
        check_on(self)


class WeightPenaltyMixin(DefenseMixin, settings=WeightPenalty):
    """Trains a LightningModule with a loss plus :func:`weight_penalty` over its trainable parameters.

    Frozen weights of CWRF are part of the penalty's value and get no gradient from it.
    """

    def defense_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of ``on``, or cross-entropy, plus the penalty."""
        weights: list[Tensor] = list(trainable_parameters(self).values())
        penalty = weight_penalty(weights, l1=self.defense.l1, l2=self.defense.l2)
        return base_loss(self, logits, targets) + penalty
