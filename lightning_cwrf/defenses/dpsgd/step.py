"""What DP-SGD does between the backward pass and the optimizer: Opacus' parts, in the order of Lightning's loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_cwrf.data.poisson import PoissonBatches
from lightning_cwrf.defenses.dpsgd.clipping import make_clipping
from lightning_cwrf.defenses.dpsgd.firstbatch import check_gradients, check_state
from lightning_cwrf.defenses.dpsgd.ghost import KeptBackprops, other_layers
from lightning_cwrf.defenses.dpsgd.hooks import ReweightedLoss, SampledGradients
from lightning_cwrf.defenses.dpsgd.independence import check_independent
from lightning_cwrf.defenses.dpsgd.ledger import Ledger
from lightning_cwrf.defenses.dpsgd.settings import DPSGD
from lightning_cwrf.weights.masks import WeightMask


class PrivateStep:
    """Turns the backward passes of a logical batch into one noisy gradient; ``frozen`` weights are left out of it.

    ``noise_multiplier`` gives σ of the coming step.
    """

    def __init__(
        self,
        module: LightningModule,
        ledger: Ledger,
        batches: PoissonBatches,
        settings: DPSGD,
        *,
        noise_multiplier: Callable[[], float],
        frozen: WeightMask | None,
    ) -> None:
        from opacus.optimizers import get_optimizer_class

        trainer = module.trainer
        self.module, self.ledger, self.batches = module, ledger, batches
        self.noise_multiplier = noise_multiplier
        self.losses: Tensor | None = None
        self.distributed = trainer.world_size > 1
        self.arrived = 0
        self.independent = False  # whether a batch has shown that its examples do not depend on one another
        if ledger.sampling_seed is None:
            ledger.sampling_seed = int(trainer.strategy.broadcast(int(torch.randint(2**62, ()))))
        self.batches.seed = ledger.sampling_seed
        self.noise = torch.Generator(module.device)
        if ledger.noise_state is None:
            self.noise.manual_seed(int(torch.randint(2**62, ())))
        else:
            self.noise.set_state(ledger.noise_state)
        # Opacus adds the noise; sensitivity and multiplier are the clipping's, anew for each step.
        self.optimizer = get_optimizer_class(clipping="flat", distributed=self.distributed, grad_sample_mode="hooks")(
            optimizer=trainer.optimizers[0],
            noise_multiplier=ledger.noise_multiplier,
            max_grad_norm=settings.max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
            generator=self.noise,
        )
        named = {p: name for name, p in module.named_parameters()}
        names = {p: named[p] for p in self.optimizer.params}
        held = {} if frozen is None else {module.get_parameter(name): mask for name, mask in frozen.masks.items()}
        masks = {p: mask.to(p.device) for p, mask in held.items() if p in names and mask.any()}
        self.clipping = make_clipping(
            settings,
            ledger,
            [name.rpartition(".")[0] for name in names.values()],
            [p in masks and bool(masks[p].all()) for p in names],
            batches.expected_size,
        )
        self.gradients = _gradients(module, names, masks, settings)
        self.names, self.masks = names, masks

    def check(self, losses_of: Callable[[Any], Tensor], batch: Any) -> None:
        """Raise where the first batch of a fit shows that ε would not hold; without two examples it shows nothing."""
        module = self.module
        if not self.independent:
            check_state(module, losses_of, batch)
            if check_independent(module, losses_of, batch):
                check_gradients(module, self.gradients, self.names, self.masks, losses_of, batch)
                self.independent = True

    def watch(self) -> None:
        """Record what the coming forward pass needs."""
        self.gradients.watch()

    def backward(self, plain: Callable[..., None]) -> None:
        """Clip the gradients of the examples of one physical batch, and add them to the logical batch's sum.

        ``plain(loss, **arguments)`` runs a backward pass.
        """
        self.arrived += 1
        if self.losses is None:
            return
        losses, self.losses = self.losses, None
        sums = self.gradients.sums(losses, plain, self.clipping)
        with torch.no_grad():
            for p, found in zip(self.optimizer.params, sums, strict=True):
                p.summed_grad = found.detach() if p.summed_grad is None else p.summed_grad + found
        self.gradients.clear()

    def privatize(self) -> None:
        """Make the noisy mean gradient of the logical batch the gradient of the step, and account for it."""
        if self.arrived != self.batches.parts:
            raise MisconfigurationException(
                f"a step came after {self.arrived} of the {self.batches.parts} physical batches of its logical batch; "
                "resume from a checkpoint that was saved after a whole step."
            )
        self.arrived = 0
        noise = self.noise_multiplier()
        parameters = self.optimizer.params
        for p in parameters:
            if p.summed_grad is None:  # no example was drawn
                p.summed_grad = torch.zeros_like(p)
        if noise:
            self.optimizer.noise_multiplier = self.clipping.gradient_noise(noise)
            self.optimizer.max_grad_norm = self.clipping.sensitivity
            self.optimizer.add_noise()
        else:
            for p in parameters:
                p.grad = p.summed_grad
        if self.distributed:
            self.optimizer.reduce_gradients()
        for p in parameters:
            p.grad /= self.batches.expected_size
            p.summed_grad = None
        self.clipping.end_step(noise, self.noise, self.distributed)
        self.ledger.record(noise, self.batches.sample_rate)

    def remove(self) -> None:
        """Remove the hooks, and what Opacus left on the parameters."""
        self.gradients.remove()
        for p in self.optimizer.params:
            del p.summed_grad


def _gradients(
    module: LightningModule, names: dict[nn.Parameter, str], masks: dict[nn.Parameter, Tensor], settings: DPSGD
) -> SampledGradients | KeptBackprops:
    """What sums the scaled gradients of a physical batch's examples."""
    if not settings.ghost:
        return SampledGradients(module, names, masks)
    others = other_layers(module)
    if not others:
        return KeptBackprops(module, names, masks)
    if settings.clipping == "per_layer":
        raise MisconfigurationException(
            f"ghost clipping weighs the loss of an example as a whole where a model has {', '.join(others)}, so it "
            'cannot clip layer by layer; leave out ghost=True or clipping="per_layer".'
        )
    return ReweightedLoss(module, names, masks)


def is_empty(batch: Any) -> bool:
    """Whether no example was drawn: no tensor of the batch has one (a single tensor may be empty for other reasons)."""
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.append(len(tensor)) if tensor.ndim else None)
    return bool(sizes) and not any(sizes)
