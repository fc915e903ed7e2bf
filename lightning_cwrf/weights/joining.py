"""Two batches in one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.classification import classification_step, split_batch


class TwoBatches:
    """Runs two batches through a model, in one forward pass where that gives the same outputs.

    After one forward pass, autograd computes each weight's gradient once. After two, the gradients of one pass are kept
    in memory, as large as the weights, until those of the other are added. The first call tries whether a model gives
    the same outputs for both batches together.

    Args:
        join: whether to try. A model in train mode depends on what is in a batch.
    """

    def __init__(self, *, join: bool = True) -> None:
        self._can_join: bool | None = None if join else False

    def __call__(self, model: nn.Module, first: Any, second: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The first batch's logits and targets, and the second one's logits."""
        joined = join(model, first, second) if self._can_join is not False else None
        if joined is not None and self._can_join is None:
            self._can_join = _same_outputs(model, joined, first, second)
        if joined is not None and self._can_join:
            logits, targets = classification_step(model, joined)
            size = len(split_batch(first)[1])
            return logits[:size], targets[:size], logits[size:]
        logits, targets = classification_step(model, first)
        return logits, targets, classification_step(model, second)[0]


def join(model: nn.Module, *batches: Any) -> tuple[Tensor, Tensor] | None:
    """The batches as one; None where they are not pairs of dense tensors that fit, or the module has its own step.

    >>> x, y = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    >>> inputs, targets = join(nn.Linear(4, 3), (x, y), (x, y))
    >>> inputs.shape, targets.shape
    (torch.Size([4, 4]), torch.Size([4]))
    """
    if hasattr(model, "classification_step"):
        return None
    pairs = [split_batch(batch) for batch in batches]
    for parts in zip(*pairs, strict=True):
        if not all(isinstance(part, Tensor) and part.ndim > 0 and part.layout == torch.strided for part in parts):
            return None
        if len({(part.dtype, part.device, part.shape[1:]) for part in parts}) > 1:
            return None
    if any(len(inputs) != len(targets) for inputs, targets in pairs):
        return None
    inputs, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return inputs, targets


@torch.no_grad()
def _same_outputs(model: nn.Module, joined: Any, first: Any, second: Any) -> bool:
    apart = torch.cat([classification_step(model, batch)[0] for batch in (first, second)])
    try:
        together = classification_step(model, joined)[0]
    except Exception:  # a model may take batches of one size only
        return False
    return bool(torch.allclose(together, apart, rtol=1e-3, atol=1e-4 * float(apart.abs().max())))
