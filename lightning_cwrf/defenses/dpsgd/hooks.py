"""Sums of scaled per-example gradients, by Opacus' hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cwrf.defenses.dpsgd.clipping import Clipping
from lightning_cwrf.defenses.dpsgd.samplers import Sampler, gradient_samplers, norm_samplers


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


def masked_sampler(sample: Sampler, masks: Mapping[nn.Parameter, Tensor]) -> Sampler:
    """``sample`` in the parameters' precision, with the gradients of frozen weights masked."""

    def sampler(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        dtype = next(layer.parameters()).dtype
        activations = [a.to(dtype) if a.is_floating_point() else a for a in activations]
        gradients = sample(layer, activations, backprops.to(dtype))
        return {p: g.masked_fill(masks[p], 0) if p in masks else g for p, g in gradients.items()}

    return sampler


class SampledGradients:
    """The gradients of all examples of a physical batch, in memory at once."""

    ghost = False

    def __init__(self, module: nn.Module, names: Mapping[nn.Parameter, str], masks: Mapping[nn.Parameter, Tensor]):
        from opacus.grad_sample.functorch import ft_compute_per_sample_gradient

        self.module, self.names = module, names
        kind = _hooks_class(self.ghost)
        self.hooks = kind(module, **({"use_ghost_clipping": not masks} if self.ghost else {}))
        layers = {type(layer) for layer in module.modules()}
        samplers = gradient_samplers(kind.GRAD_SAMPLERS)
        known = {layer: samplers.get(layer, ft_compute_per_sample_gradient) for layer in layers}
        self.hooks.GRAD_SAMPLERS = {layer: masked_sampler(sample, masks) for layer, sample in known.items()}
        if self.ghost:
            norms = {layer: of for layer, of in norm_samplers(kind.NORM_SAMPLERS).items() if layer in layers}
            self.hooks.NORM_SAMPLERS = {layer: masked_sampler(sample, masks) for layer, sample in norms.items()}
        self.hooks.disable_hooks()

    def watch(self) -> None:
        """Record what the coming forward pass needs."""
        self.hooks.enable_hooks()

    def sums(self, losses: Tensor, plain: Callable[..., None], clipping: Clipping) -> list[Tensor]:
        """The sum of the scaled gradients of the examples, for each parameter.

        ``plain(loss, **arguments)`` runs a backward pass.
        """
        samples = self._sampled(losses, plain)
        norms = torch.stack([g.reshape(len(g), -1).norm(2, dim=1) for g in samples])
        return [torch.einsum("i,i...", f, g) for f, g in zip(clipping.factors(norms), samples, strict=True)]

    def _sampled(self, losses: Tensor, plain: Callable[..., None]) -> list[Tensor]:
        """What the hooks leave on each parameter in a backward pass: gradients of examples, or their norms."""
        plain(losses.mean(), retain_graph=self.ghost)
        self.hooks.disable_hooks()
        attribute = "_norm_sample" if self.ghost else "grad_sample"
        samples = [None if p.grad is None else getattr(p, attribute, None) for p in self.names]
        return check_samples(self.names.values(), samples, len(losses))

    def clear(self) -> None:
        """Drop what a backward pass left on the parameters."""
        for parameter in self.module.parameters():
            parameter.grad = parameter.grad_sample = parameter._norm_sample = None  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Remove the hooks, and what Opacus left on the parameters."""
        self.hooks.remove_hooks()
        for parameter in self.module.parameters():
            for name in ("grad_sample", "_forward_counter", "_norm_sample", "_current_grad_sample"):
                if hasattr(parameter, name):
                    delattr(parameter, name)


class ReweightedLoss(SampledGradients):
    """Ghost clipping in two backward passes: the first gives norms, the second the sum, of a loss weighted by them."""

    ghost = True

    def sums(self, losses: Tensor, plain: Callable[..., None], clipping: Clipping) -> list[Tensor]:
        factors = clipping.factors(torch.stack(self._sampled(losses, plain)))[0]
        self.clear()
        plain((factors.to(losses.device) * losses).sum())
        return [p.grad for p in self.names]  # type: ignore[misc]


def check_samples(names: Any, samples: Sequence[Tensor | None], examples: int) -> list[Tensor]:
    """Raise unless every trained parameter has one gradient, or one norm, for each example."""
    idle = [name for name, sample in zip(names, samples, strict=True) if sample is None]
    if idle:
        raise MisconfigurationException(
            f"the loss does not depend on {', '.join(idle)}, or not in a way that DP-SGD sees, so it has no gradient "
            "of any example for it. Use it in its own layer, in training mode, outside of checkpointing, and with no "
            "in-place operation after nn.InstanceNorm; or leave it out of the optimizer."
        )
    found = [sample for sample in samples if sample is not None]
    for name, sample in zip(names, found, strict=True):
        if len(sample) != examples:
            raise MisconfigurationException(
                f"{name} has {len(sample)} gradients for {examples} examples: its layer takes inputs whose first "
                "dimension is not the batch, as position embeddings often do. Freeze it before the fit "
                f"(module.get_parameter({name!r}).requires_grad_(False)), or keep the batch first, and do not "
                "merge it with other dimensions."
            )
    return found
