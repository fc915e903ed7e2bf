"""What label-only attacks share: a model of which nothing is seen but labels, and inputs that can be moved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_cwrf.attacks.signals import check_finite
from lightning_cwrf.checks import check_number
from lightning_cwrf.classification import classification_step, split_batch
from lightning_cwrf.data import Batches, as_loader, bring_to, check_side, isolated_rng
from lightning_cwrf.data.sampling import batch_size_of
from lightning_cwrf.outputs import evaluating

Labels: TypeAlias = Callable[[Tensor], Any]
"""Gives the predicted class of each input: ``(b, ...)`` to integers ``(b,)``, a tensor, NumPy array or list."""


class Asked(NamedTuple):
    """The audited examples.

    Attributes:
        inputs: floats ``(n, ...)``, on the CPU.
        targets: int64 ``(n,)``.
        batch: size of the data's batches.
    """

    inputs: Tensor
    targets: Tensor
    batch: int


@contextmanager
def labels_only(model: Any, data: Asked, classes: int | None = None) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that gives the labels of inputs and nothing else, int64 ``(m,)``, in batches of the data's size.

    Args:
        model: a module or a function.
        data: the audited examples: a module must have their classes.
        classes: number of classes, where it is known.
    """
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise TypeError(f"model must be a module or a function that gives labels, not a {type(model).__name__}.")
        with isolated_rng(), torch.no_grad():
            yield _in_batches(lambda inputs: checked_labels(model(inputs), len(inputs), classes), data.batch)
        return
    bring = bring_to(model)

    def labels_of(inputs: Tensor) -> Tensor:
        anything = torch.zeros(len(inputs), dtype=torch.long)
        logits, _ = classification_step(model, bring((inputs, anything)))
        check_classes(data.targets, logits.shape[1], "the model")
        if classes not in (None, logits.shape[1]):
            raise ValueError(f"the model has {logits.shape[1]} classes and the surrogates have {classes}.")
        return logits.argmax(-1).cpu()

    with evaluating(model):
        yield _in_batches(labels_of, data.batch)


def _in_batches(labels_of: Callable[[Tensor], Tensor], batch: int) -> Callable[[Tensor], Tensor]:
    """A model is asked about one input at least."""

    def all_labels(inputs: Tensor) -> Tensor:
        found = [labels_of(some) for some in torch.split(inputs, batch)] if len(inputs) else []
        return torch.cat(found) if found else torch.empty(0, dtype=torch.long)

    return all_labels


def checked_labels(labels: Any, n: int, classes: int | None) -> Tensor:
    """What a function gave for ``n`` inputs, as int64 ``(n,)``.

    >>> checked_labels([2, 0], 2, classes=3)
    tensor([2, 0])
    >>> checked_labels(torch.tensor([0.9, 0.2]), 2, classes=3)
    Traceback (most recent call last):
    TypeError: the labels of 2 inputs must be integers (2,), not torch.float32 of shape (2,).
    """
    found, kind = None, f"a {type(labels).__name__}"
    if isinstance(labels, Tensor):
        kind = f"{labels.dtype} of shape {tuple(labels.shape)}"
        if not (labels.is_floating_point() or labels.is_complex()) and labels.shape == (n,):
            found = labels.detach().cpu().long()
    elif isinstance(labels, np.ndarray):
        kind = f"an array of {labels.dtype} of shape {labels.shape}"
        if labels.dtype.kind in "iub" and labels.shape == (n,):
            found = torch.from_numpy(labels.astype(np.int64))
    elif isinstance(labels, (list, tuple)):
        kind = f"a {type(labels).__name__} of {len(labels)}"
        strange = next((each for each in labels if not isinstance(each, Integral)), None)
        if strange is not None:
            kind += f" with a {type(strange).__name__}"
        elif len(labels) == n:
            found = torch.tensor([int(each) for each in labels])
    if found is None:
        raise TypeError(f"the labels of {n} inputs must be integers ({n},), not {kind}.")
    if n and (int(found.min()) < 0 or (classes is not None and int(found.max()) >= classes)):
        wrong = int(found.min()) if int(found.min()) < 0 else int(found.max())
        known = "" if classes is None else f"; with the surrogates' {classes} classes, to {classes - 1}"
        raise ValueError(
            f"the label {wrong} is out of range: labels must be coded as the targets are, from 0 on{known}. Convert "
            "them in the function."
        )
    return found


def check_classes(targets: Tensor, classes: int, who: str) -> None:
    """Raise a ValueError unless the targets are classes of ``who``."""
    highest = int(targets.max())
    if highest >= classes:
        raise ValueError(
            f"the target {highest} is out of range: {who} has {classes} classes, targets go from 0 to {classes - 1}."
        )


def warn_of_coding(right: Tensor, targets: Tensor) -> None:
    """Warn where the model's labels ``right``, bool ``(n,)``, are no better than one label for all examples."""
    most, correct, n = int(torch.bincount(targets).max()), int(right.sum()), len(targets)
    if correct <= most and (most < n or correct == 0):
        warnings.warn(
            f"the model's labels are right for {correct} of {n} examples, and the most frequent class alone would be "
            f"for {most}: it has learned nothing, or its labels are coded otherwise than the targets (from 1, in "
            "another order). In the second case the scores mean nothing: convert the labels or the targets.",
            stacklevel=3,
        )


def read_inputs(data: Batches) -> Asked:
    """The audited examples, checked to read the same each time."""
    check_side(data, "data", None)
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
    if not sum(map(len, targets)):
        raise ValueError("the data hold no batch.")
    size = batch_size_of(data) if isinstance(data, DataLoader) else 256 if isinstance(data, Dataset) else None
    return Asked(torch.cat(inputs), torch.cat(targets), max(size or 1, *map(len, targets)))


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
