"""PAST, privacy-aware sparsity tuning (Hu et al. 2024): an ℓ1 penalty that is heavier on privacy-sensitive weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

from lightning_cwrf.classification import classification_step
from lightning_cwrf.data import Batches
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.nonmembers import NonmemberBatches
from lightning_cwrf.scores import trainable_parameters


def past_weights(gap_gradients: Mapping[str, Tensor], *, alpha: float) -> dict[str, Tensor]:
    """γ_i^α for every weight, with ``γ_i = |M(i)| · |∇_i G| / Σ_{j∈M(i)} |∇_j G|`` and M(i) the weight's own module.

    γ is 1 on average in each module. A module whose gradients are all zero tells no weight from another: γ is 1 there.

    Args:
        gap_gradients: ∇G by parameter name; the module is what comes before the last dot.
        alpha: α ≥ 0; 0 makes every weight 1, so that the penalty is plain ℓ1.

    >>> past_weights({"a.weight": torch.tensor([3.0, -1.0])}, alpha=1.0)
    {'a.weight': tensor([1.5000, 0.5000])}
    """
    modules: dict[str, list[str]] = {}
    for name in gap_gradients:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    weights = {}
    for names in modules.values():
        count = sum(gap_gradients[name].numel() for name in names)
        mean = torch.stack([gap_gradients[name].abs().sum() for name in names]).sum() / count
        for name in names:
            gamma = gap_gradients[name].abs() / mean
            weights[name] = torch.where(mean > 0, gamma, 1.0).pow_(alpha)
    return {name: weights[name] for name in gap_gradients}


def past_penalty(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, lam: float) -> Tensor:
    """``λ · Σ_i γ_i^α · |θ_i|``, with the weights of :func:`past_weights` (Hu et al. 2024).

    >>> past_penalty({"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([1.5, 0.5])}, lam=2.0)
    tensor(5.)
    """
    return lam * torch.stack([(weights[name] * p.abs()).sum() for name, p in parameters.items()]).sum()


def check_past(lam: float, alpha: float) -> None:
    """Raise a ValueError unless λ and α are finite and not negative."""
    for name, value in (("lam", lam), ("alpha", alpha)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, not {value}.")


class PASTMixin(DefenseMixin):
    """Trains a LightningModule with mean ℓ plus :func:`past_penalty`; for a model that has converged.

    The generalisation gap is ``G = |mean ℓ(members) − mean ℓ(non-members)|`` on this step's member and non-member
    batches. γ is detached. A step costs the two forwards and backwards that G needs, and no third: the gradient of the
    members' loss, which γ needs, is used again for the update.

    Args:
        nonmembers: a loader or a dataset the model is not trained on.
        lam: λ. Published: 1e-3 (CIFAR-10), 1e-4 (CIFAR-100), 1e-5 (others).
        alpha: α. Published: 2.5 alone, 1.5 on top of another defense.
    """

    def __init__(
        self, *args: Any, nonmembers: Batches | None = None, lam: float = 1e-3, alpha: float = 2.5, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.configure_defense(nonmembers=nonmembers, lam=lam, alpha=alpha)

    def configure_defense(self, *, nonmembers: Batches | None = None, lam: float = 1e-3, alpha: float = 2.5) -> None:
        """Check and take the settings."""
        check_past(lam, alpha)
        self._nonmembers = NonmemberBatches(nonmembers, "PAST")
        self._set_defense(lam=lam, alpha=alpha)

    def defense_step(self, batch: Any) -> tuple[Tensor, int]:
        """PAST's loss of a member batch and the next non-member batch."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "PAST takes gradients of its own, which 16-mixed precision would let underflow; use bf16-mixed or 32."
            )
        parameters = trainable_parameters(self)
        weights = list(parameters.values())
        logits, targets = classification_step(self, batch)
        member_loss = F.cross_entropy(logits, targets)
        member_gradients = torch.autograd.grad(member_loss, weights, materialize_grads=True)
        other_loss = F.cross_entropy(*self._nonmembers.step(self, batch))
        other_gradients = torch.autograd.grad(other_loss, weights, materialize_grads=True)
        # The sign of the gap falls out of |∇G|.
        gap = {n: a - b for n, a, b in zip(parameters, member_gradients, other_gradients, strict=True)}
        penalty = past_penalty(
            parameters, past_weights(gap, alpha=self.defense_settings["alpha"]), lam=self.defense_settings["lam"]
        )
        # Linear in θ around its present value, with the members' gradient as slope: the same value and the same
        # gradient as the loss, without a second backward through the network.
        slope = torch.stack([((p - p.detach()) * g).sum() for p, g in zip(weights, member_gradients, strict=True)])
        return member_loss.detach() + slope.sum() + penalty, len(targets)
