"""RelaxLoss (Chen et al. 2022): hold the training loss at a level, by gradient ascent where it falls below."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.classification import check_targets
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.registry import register_defense
from lightning_cwrf.defenses.settings import Defense


def relaxloss_loss(logits: Tensor, targets: Tensor, *, alpha: float, epoch: int, upper: float = 1.0) -> Tensor:
    """RelaxLoss of a batch (Chen et al. 2022, Algorithm 1).

    With m the batch mean of the cross-entropy ℓ: even epochs give ``|m − α|``. Odd epochs give m where m > α, else
    ``mean[(1 − correct)·CE(soft, p) − ℓ]``, where soft puts ``min(p_y, upper)`` on the true class and shares the rest
    equally among the others (posterior flattening). As in the authors' code the gradient flows through soft.

    Args:
        logits: shape ``(n, K)``.
        targets: class indices ``(n,)``.
        alpha: α ≥ 0, the loss level. Published: 1.0 (CIFAR-10, ResNet20), 0.4 (CIFAR-10, VGG11), 3.0 and 0.5
            (CIFAR-100), 0.8 (Purchase), 2.5 (Texas).
        epoch: the number of the epoch, from 0; its parity chooses the branch.
        upper: in (0, 1]; published: 1 (images), 0.3 (Purchase), 0.1 (Texas).

    Returns:
        A scalar.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> relaxloss_loss(logits, torch.tensor([0, 1]), alpha=1.0, epoch=0)  # the loss, 0.1269, is 0.8731 too low
    tensor(0.8731)
    """
    RelaxLoss(alpha=alpha, upper=upper)
    check_integer("epoch", epoch, low=0)
    targets = check_targets(logits, targets)
    losses = F.cross_entropy(logits, targets, reduction="none")
    mean = losses.mean()
    if epoch % 2 == 0:
        return (mean - alpha).abs()
    log_p = logits.log_softmax(-1)
    true = log_p.gather(-1, targets.unsqueeze(-1)).exp().clamp(max=upper)
    soft = ((1 - true) / (logits.shape[-1] - 1)).expand_as(logits).scatter(-1, targets.unsqueeze(-1), true)
    correct = (logits.argmax(-1) == targets).to(losses.dtype)
    flattened = ((1 - correct) * -(soft * log_p).sum(-1) - losses).mean()
    return torch.where(mean > alpha, mean, flattened)


@register_defense("relaxloss")
@dataclass(frozen=True, kw_only=True)
class RelaxLoss(Defense):
    """The settings of :func:`relaxloss_loss`.

    >>> RelaxLoss(alpha=0.5)
    RelaxLoss(alpha=0.5, upper=1.0)
    """

    strengths = tuple({"alpha": alpha} for alpha in (0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 3.0))
    alpha: float = 1.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, low=0, hint="It is the level of the training loss.")
        check_number("upper", self.upper, low=0, high=1, low_open=True)


class RelaxLossMixin(DefenseMixin, settings=RelaxLoss):
    """Trains a LightningModule with :func:`relaxloss_loss`.

    >>> import lightning
    >>> class Classifier(lightning.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(4, 3)
    ...     def forward(self, x):
    ...         return self.layer(x)
    >>> model = RelaxLossMixin.attach(Classifier(), alpha=0.5)
    >>> type(model).__name__, model.defense_settings
    ('RelaxLossClassifier', {'alpha': 0.5, 'upper': 1.0})
    """

    def defense_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """RelaxLoss at the current epoch."""
        settings: RelaxLoss = self.defense
        return relaxloss_loss(logits, targets, alpha=settings.alpha, upper=settings.upper, epoch=self.current_epoch)
