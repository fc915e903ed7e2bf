"""Targets as class indices, and the one logit of a binary classifier as two classes."""

from __future__ import annotations

import torch
from torch import Tensor

NOT_BINARY = -(2**60)
"""Stands for a target of a binary classifier that is neither 0 nor 1, until values are checked."""


def class_indices(targets: Tensor) -> Tensor:
    """Class indices ``(n,)`` from ``(n, 1)``, and from bools or floats that are all 0 or 1; other targets as they are.

    >>> class_indices(torch.tensor([[0.0], [1.0]])), class_indices(torch.tensor([0.5]))
    (tensor([0, 1]), tensor([0.5000]))
    """
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    binary = targets.dtype == torch.bool or (targets.is_floating_point() and bool(_binary(targets).all()))
    return targets.long() if binary else targets


def as_classes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of classes and their indices, where a model is a binary classifier with one logit z for each example.

    Its logits, ``(n,)`` or ``(n, 1)``, become ``(n, 2)``: 0 and z. Softmax and cross-entropy of these are sigmoid and
    binary cross-entropy of z. Its targets may be integers, floats or bools; what is neither 0 nor 1 becomes
    :data:`NOT_BINARY`. Other logits and targets are returned as they are, but for targets ``(n, 1)``.

    >>> as_classes(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.0]))
    (tensor([[ 0.,  1.],
            [ 0., -2.]]), tensor([1, 0]))
    """
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if not logits.is_floating_point() or logits.ndim > 2 or (logits.ndim == 2 and logits.shape[1] != 1):
        return logits, targets
    if targets.ndim == 1:
        targets = torch.where(_binary(targets), targets.long(), NOT_BINARY)
    return two_classes(logits), targets


def two_classes(logits: Tensor) -> Tensor:
    """Logits 0 and z of two classes from one logit z for each example; other logits as they are."""
    if logits.ndim == 2 and logits.shape[1] != 1:
        return logits
    z = logits.reshape(-1)
    return torch.stack([torch.zeros_like(z), z], dim=-1)


def _binary(targets: Tensor) -> Tensor:
    return (targets == 0) | (targets == 1)


def wrong_targets(targets: Tensor, classes: int, *, readable: bool) -> str:
    """What is wrong with targets that are no class indices, for a message.

    Args:
        targets: of any shape and dtype.
        classes: how many the model has.
        readable: whether values can be read, which ``torch.func.vmap`` does not allow.
    """
    what = f"targets must be class indices of shape (n,), not {targets.dtype} of shape {tuple(targets.shape)}"
    if targets.ndim == 2 and targets.shape[1] == classes:
        rows = targets.detach().double()
        if readable and bool((rows >= 0).all()) and torch.allclose(rows.sum(1), torch.ones_like(rows[:, 0]), atol=1e-3):
            return f"{what}; turn one-hot or probability targets into indices with .argmax(-1)."
        if readable and bool(_binary(rows).all()):
            return f"{what}: these are the targets of multi-label classification, which is not supported. {ONE_LABEL}"
    if targets.is_floating_point():
        return (
            f"{what}: regression is not supported. If these are the indices of classes, convert them with .long(); "
            "turn one-hot or probability targets into indices with .argmax(-1)."
        )
    return f"{what}; turn one-hot or probability targets into indices with .argmax(-1)."


ONE_LABEL = (
    "To harden and audit a model for one of its labels, define classification_step(batch) -> (logits, targets) that "
    "returns the logits and targets of that label alone, (n,) each."
)
