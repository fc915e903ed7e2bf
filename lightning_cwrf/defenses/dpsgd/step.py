"""What DP-SGD does between the backward pass and the optimizer: Opacus' parts, in the order of Lightning's loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_cwrf.data.poisson import PoissonBatches
from lightning_cwrf.defenses.dpsgd.ledger import Ledger
from lightning_cwrf.weights.masks import WeightMask


@cache
def _hooks_class(ghost: bool) -> Any:
    """Opacus' hooks, listening at the layers' outputs.

    Opacus takes the outputs' gradients by hooks on the layers, whose outputs autograd then forbids to overwrite: an
    in-place ReLU, or ``out += identity`` in a residual block, would be an error.
    """
    from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
    from opacus.grad_sample.functorch import prepare_layer
    from opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN

    class Hooks(GradSampleHooksFastGradientClipping if ghost else GradSampleHooks):  # type: ignore[misc]
        def add_hooks(self, *, loss_reduction: str = "mean", batch_first: bool = True, **_: Any) -> None:
            def take(layer: nn.Module, gradient: Tensor) -> None:
                self.capture_backprops_hook(layer, None, (gradient,), loss_reduction, batch_first)

            def listen(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                first = output if isinstance(output, Tensor) else output[0]
                if self.hooks_enabled and layer.training and first.requires_grad:
                    first.register_hook(partial(take, layer))

            handles: list[Any] = []
            self.autograd_grad_sample_hooks = handles
            for layer in self.iterate_submodules(self._module):
                if type(layer) in (DPRNN, DPLSTM, DPGRU):  # their inner layers have the hooks
                    continue
                if type(layer) not in self.GRAD_SAMPLERS:
                    prepare_layer(layer, batch_first=batch_first)
                handles.append(layer.register_forward_hook(self.capture_activations_hook))
                handles.append(layer.register_forward_hook(listen))

    return Hooks


class PrivateStep:
    """Turns the backward passes of a logical batch into one noisy gradient; ``frozen`` weights are left out of it."""

    def __init__(
        self,
        module: LightningModule,
        ledger: Ledger,
        batches: PoissonBatches,
        *,
        max_grad_norm: float,
        ghost: bool,
        frozen: WeightMask | None,
    ) -> None:
        from opacus.optimizers import get_optimizer_class

        trainer = module.trainer
        self.module, self.ledger, self.batches = module, ledger, batches
        self.losses: Tensor | None = None
        self.ghost = ghost
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
        optimizer_class = get_optimizer_class(
            clipping="flat", distributed=self.distributed, grad_sample_mode="ghost" if self.ghost else "hooks"
        )
        self.optimizer = optimizer_class(
            optimizer=trainer.optimizers[0],
            noise_multiplier=ledger.noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
            generator=self.noise,
        )
        clipping = {"max_grad_norm": max_grad_norm, "use_ghost_clipping": frozen is None or frozen.count == 0}
        self.hooks = _hooks_class(ghost)(module, **(clipping if ghost else {}))
        self._wrap_samplers({} if frozen is None else {name: mask for name, mask in frozen.masks.items() if mask.any()})
        self.hooks.disable_hooks()

    def _wrap_samplers(self, masks: Mapping[str, Tensor]) -> None:
        """Have per-example gradients taken in the parameters' precision, and masked where weights are frozen."""
        from opacus.grad_sample.functorch import ft_compute_per_sample_gradient

        frozen = {}
        for name, mask in masks.items():
            parameter = self.module.get_parameter(name)
            frozen[parameter] = mask.to(parameter.device)

        def wrapped(sample: Callable[..., dict[nn.Parameter, Tensor]]) -> Callable[..., dict[nn.Parameter, Tensor]]:
            def sampler(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
                dtype = next(layer.parameters()).dtype
                activations = [a.to(dtype) if a.is_floating_point() else a for a in activations]
                gradients = sample(layer, activations, backprops.to(dtype))
                return {p: g.masked_fill(frozen[p], 0) if p in frozen else g for p, g in gradients.items()}

            return sampler

        known = type(self.hooks).GRAD_SAMPLERS
        layers = {type(layer) for layer in self.module.modules()}
        self.hooks.GRAD_SAMPLERS = {kind: wrapped(known.get(kind, ft_compute_per_sample_gradient)) for kind in layers}
        if self.ghost:
            norms = type(self.hooks).NORM_SAMPLERS
            self.hooks.NORM_SAMPLERS = {kind: wrapped(norms[kind]) for kind in layers if kind in norms}

    def watch(self) -> None:
        """Record what the coming forward pass needs."""
        self.hooks.enable_hooks()

    def backward(self, plain: Callable[..., None]) -> None:
        """Clip the gradients of the examples of one physical batch, and add them to the logical batch's sum.

        ``plain(loss, **arguments)`` runs a backward pass.
        """
        self.arrived += 1
        if self.losses is None:
            return
        losses, self.losses = self.losses, None
        plain(losses.mean(), retain_graph=self.ghost)
        self.hooks.disable_hooks()
        self._check_samples(len(losses))
        if self.ghost:  # the first pass gave norms; the second one gives the sum of the clipped gradients
            self._clear()
            plain((self.hooks.get_clipping_coef().to(losses.device) * losses).sum())
            self.optimizer.accumulate()
        else:
            self.optimizer.clip_and_accumulate()
        self._clear()

    def _clear(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def _check_samples(self, examples: int) -> None:
        """Raise unless every trained parameter has one gradient for each example."""
        trained = [(n, p) for n, p in self.module.named_parameters() if hasattr(p, "summed_grad") and p.requires_grad]
        idle = [name for name, p in trained if (p.grad if self.ghost else p.grad_sample) is None]  # type: ignore[attr-defined]
        if idle:
            raise MisconfigurationException(
                f"the loss does not depend on {', '.join(idle)}, so DP-SGD has no gradient of any example for it; use "
                "it, or leave it out of the optimizer."
            )
        for name, p in trained:
            found = len(p._norm_sample if self.ghost else p.grad_sample)  # type: ignore[attr-defined]
            if found != examples:
                raise MisconfigurationException(
                    f"{name} has {found} gradients for {examples} examples: its layer takes inputs whose first "
                    "dimension is not the batch, as position embeddings often do. Freeze it before the fit "
                    f"(module.get_parameter({name!r}).requires_grad_(False)), or keep the batch first, and do not "
                    "merge it with other dimensions."
                )

    def privatize(self) -> None:
        """Make the noisy mean gradient of the logical batch the gradient of the step, and account for it."""
        if self.arrived != self.batches.parts:
            raise MisconfigurationException(
                f"a step came after {self.arrived} of the {self.batches.parts} physical batches of its logical batch; "
                "resume from a checkpoint that was saved after a whole step."
            )
        self.arrived = 0
        parameters = self.optimizer.params
        for p in parameters:
            if p.summed_grad is None:  # no example was drawn
                p.summed_grad = torch.zeros_like(p)
        if self.ledger.noise_multiplier:
            self.optimizer.add_noise()
        else:
            for p in parameters:
                p.grad = p.summed_grad
        if self.distributed:
            self.optimizer.reduce_gradients()
        for p in parameters:
            p.grad /= self.batches.expected_size
            p.summed_grad = None
        self.ledger.accountant.step(noise_multiplier=self.ledger.noise_multiplier, sample_rate=self.batches.sample_rate)

    def remove(self) -> None:
        """Remove the hooks, and what Opacus left on the parameters."""
        self.hooks.remove_hooks()
        for parameter in self.module.parameters():
            for name in ("grad_sample", "summed_grad", "_forward_counter", "_norm_sample", "_current_grad_sample"):
                if hasattr(parameter, name):
                    delattr(parameter, name)


def is_empty(batch: Any) -> bool:
    """Whether no example was drawn: no tensor of the batch has one (a single tensor may be empty for other reasons)."""
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.append(len(tensor)) if tensor.ndim else None)
    return bool(sizes) and not any(sizes)
