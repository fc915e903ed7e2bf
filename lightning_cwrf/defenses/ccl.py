"""CCL, the convex-concave loss (Liu et al. 2024): a concave term raises the variance of the training losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from lightning_cwrf.checks import check_choice, check_number
from lightning_cwrf.classification import check_targets
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.registry import register_defense
from lightning_cwrf.defenses.settings import Defense

Kind = Literal["ccel", "ccql"]


def ccl_loss(logits: Tensor, targets: Tensor, *, alpha: float = 0.5, beta: float = 1.0, kind: Kind = "ccel") -> Tensor:
    """Convex-concave loss: ``β · mean[α·ℓ − (1 − α)·c(p_y)]`` with ℓ the cross-entropy and p_y the true probability.

    Args:
        logits: shape ``(n, K)``.
        targets: class indices ``(n,)``.
        alpha: α in [0, 1]. Published example: 0.5; 1 is plain cross-entropy.
        beta: β > 0. Published example: 0.05.
        kind: the concave part c: ``"ccel"`` is exp(p_y), ``"ccql"`` is p_y + p_y²/2.

    Returns:
        A scalar.

    >>> import torch
    >>> ccl_loss(torch.zeros(1, 2), torch.tensor([0]), alpha=0.0, kind="ccql")  # p_y is one half
    tensor(-0.6250)
    """
    CCL(alpha=alpha, beta=beta, kind=kind)
    targets = check_targets(logits, targets)
    losses = F.cross_entropy(logits, targets, reduction="none")
    p = (-losses).exp()
    concave = p.exp() if kind == "ccel" else p + p.square() / 2
    return beta * (alpha * losses - (1 - alpha) * concave).mean()


@register_defense("ccl")
@dataclass(frozen=True, kw_only=True)
class CCL(Defense):
    """The settings of :func:`ccl_loss`."""

    per_example = True
    strengths = tuple({"alpha": alpha} for alpha in (0.75, 0.5, 0.25))
    alpha: float = 0.5
    beta: float = 1.0
    kind: Kind = "ccel"

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, low=0, high=1, hint="It weighs the convex part against the concave one.")
        check_number("beta", self.beta, low=0, low_open=True, hint="It scales the loss.")
        check_choice("kind", self.kind, ("ccel", "ccql"))


class CCLMixin(DefenseMixin, settings=CCL):
    """Trains a LightningModule with :func:`ccl_loss`."""

    def defense_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Convex-concave loss."""
        return ccl_loss(logits, targets, **self.defense.settings)
