"""PAST, privacy-aware sparsity tuning (Hu et al. 2024): an ℓ1 penalty that is heavier on privacy-sensitive weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from lightning_cwrf.checks import check_number
from lightning_cwrf.classification import classification_step
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.composition import base_loss, check_on
from lightning_cwrf.defenses.nonmembers import AgainstNonmembers, NonmemberState
from lightning_cwrf.defenses.registry import register_defense
from lightning_cwrf.defenses.settings import Defense
from lightning_cwrf.weights.descent import trainable_parameters
from lightning_cwrf.weights.masks import WeightMask

_RESCALING = (
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.Adafactor,
    optim.Rprop,
)


def past_weights(
    gap_gradients: Mapping[str, Tensor], *, alpha: float, frozen: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """γ_i^α for every weight, with ``γ_i = |M(i)| · |∇_i G| / Σ_{j∈M(i)} |∇_j G|`` and M(i) the weight's own module.

    M(i) holds the live weights alone, so γ is 1 on average over them in each module; a frozen weight cannot be tuned
    and has the weight 0. Where a module's gradients are all zero, γ is 1.

    Args:
        gap_gradients: ∇G by parameter name; the module is what comes before the last dot.
        alpha: α ≥ 0; 0 makes every weight 1, so that the penalty is plain ℓ1.
        frozen: bool masks by parameter name, True where a weight is frozen; a parameter without one is live.

    >>> past_weights({"a.weight": torch.tensor([3.0, -1.0])}, alpha=1.0)
    {'a.weight': tensor([1.5000, 0.5000])}
    >>> gap = {"a.weight": torch.tensor([3.0, -1.0, 8.0])}
    >>> past_weights(gap, alpha=1.0, frozen={"a.weight": torch.tensor([False, False, True])})
    {'a.weight': tensor([1.5000, 0.5000, 0.0000])}
    """
    check_number("alpha", alpha, low=0)
    held = frozen or {}
    modules: dict[str, list[str]] = {}
    for name in gap_gradients:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    weights = {}
    for names in modules.values():
        sizes = {
            n: gap_gradients[n].abs().masked_fill(held[n], 0) if n in held else gap_gradients[n].abs() for n in names
        }
        live = sum(sizes[n].numel() - (held[n].count_nonzero() if n in held else 0) for n in names)
        # A module of frozen weights alone has the mean 0/0, which is not above 0.
        mean = torch.stack([size.sum() for size in sizes.values()]).sum() / live
        for name, size in sizes.items():
            weights[name] = torch.where(mean > 0, size / mean, 1.0).pow_(alpha)
            if name in held:
                weights[name].masked_fill_(held[name], 0)
    return {name: weights[name] for name in gap_gradients}


def past_penalty(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, lam: float) -> Tensor:
    """``λ · Σ_i γ_i^α · |θ_i|``, with the weights of :func:`past_weights` (Hu et al. 2024).

    >>> past_penalty({"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([1.5, 0.5])}, lam=2.0)
    tensor(5.)
    """
    check_number("lam", lam, low=0)
    return lam * torch.stack([(weights[name] * p.abs()).sum() for name, p in parameters.items()]).sum()


@register_defense("past")
@dataclass(frozen=True, kw_only=True)
class PAST(AgainstNonmembers):
    """Settings of :class:`PASTMixin`.

    Args:
        nonmembers: a loader or a dataset the model is not trained on.
        lam: λ ≥ 0. Published: 1e-3 (CIFAR-10), 1e-4 (CIFAR-100), 1e-5 (others).
        alpha: α ≥ 0. Published: 2.5 alone, 1.5 on top of another defense.
        on: the defense whose loss the penalty is added to; None: cross-entropy.
    """

    title = "PAST"
    strengths = tuple({"lam": lam} for lam in (1e-5, 1e-4, 1e-3))
    lam: float = 1e-3
    alpha: float = 2.5
    on: Defense | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lam", self.lam, low=0)
        check_number("alpha", self.alpha, low=0)
        check_on(self)


class PASTState(NonmemberState):
    """The non-member batches, and the weights that CWRF froze."""

    def __init__(self, module: LightningModule, defense: Any) -> None:
        super().__init__(module, defense)
        self.frozen: Mapping[str, Tensor] | None = None


class PASTMixin(DefenseMixin, settings=PAST):
    """Trains a LightningModule with mean ℓ plus :func:`past_penalty`; for a model that has converged.

    The generalisation gap is ``G = |mean ℓ(members) − mean ℓ(non-members)|`` on this step's member and non-member
    batches, with ℓ the cross-entropy. γ is detached. A step costs the two forwards and backwards that G needs, and no
    third: the gradient of the members' loss, which γ needs, is used again for the update. On top of another defense
    (``PAST(..., on=RelaxLoss(alpha=1.0))``) that defense's loss takes the place of mean ℓ, at a third backward.

    The paper leaves two things open. Weights that CWRF froze count neither in M(i) nor in the penalty: they cannot be
    tuned, and would take their share of γ from those that can. The non-member batch runs in the member batch's mode
    (its own batch statistics under BatchNorm, so that G compares like with like), but does not move the running
    statistics of torch's norm layers: these describe the members alone, and are updated once a step.
    """

    state_class = PASTState
    more_than_loss = "it takes the gradients of two losses within a step, and batches of non-members"

    def defense_step(self, batch: Any) -> tuple[Tensor, int]:
        """PAST's loss of a member batch and the next non-member batch."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "PAST takes gradients of its own, which 16-mixed precision would let underflow; use bf16-mixed or 32."
            )
        settings, state = self.defense, self.defense_state
        parameters = trainable_parameters(self)
        weights = list(parameters.values())
        logits, targets = classification_step(self, batch)
        member_loss = F.cross_entropy(logits, targets)
        member_gradients = torch.autograd.grad(
            member_loss, weights, retain_graph=settings.on is not None, materialize_grads=True
        )
        with running_statistics_kept(self):
            other_loss = F.cross_entropy(*state.nonmembers.step(self, batch))
        other_gradients = torch.autograd.grad(other_loss, weights, materialize_grads=True)
        # |∇G| does not depend on the sign of the gap.
        gap = {n: a - b for n, a, b in zip(parameters, member_gradients, other_gradients, strict=True)}
        gamma = past_weights(gap, alpha=settings.alpha, frozen=state.frozen)
        penalty = past_penalty(parameters, gamma, lam=settings.lam)
        if settings.on is not None:
            return base_loss(self, logits, targets) + penalty, len(targets)
        # Linear in θ around its present value, with the members' gradient as slope: the same value and the same
        # gradient as the loss, without a second backward through the network.
        slope = torch.stack([((p - p.detach()) * g).sum() for p, g in zip(weights, member_gradients, strict=True)])
        return member_loss.detach() + slope.sum() + penalty, len(targets)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.defense_state.frozen = None  # of an earlier fit: GradientMaskCallback calls on_weights_frozen again

    def on_train_start(self) -> None:
        super().on_train_start()
        names = {type(each).__name__ for each in self.trainer.optimizers if isinstance(each, _RESCALING)}
        if names and self.defense.alpha > 0 and self.defense.lam > 0:
            rank_zero_warn(
                f"PAST with {' and '.join(sorted(names))}, which divides every gradient by its own recent size, and so "
                "works against the weights of PAST's penalty: in our studies alpha=2.5 leaked more than alpha=0 with "
                "Adam, and less with SGD (docs/defenses/past.md). The paper's is SGD with momentum 0.9, from 0.01."
            )

    def on_weights_frozen(self, mask: WeightMask) -> None:
        """Leave the frozen weights out of M(i) and of the penalty."""
        frozen = {name: frozen.to(self.get_parameter(name).device) for name, frozen in mask.masks.items()}
        self.defense_state.frozen = frozen


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Norm layers in training mode normalise by the batch as usual, and do not update their running statistics.

    >>> layer = nn.BatchNorm1d(2)
    >>> with running_statistics_kept(layer):
    ...     out = layer(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    >>> out.mean(0), layer.running_mean, layer.num_batches_tracked
    (tensor([0., 0.], grad_fn=<MeanBackward1>), tensor([0., 0.]), tensor(0))
    """
    # A layer in eval mode (a frozen backbone) normalises by its running statistics, and must continue to.
    norms = [layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.training]
    tracking = [(layer, layer.momentum) for layer in norms if layer.track_running_stats]
    try:
        for layer, _ in tracking:
            layer.track_running_stats = False
            layer.momentum = 0.0  # InstanceNorm moves its statistics all the same
        yield
    finally:
        for layer, momentum in tracking:
            layer.track_running_stats = True
            layer.momentum = momentum
