"""CCL, the convex-concave loss (Liu et al. 2024): a concave term raises the variance of the training losses."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from lightning_cwrf.checks import check_choice, check_number
from lightning_cwrf.classification import check_targets
from lightning_cwrf.defenses.base import DefenseMixin

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
    check_ccl(alpha, beta, kind)
    targets = check_targets(logits, targets)
    losses = F.cross_entropy(logits, targets, reduction="none")
    p = (-losses).exp()
    concave = p.exp() if kind == "ccel" else p + p.square() / 2
    return beta * (alpha * losses - (1 - alpha) * concave).mean()


def check_ccl(alpha: float, beta: float, kind: str) -> None:
    """Raise unless α lies in [0, 1], β is positive and finite, and the kind is known."""
    check_number("alpha", alpha, low=0, high=1, hint="It weighs the convex part against the concave one.")
    check_number("beta", beta, low=0, low_open=True, hint="It scales the loss.")
    check_choice("kind", kind, ("ccel", "ccql"))


class CCLMixin(DefenseMixin):
    """Trains a LightningModule with :func:`ccl_loss`; ``alpha``, ``beta`` and ``kind`` are as there."""

    def __init__(self, *args: Any, alpha: float = 0.5, beta: float = 1.0, kind: Kind = "ccel", **kwargs: Any) -> None:
        super().__init__(*args, alpha=alpha, beta=beta, kind=kind, **kwargs)

    def configure_defense(self, *, alpha: float = 0.5, beta: float = 1.0, kind: Kind = "ccel") -> None:
        """Check and take the settings."""
        check_ccl(alpha, beta, kind)
        self._set_defense(alpha=alpha, beta=beta, kind=kind)

    def defense_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Convex-concave loss."""
        return ccl_loss(logits, targets, **self.defense_settings)
