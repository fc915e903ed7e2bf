"""Whether an example's loss and gradient depend on the other examples of its batch, which DP-SGD cannot allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_cwrf.data import isolated_rng
from lightning_cwrf.weights.copies import visiting
from lightning_cwrf.weights.descent import trainable_parameters

_Losses = Callable[[Any], Tensor]
_Found = tuple[Tensor, list[Tensor]]  # losses of some examples, and the gradients of their sum


def check_independent(module: LightningModule, losses_of: _Losses, batch: Any) -> bool:
    """Raise where the losses or gradients of one half of a batch change with the examples of the other half.

    Each half is kept while the other one is overwritten with copies of it, so the batch's size and the random numbers
    of each position stay the same. This is done in the modes that training has, but for dropout, which is off. The
    module's buffers, gradients, modes and the caller's random state are left as they were. A warning says so where the
    step draws random numbers that depend on the examples, so that the check is inconclusive.

    Returns:
        Whether the check was made: a batch of one example shows nothing.
    """
    with isolated_rng(module.device), visiting(module):
        seed = int(torch.randint(2**31, ()))
        size = len(_losses(losses_of, batch, seed))
        if size < 2:
            return False
        with in_eval(layer for layer in module.modules() if isinstance(layer, _DropoutNd)):
            mixed = _mixes(module, losses_of, batch, size, seed)
            if mixed:
                again = [_part(module, losses_of, batch, range(size), s) for s in (seed, seed + 1)]
                unsure = not _alike(*again)
        if mixed and unsure:
            with in_eval(module.modules()):
                unsure = not _mixes(module, losses_of, batch, size, seed)
    if mixed and not unsure:
        raise MisconfigurationException(
            f"an example's loss or gradient in {type(module).__name__} depends on the other examples of its batch: it "
            "changed when they did. DP-SGD clips each example's own gradient, so its ε would be wrong. Look for a mean "
            "or a norm over the batch dimension, attention with the batch in the place of the sequence "
            "(batch_first=True), or a loss that compares examples."
        )
    if mixed:
        rank_zero_warn(
            f"{type(module).__name__} draws random numbers in training mode that depend on the batch, so whether its "
            "examples are independent of one another, as the ε of DP-SGD assumes, could be checked in eval mode alone."
        )
    return True


def _mixes(module: nn.Module, losses_of: _Losses, batch: Any, size: int, seed: int) -> bool:
    half = size // 2
    for kept, copied in (
        (range(half), [*range(half), *(i % half for i in range(half, size))]),
        (range(half, size), [*(half + i % (size - half) for i in range(half)), *range(half, size)]),
    ):
        before = _part(module, losses_of, batch, kept, seed)
        if not _alike(before, _part(module, losses_of, _rows(batch, copied), kept, seed)):
            return True
    return False


def _part(module: nn.Module, losses_of: _Losses, batch: Any, kept: range, seed: int) -> _Found:
    """Losses of the examples ``kept``, and the gradients of their sum."""
    with visiting(module):  # each pass starts from the same buffers
        losses = _losses(losses_of, batch, seed)[kept.start : kept.stop]
        weights = list(trainable_parameters(module).values())
        if not losses.requires_grad:
            return losses, []
        gradients = torch.autograd.grad(losses.sum(), weights, allow_unused=True)
    return losses.detach(), [g for g in gradients if g is not None]


def _losses(losses_of: _Losses, batch: Any, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return losses_of(batch)


def _rows(batch: Any, index: list[int]) -> Any:
    """The batch with these examples instead of its own; a tensor of another length stays."""

    def take(tensor: Tensor) -> Tensor:
        return tensor[index] if tensor.ndim and len(tensor) == len(index) else tensor

    return apply_to_collection(batch, Tensor, take)


def other_rows(batch: Any, size: int) -> Any:
    """The batch of ``size`` examples with copies of its first half in the place of the second."""
    return _rows(batch, [i % max(1, size // 2) for i in range(size)])


def _alike(a: _Found, b: _Found) -> bool:
    """Equal up to rounding: 0.1 % of the largest loss and of the largest gradient; 5 % in lower precision."""
    tolerance = 0.05 if is_low([a[0], *a[1]]) else 1e-3

    def near(x: list[Tensor], y: list[Tensor]) -> bool:
        scale = max((float(t.abs().max()) for t in x if t.numel()), default=0.0)
        gaps = [float((s - t).abs().max()) for s, t in zip(x, y, strict=True) if s.numel()]
        return max(gaps, default=0.0) <= tolerance * scale + 1e-6

    return len(a[1]) == len(b[1]) and near([a[0]], [b[0]]) and near(a[1], b[1])


def is_low(tensors: Iterable[Tensor]) -> bool:
    """Whether the precision is lower than float32."""
    return torch.is_autocast_enabled() or any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)


@contextmanager
def in_eval(layers: Iterable[nn.Module]) -> Iterator[None]:
    changed = [layer for layer in layers if layer.training]
    try:
        for layer in changed:
            layer.training = False
        yield
    finally:
        for layer in changed:
            layer.training = True
