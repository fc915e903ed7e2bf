"""What label-only attacks share: a model of which nothing is seen but labels, and inputs that can be moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_cwrf.attacks.signals import check_finite
from lightning_cwrf.checks import check_number
from lightning_cwrf.classification import classification_step, split_batch
from lightning_cwrf.data import Batches, as_loader, bring_to, isolated_rng
from lightning_cwrf.outputs import evaluating

Labels: TypeAlias = Callable[[Tensor], Tensor]
"""Gives the predicted class of each input: ``(b, ...)`` to integers ``(b,)``."""


@contextmanager
def labels_only(model: Any) -> Iterator[Labels]:
    """A function that gives the labels of inputs and nothing else."""
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise TypeError(f"model must be a module or a function that gives labels, not a {type(model).__name__}.")
        with isolated_rng(), torch.no_grad():
            yield model
        return
    bring = bring_to(model)

    def labels_of(inputs: Tensor) -> Tensor:
        anything = torch.zeros(len(inputs), dtype=torch.long)
        logits, _ = classification_step(model, bring((inputs, anything)))
        return logits.argmax(-1)

    with evaluating(model):
        yield labels_of


def read_inputs(data: Batches) -> tuple[Tensor, Tensor]:
    """Inputs ``(n, ...)`` and targets ``(n,)``, on the CPU."""
    inputs, targets = [], []
    with isolated_rng():
        for batch in as_loader(data, shuffle=False):
            x, y = split_batch(batch)
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
                kind = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise TypeError(f"the inputs must be a float tensor (b, ...), to be moved by small steps, not {kind}.")
            if y.shape != (len(x),):
                raise ValueError(f"{len(x)} inputs need targets of shape ({len(x)},), not {tuple(y.shape)}.")
            classes = y.cpu().long()
            if bool(((classes < 0) | (classes != y.cpu())).any()):
                raise ValueError("the targets must be class indices, integers from 0.")
            check_finite("inputs", x.flatten(1).T)
            inputs.append(x.detach().cpu())
            targets.append(classes)
    if not targets:
        raise ValueError("the data hold no batch.")
    return torch.cat(inputs), torch.cat(targets)


def bounds_of(clip: Any, inputs: Tensor) -> tuple[float, float]:
    """The lowest and the highest value that an input can have: those of ``clip``, checked, or of the data."""
    least, most = float(inputs.min()), float(inputs.max())
    if clip is None:
        return least, most
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"clip must be a pair (lowest, highest), not {clip!r}.")
    low, high = clip
    check_number("the lowest value of clip", low)
    check_number("the highest value of clip", high, low=low, low_open=True)
    if least < low or most > high:
        raise ValueError(f"the inputs are from {least:g} to {most:g}, outside of clip = ({low:g}, {high:g}).")
    return float(low), float(high)
