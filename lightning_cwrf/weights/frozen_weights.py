"""The masked weights of one parameter: their positions and the values they are held at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Frozen:
    """Flat positions in a parameter, and the values to hold there."""

    index: Tensor
    value: Tensor

    def mask(self, parameter: Tensor) -> Tensor:
        """The positions as a mask of the parameter's shape, for layouts without a flat view."""
        flat = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
        return flat.index_fill_(0, self.index, True).view(parameter.shape)

    def like(self, tensor: Tensor) -> Frozen:
        """A copy on the device and in the precision of ``tensor``."""
        return Frozen(self.index.to(tensor.device), self.value.to(tensor.device, tensor.dtype))

    def follow(self, tensor: Tensor) -> None:
        """Move to the device and precision of ``tensor``."""
        if self.index.device != tensor.device or self.value.dtype != tensor.dtype:
            there = self.like(tensor)
            self.index, self.value = there.index, there.value

    def moved(self, tensor: Tensor) -> Tensor:
        """The number of values in ``tensor`` that differ in any bit from those held, as a tensor on its device."""
        return (_bits(tensor.detach().take(self.index)) != _bits(self.value)).sum()

    def write(self, tensor: Tensor) -> None:
        """Write the held values into ``tensor``, in place."""
        if tensor.is_contiguous():
            tensor.view(-1).scatter_(0, self.index, self.value)
        else:
            tensor[self.mask(tensor)] = self.value

    def clear_gradient(self, parameter: Tensor) -> None:
        """Set the gradients of the masked weights to zero, in place."""
        gradient = parameter.grad
        if gradient is None:
            return
        if gradient.is_sparse:
            gradient = parameter.grad = gradient.coalesce()
            rows = self.mask(parameter)[tuple(gradient.indices())]
            gradient.values().masked_fill_(rows, 0)
        elif gradient.is_contiguous():
            gradient.view(-1).index_fill_(0, self.index, 0)
        else:
            gradient.masked_fill_(self.mask(parameter), 0)


def _bits(values: Tensor) -> Tensor:
    """Floats as integers, so that NaN equals itself."""
    values = torch.view_as_real(values) if values.is_complex() else values
    return values.view(_INTEGERS[values.element_size()])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
