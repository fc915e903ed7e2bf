"""Ghost clipping in one backward pass: the layers' inputs and output gradients are kept, and summed once scaled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_cwrf.defenses.dpsgd.clipping import Clipping
from lightning_cwrf.defenses.dpsgd.hooks import check_samples
from lightning_cwrf.defenses.dpsgd.samplers import gradient_samplers, linear_norms

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (
    nn.Linear,
    *_CONVOLUTIONS,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


def other_layers(module: nn.Module) -> list[str]:
    """The layers with trained weights whose sums cannot be taken from their inputs and output gradients alone."""
    found, seen = [], set[nn.Parameter]()
    for name, layer in module.named_modules():
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        shared = any(p in seen for p in own)
        seen.update(own)
        if own and (type(layer) not in _LAYERS or getattr(layer, "padding_mode", "zeros") != "zeros" or shared):
            found.append(f"{name or type(module).__name__} ({type(layer).__name__}{', shared' * shared})")
    return found


class _Use:
    """One use of a layer in a forward pass: its input and the gradient at its output."""

    def __init__(self, layer: nn.Module, given: Tensor, version: int, backprops: Tensor) -> None:
        if given._version != version:
            raise MisconfigurationException(
                f"the input of a {type(layer).__name__} was overwritten after the layer had used it; make the "
                "operation that does so out of place."
            )
        dtype = next(layer.parameters(recurse=False)).dtype
        self.layer, self.input, self.backprops = layer, given.to(dtype), backprops.to(dtype)
        if isinstance(layer, nn.Linear) and given.ndim > 3:
            self.input, self.backprops = self.input.flatten(1, -2), self.backprops.flatten(1, -2)

    @property
    def numel(self) -> int:
        return self.input.numel() + self.backprops.numel()


class KeptBackprops:
    """Sums of scaled gradients from one backward pass (the book-keeping of Bu et al. 2023, arXiv:2210.00038).

    The pass gives the gradients at the layers' outputs alone. Norms follow from these and the layers' inputs; then each
    layer's sum is its ordinary weight gradient, with the scaled gradients at its output. Per-example gradients that are
    smaller than a layer's input and output are kept instead.
    """

    def __init__(self, module: nn.Module, names: Mapping[nn.Parameter, str], masks: Mapping[nn.Parameter, Tensor]):
        from opacus.grad_sample import GradSampleHooksFastGradientClipping as Opacus

        self.names, self.masks = names, masks
        self.samplers = gradient_samplers(Opacus.GRAD_SAMPLERS)
        self.watching = False
        self.calls: list[tuple[nn.Module, Tensor, int, GradientEdge]] = []
        trained = [layer for layer in module.modules() if any(p in names for p in layer.parameters(recurse=False))]
        self.handles = [layer.register_forward_hook(self._record) for layer in trained]

    def watch(self) -> None:
        """Record what the coming forward pass needs."""
        self.watching, self.calls = True, []

    def _record(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self.watching and layer.training and torch.is_grad_enabled() and output.requires_grad:
            given = inputs[0].detach()
            self.calls.append((layer, given, given._version, get_gradient_edge(output)))

    def sums(self, losses: Tensor, plain: Callable[..., None], clipping: Clipping) -> list[Tensor]:
        """The sum of the scaled gradients of the examples, for each parameter."""
        self.watching, calls = False, self.calls
        self.calls = []
        found = torch.autograd.grad(losses.sum(), [edge for *_, edge in calls], allow_unused=True)
        uses: dict[nn.Module, list[_Use]] = {}
        for (layer, given, version, _), backprops in zip(calls, found, strict=True):
            if backprops is not None:
                uses.setdefault(layer, []).append(_Use(layer, given, version, backprops))
        norms: dict[nn.Parameter, Tensor] = {}
        kept: dict[nn.Parameter, Tensor] = {}
        for layer, of_layer in uses.items():
            self._measure(layer, of_layer, norms, kept)
        checked = check_samples(self.names.values(), [norms.get(p) for p in self.names], len(losses))
        factors = dict(zip(self.names, clipping.factors(torch.stack(checked)), strict=True))
        total = {p: torch.einsum("i,i...", factors[p], sample) for p, sample in kept.items()}
        for layer, of_layer in uses.items():
            own = [p for p in layer.parameters(recurse=False) if p in factors and p not in kept]
            for use in of_layer if own else []:
                for p, g in _weighted(use, own, factors[own[0]]).items():
                    g = g.masked_fill(self.masks[p], 0) if p in self.masks else g
                    total[p] = total[p] + g if p in total else g
        return [total[p] for p in self.names]

    def _measure(
        self, layer: nn.Module, uses: list[_Use], norms: dict[nn.Parameter, Tensor], kept: dict[nn.Parameter, Tensor]
    ) -> None:
        """Put the norms of a layer's per-example gradients into ``norms``, and small gradients into ``kept``."""
        own = [p for p in layer.parameters(recurse=False) if p in self.names]
        if len(uses) == 1 and not any(p in self.masks for p in own) and _is_wide(uses[0]):
            norms.update(linear_norms(layer, [uses[0].input], uses[0].backprops))
            return
        samples: dict[nn.Parameter, Tensor] = {}
        for use in uses:
            for p, g in self.samplers[type(layer)](layer, [use.input], use.backprops).items():
                samples[p] = samples[p] + g if p in samples else g
        for p in own:
            g = samples[p].masked_fill(self.masks[p], 0) if p in self.masks else samples[p]
            norms[p] = g.reshape(len(g), -1).norm(2, dim=1)
            if g.numel() <= sum(use.numel for use in uses):
                kept[p] = g

    def clear(self) -> None:
        """Drop what a step has left; the pass leaves nothing on the parameters."""
        self.calls = []

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def _is_wide(use: _Use) -> bool:
    """Whether the per-example gradients of a linear layer are larger than its input and output."""
    layer = use.layer
    return isinstance(layer, nn.Linear) and layer.weight.numel() * len(use.input) > use.numel


def _weighted(use: _Use, own: list[nn.Parameter], factors: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradients of a layer's own parameters, from the gradients at its output times each example's factor."""
    layer: Any = use.layer
    weighted = use.backprops * factors.view(-1, *[1] * (use.backprops.ndim - 1))
    if isinstance(layer, nn.Linear):
        flat = weighted.flatten(0, -2)
        return {p: flat.T @ use.input.flatten(0, -2) if p is layer.weight else flat.sum(0) for p in own}
    if isinstance(layer, _CONVOLUTIONS) and not isinstance(layer.padding, str):
        shape = [layer.out_channels] if layer.bias is not None else None
        _, weight, bias = torch.ops.aten.convolution_backward(
            weighted, use.input, layer.weight.detach(), shape, layer.stride, layer.padding, layer.dilation, False,
            [0] * len(layer.stride), layer.groups, [False, True, shape is not None],
        )  # fmt: skip
        return {p: weight if p is layer.weight else bias for p in own}
    with torch.enable_grad():  # forward itself: the hooks of the user have acted already
        return dict(zip(own, torch.autograd.grad(layer.forward(use.input), own, weighted), strict=True))
