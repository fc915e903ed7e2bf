"""The gates of a network's ReLUs: smooth ones for an attack, and those that are open on given examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

RELUS = {F.relu, torch.relu, Tensor.relu, F.relu_, torch.relu_, Tensor.relu_}
_RELU_IN_PLACE = {F.relu_, torch.relu_, Tensor.relu_}


class _SoftReLU(torch.autograd.Function):
    """ReLU whose derivative is ``σ(αh)`` instead of ``1[h > 0]``, and can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, sharpness: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.sharpness = sharpness
        return h.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (h,) = ctx.saved_tensors
        return gradients[0] * torch.sigmoid(ctx.sharpness * h), None


class soft_gates(TorchFunctionMode):
    """Inside, every ReLU has the derivative ``σ(αh)``; its output is unchanged.

    The gradients of a ReLU network by its weights are piecewise constant in the gates, so that without this the
    residual tells an attack nothing about the inputs at which a gate opens. It replaces ``nn.ReLU``, ``F.relu``,
    ``torch.relu`` and ``Tensor.relu``, also in place.

    Args:
        sharpness: α, per unit of h.

    Attributes:
        calls: how many ReLUs were replaced.

    >>> h = torch.zeros(1, requires_grad=True)
    >>> with soft_gates(30.0):
    ...     y = torch.relu(h)
    >>> torch.autograd.grad(y, h)
    (tensor([0.5000]),)
    """

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in RELUS:
            return func(*args, **kwargs)
        self.calls += 1
        given = [*args, *kwargs.values()]
        h = given[0]
        if func in _RELU_IN_PLACE or given[1:] == [True]:
            return h.copy_(_SoftReLU.apply(h.clone(), self.sharpness))
        return _SoftReLU.apply(h, self.sharpness)


class FirstReLU(TorchFunctionMode):
    """Notes which units of the first ReLU are open, bool ``(n, ...)``."""

    gates: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.gates is None and func in RELUS:
            self.gates = [*args, *kwargs.values()][0] > 0
        return func(*args, **kwargs)
