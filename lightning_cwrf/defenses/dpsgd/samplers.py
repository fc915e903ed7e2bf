"""Per-example gradients and norms of layers for which Opacus' own are inexact in float32, wrong, or missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Sampler = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]


def linear_norms(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The norms of the per-example gradients of a linear layer, shape ``(n,)`` each.

    Opacus sums the products of inputs and of output gradients over all pairs of positions, which cancel: in float32 the
    sum of inputs with a large mean is rounding alone, and a norm of 0 is not clipped. Here the gradients of a few
    examples at a time are formed, which take no more memory than the layer's input and output.
    """
    weight: Any = layer.weight
    bias: Any = layer.bias
    given, found = activations[0], dict[Any, Tensor]()
    if bias is not None and bias.requires_grad:
        found[bias] = backprops.reshape(len(backprops), -1, backprops.shape[-1]).sum(1).norm(2, dim=1)
    if not weight.requires_grad:
        return found
    if backprops.ndim == 2:  # an outer product
        return {weight: given.norm(2, dim=1) * backprops.norm(2, dim=1), **found}
    given, backprops = given.flatten(1, -2), backprops.flatten(1, -2)
    size = max(1, (given.numel() + backprops.numel()) // max(1, weight.numel()))
    parts = zip(torch.split(backprops, size), torch.split(given, size), strict=True)
    norms = [torch.bmm(b.transpose(1, 2), a).flatten(1).norm(2, dim=1) for b, a in parts]
    return {weight: torch.cat(norms), **found}


def layer_norm_gradients(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """As Opacus', and also without a bias."""
    found: dict[Any, Tensor] = {}
    shape: Any = layer.normalized_shape
    over = tuple(range(1, backprops.ndim - len(shape)))
    if layer.weight.requires_grad:
        scaled = F.layer_norm(activations[0], shape, eps=layer.eps) * backprops  # type: ignore[arg-type]
        found[layer.weight] = scaled.sum(over) if over else scaled
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = backprops.sum(over) if over else backprops
    return found


def without_padding(sample: Sampler) -> Sampler:
    """``sample`` of an embedding whose ``padding_idx`` gets no gradient, as in autograd; Opacus gives it one."""

    def sampler(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        if layer.padding_idx is not None:
            padding = torch.eq(activations[0], torch.as_tensor(layer.padding_idx, device=backprops.device))
            backprops = backprops.masked_fill(padding.unsqueeze(-1), 0)
        return sample(layer, activations, backprops)

    return sampler


def gradient_samplers(known: dict[type[nn.Module], Sampler]) -> dict[type[nn.Module], Sampler]:
    """Opacus' samplers of gradients, and those of this module in the place of some."""
    embedding = known[nn.Embedding]
    return {**known, nn.LayerNorm: layer_norm_gradients, nn.Embedding: without_padding(embedding)}


def norm_samplers(known: dict[type[nn.Module], Sampler]) -> dict[type[nn.Module], Sampler]:
    """Opacus' samplers of norms, and those of this module in the place of some."""
    return {**known, nn.Linear: linear_norms, nn.Embedding: without_padding(known[nn.Embedding])}
