"""Mixup+MMD (Li, Li & Ribeiro 2021): mixed inputs, and predictions on members that look like those on non-members."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_cwrf.checks import check_number
from lightning_cwrf.classification import TARGET_KEYS, check_targets, classification_step
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.nonmembers import AgainstNonmembers, NonmemberState
from lightning_cwrf.defenses.registry import register_defense
from lightning_cwrf.outputs import evaluating


def mmd2(a: Tensor, b: Tensor, *, bandwidth: float = 1.0) -> Tensor:
    """The squared maximum mean discrepancy of two samples under a Gaussian kernel, biased estimate, at least 0.

    ``mean k(a, a') + mean k(b, b') − 2 mean k(a, b)`` with ``k(x, y) = exp(−|x − y|² / (2 · bandwidth²))``.

    Args:
        a: shape ``(n, d)``.
        b: shape ``(m, d)``.
        bandwidth: of the kernel, positive.

    >>> mmd2(torch.zeros(2, 1), torch.ones(3, 1))  # 2 - 2 exp(-1/2)
    tensor(0.7869)
    """
    check_number("bandwidth", bandwidth, low=0, low_open=True)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"mmd2 needs two samples (n, d) and (m, d), not {tuple(a.shape)} and {tuple(b.shape)}.")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squared = (x[:, None] - y[None]).square().sum(-1)
        return torch.exp(-squared / (2 * bandwidth**2)).mean()

    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


def mixup_loss(logits: Tensor, targets: Tensor, others: Tensor, weight: float) -> Tensor:
    """``w · ℓ(targets) + (1 − w) · ℓ(others)``: the loss of inputs mixed as ``w · x + (1 − w) · x_others``.

    Args:
        logits: of the mixed inputs, shape ``(n, K)``.
        targets: class indices ``(n,)`` of the first inputs.
        others: class indices ``(n,)`` of the others.
        weight: w in [0, 1].

    >>> mixup_loss(torch.tensor([[0.0, 100.0]]), torch.tensor([0]), torch.tensor([1]), 0.25)
    tensor(25.)
    """
    check_number("weight", weight, low=0, high=1)
    targets, others = check_targets(logits, targets), check_targets(logits, others)
    return weight * F.cross_entropy(logits, targets) + (1 - weight) * F.cross_entropy(logits, others)


def mix_batch(batch: Any, order: Tensor, weight: float) -> Any:
    """The batch with every input ``w · x + (1 − w) · x[order]``; targets stay.

    >>> mix_batch((torch.tensor([[0.0], [4.0]]), torch.tensor([0, 1])), torch.tensor([1, 0]), 0.75)[0]
    tensor([[1.],
            [3.]])
    """

    def mixed(x: Any) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"Mixup mixes floating-point inputs, not {kind}; use another defense for such data.")
        return weight * x + (1 - weight) * x[order]

    if isinstance(batch, Mapping):
        return {key: value if key in TARGET_KEYS else mixed(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return mixed(batch[0]), batch[1]
    raise TypeError(f"Mixup needs batches (inputs, targets) or dicts with targets, not {type(batch).__name__}.")


@register_defense("mixup_mmd")
@dataclass(frozen=True, kw_only=True)
class MixupMMD(AgainstNonmembers):
    """Settings of :class:`MixupMMDMixin`.

    Args:
        nonmembers: a dataset (or a loader of one) the model is not trained on, with every class of the members in it.
        mixup_alpha: a of the Beta distribution; 1: uniform weights.
        lam: λ ≥ 0, the weight of the discrepancy.
        bandwidth: of the Gaussian kernel.
    """

    title = "Mixup+MMD"
    mixup_alpha: float = 1.0
    lam: float = 3.0
    bandwidth: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("mixup_alpha", self.mixup_alpha, low=0, low_open=True)
        check_number("bandwidth", self.bandwidth, low=0, low_open=True)
        check_number("lam", self.lam, low=0)


class MixupMMDMixin(DefenseMixin, settings=MixupMMD):
    """Trains a LightningModule with :func:`mixup_loss` plus λ times :func:`mmd2` of member and non-member predictions.

    The weight of the mixture is drawn from Beta(a, a) for each batch. The discrepancy is that of the softmax outputs on
    the batch, unmixed, and on non-members of the same classes, one for each member, which are taken as constants. Li et
    al. alternate an epoch of each; here every step has both. The two passes that the discrepancy compares run in eval
    mode, so BatchNorm's running statistics are those of the mixed member batches alone.
    """

    state_class = NonmemberState
    more_than_loss = "it draws non-members by the classes of each batch"

    def defense_step(self, batch: Any) -> tuple[Tensor, int]:
        """The loss of the mixed batch and of its distance to as many non-members of the same classes."""
        settings, nonmembers = self.defense, self.defense_state.nonmembers
        generator = nonmembers.generator(self)
        # In eval mode, as the model is attacked: in training mode dropout and batch statistics would separate the two.
        with evaluating(self):
            with torch.enable_grad():
                logits, targets = classification_step(self, batch)
            others, _ = classification_step(self, nonmembers.like(self, batch, targets))
        order = torch.randperm(len(targets), generator=generator).to(targets.device)
        weight = _beta(settings.mixup_alpha, generator)
        mixed, _ = classification_step(self, mix_batch(batch, order, weight))
        discrepancy = mmd2(logits.float().softmax(-1), others.float().softmax(-1), bandwidth=settings.bandwidth)
        return mixup_loss(mixed, targets, targets[order], weight) + settings.lam * discrepancy, len(targets)


def _beta(alpha: float, generator: torch.Generator) -> float:
    """A draw of Beta(α, α), from two Gamma(α) draws."""
    concentration = torch.full((2,), alpha, dtype=torch.float64)
    x, y = torch._standard_gamma(concentration, generator=generator).tolist()
    return x / (x + y) if x + y > 0 else 0.5
