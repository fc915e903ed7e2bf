"""The one place that turns a batch into inputs and targets, and a model's output into logits.

Scoring, defenses and audits all go through :func:`classification_step`. A module whose step is unusual (several
inputs, auxiliary outputs) defines a method ``classification_step(batch) -> (logits, targets)``, which then takes the
place of everything in this file but the checks.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_cwrf.targets import NOT_BINARY, as_classes, wrong_targets

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
_OVERRIDE = "define classification_step(batch) -> (logits, targets) on your module"


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Split a batch into ``(inputs, targets)``.

    Args:
        batch: a pair ``(inputs, targets)``, or a mapping that holds the targets under one of ``labels``, ``label``,
            ``targets``, ``target``, ``y`` and the inputs under its other keys.

    Returns:
        The inputs (a single tensor, or a dict where the mapping has several other keys) and the targets.

    Raises:
        TypeError: the batch has another form.

    >>> inputs, targets = split_batch({"pixels": torch.zeros(2, 3), "labels": torch.tensor([0, 1])})
    >>> inputs.shape, targets
    (torch.Size([2, 3]), tensor([0, 1]))
    """
    if isinstance(batch, Mapping):
        found = [key for key in TARGET_KEYS if key in batch]
        if len(found) != 1:
            raise TypeError(
                f"a dict batch needs exactly one of the target keys {TARGET_KEYS}, this one has the keys "
                f"{sorted(map(str, batch))}; rename one, or {_OVERRIDE}."
            )
        inputs = {key: value for key, value in batch.items() if key != found[0]}
        return (next(iter(inputs.values())) if len(inputs) == 1 else inputs), batch[found[0]]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    form = f"a {type(batch).__name__} of length {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch)
    raise TypeError(f"a batch must be (inputs, targets) or a dict with targets, not {form}; {_OVERRIDE}.")


def extract_logits(output: Any) -> Tensor:
    """Take the logits out of a model's output: a tensor, an object or dict with ``logits``, or a tuple led by them.

    >>> extract_logits({"logits": torch.zeros(2, 3), "hidden": None}).shape
    torch.Size([2, 3])
    """
    output = output.get("logits", output) if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(output, tuple) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"cannot find logits in a model output of type {type(output).__name__}; {_OVERRIDE}.")
    return output


def check_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """``targets`` as int64, which torch's losses want; any integer dtype is taken.

    Raises:
        ValueError: ``logits`` are not finite ``(n, K)``, or ``targets`` are not n class indices below K.

    >>> check_targets(torch.zeros(2, 3), torch.tensor([0, 2], dtype=torch.int32))
    tensor([0, 2])
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a floating-point tensor of shape (n, K) with K >= 2 classes, "
            f"not {logits.dtype} of shape {tuple(logits.shape)}; {_OVERRIDE}."
        )
    checks = _CHECKS.get()
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.ndim != 1:
        raise ValueError(wrong_targets(targets, logits.shape[1], readable=checks is not None))
    if len(logits) != len(targets):
        raise ValueError(f"{len(logits)} rows of logits do not fit {len(targets)} targets.")
    return targets.long() if checks is None else checks.take(logits, targets.long())


class ValueChecks:
    """Checks the values that pass through :func:`check_targets`, at once."""

    def take(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Raise a ValueError for a label out of range or logits that are not finite; return the targets."""
        classes = logits.shape[1]
        wrong = (targets < 0) | (targets >= classes)
        if wrong.any():
            if (targets == NOT_BINARY).any():
                raise ValueError(
                    "a model with one output for each example is a binary classifier, whose targets are 0 and 1; some "
                    "of these are neither. Regression is not supported; of more classes, return a logit for each."
                )
            raise ValueError(
                f"label {int(targets[wrong][0])} is out of range: the model has {classes} classes, labels go from 0 to "
                f"{classes - 1}."
            )
        bad = ~torch.isfinite(logits.detach()).all(dim=1)
        if bad.any():
            rows = bad.nonzero().flatten().tolist()
            raise ValueError(
                f"the logits of {len(rows)} examples are NaN or infinite (rows {rows[:5]} of this batch); "
                "the model has diverged, or its inputs are not finite."
            )
        return targets


class DeferredChecks(ValueChecks):
    """Notes what there is to check; :meth:`passed` then asks the device once, instead of twice for each call."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The targets, those out of range moved into it: on a GPU a loss would end the process with them."""
        if any(logits is known and targets is clamped for known, _, clamped in self._seen):
            return targets  # a loss function, after classification_step
        clamped = targets.clamp(0, logits.shape[1] - 1)
        self._seen.append((logits, targets, clamped))
        return clamped

    def fine(self) -> Tensor:
        """Whether all labels and logits so far are valid, as a tensor on their device."""
        fine = [torch.isfinite(logits.detach()).all() & (y == clamped).all() for logits, y, clamped in self._seen]
        return torch.stack(fine).all()

    def error(self) -> ValueError | None:
        """The error of :func:`check_targets` about the first labels or logits that are wrong."""
        for logits, targets, _ in self._seen:
            try:
                super().take(logits, targets)
            except ValueError as error:
                return error
        return None

    def passed(self, loss: Tensor) -> bool:
        """Whether ``loss`` is finite.

        Raises:
            ValueError: labels or logits were wrong, as :func:`check_targets` says it.
        """
        finite = torch.isfinite(loss.detach())
        if finite & self.fine() if self._seen else finite:
            return True
        error = self.error()
        if error is not None:
            raise error
        return False


_CHECKS: ContextVar[ValueChecks | None] = ContextVar("checks", default=ValueChecks())  # noqa: B039


@contextmanager
def _checked_by(checks: ValueChecks | None) -> Iterator[None]:
    token = _CHECKS.set(checks)
    try:
        yield
    finally:
        _CHECKS.reset(token)


def checked_at_once() -> AbstractContextManager[None]:
    """Let :func:`check_targets` raise at once, also inside :func:`deferred_checks`."""
    return _checked_by(ValueChecks())


def values_are_fine() -> Tensor | bool:
    """Whether what :func:`deferred_checks` has seen so far is valid, without a host synchronisation."""
    checks = _CHECKS.get()
    return checks.fine() if isinstance(checks, DeferredChecks) else True


def shapes_only() -> AbstractContextManager[None]:
    """Let :func:`check_targets` look at shapes alone: under ``torch.func.vmap`` no value can be read."""
    return _checked_by(None)


@contextmanager
def deferred_checks() -> Iterator[DeferredChecks]:
    """Put off the value checks of :func:`check_targets` until ``passed``: one host synchronisation for a whole step.

    >>> with deferred_checks() as checks:
    ...     targets = check_targets(torch.zeros(2, 3), torch.tensor([0, 7]))
    ...     checks.passed(torch.zeros(()))
    Traceback (most recent call last):
    ValueError: label 7 is out of range: the model has 3 classes, labels go from 0 to 2.
    """
    checks = DeferredChecks()
    with _checked_by(checks):
        yield checks


def check_no_probabilities(logits: Tensor, name: str, *, fix: str | None = None) -> None:
    """Raise a ValueError where every row of ``logits`` is a probability distribution; warn where all are within [0, 1].

    The latter is what a sigmoid gives. Logits can be so by chance, before the training above all, so it is no error,
    except for one logit per example that goes from below 0.25 to above 0.75 and is negative for none of many. ``fix``
    is what to do, for the message; None: in a module.
    """
    values = logits.detach().float()
    if values.numel() == 0 or values.min() < 0 or values.max() > 1 + 1e-3:
        return
    sums = values.sum(-1)
    if torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ValueError(
            f"the model's outputs on {name} are probabilities (every row sums to 1): "
            + (fix or f"return logits, from before the softmax; or {_OVERRIDE}, with the logarithm of them.")
        )
    if values.numel() < _ENOUGH or values.min() == values.max():
        return
    fix = fix or f"return logits, from before the sigmoid; or {_OVERRIDE}, with torch.logit of them."
    z = values[:, 1]
    if values.shape[1] == 2 and not values[:, 0].any() and len(z) >= _ENOUGH and z.min() < 0.25 and z.max() > 0.75:
        raise ValueError(
            f"the model has one output for each example, and all {len(z)} on {name} lie between 0 and 1, from "
            f"{float(z.min()):.3f} to {float(z.max()):.3f}: they are probabilities; {fix}"
        )
    of = f"all of the model's outputs on {name} lie between 0 and 1, as those of a sigmoid do"
    warnings.warn(f"{of}, and are taken as logits: {fix}", stacklevel=2)


_ENOUGH = 60
"""Outputs that are not within [0, 1] by chance alone."""


def classification_step(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Run ``module`` on ``batch`` and return checked ``(logits, targets)`` of shapes ``(n, K)`` and ``(n,)``.

    A method ``classification_step(batch)`` of the module is used where there is one; else the batch is taken apart by
    :func:`split_batch`, dict inputs are passed as keyword arguments, and :func:`extract_logits` reads the output. One
    logit for each example is a binary classifier's (:func:`~lightning_cwrf.targets.as_classes`): K is 2.

    Raises:
        TypeError: the batch or the output has an unknown form.
        ValueError: logits or targets that no classifier has (see :func:`check_targets`).

    >>> logits, targets = classification_step(nn.Linear(4, 3), (torch.zeros(2, 4), torch.tensor([0, 2])))
    >>> logits.shape, targets
    (torch.Size([2, 3]), tensor([0, 2]))
    """
    own = getattr(module, "classification_step", None)
    if own is not None:
        logits, targets = own(batch)
    else:
        inputs, targets = split_batch(batch)
        logits = extract_logits(_forward(module, inputs))
    if isinstance(targets, np.ndarray):
        targets = torch.from_numpy(targets)
    logits, targets = as_classes(logits, targets)
    return logits, check_targets(logits, targets)


def _forward(module: nn.Module, inputs: Any) -> Any:
    try:
        return module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    except (RuntimeError, TypeError) as error:
        why = _mismatch(module, inputs)
        if why is None:
            raise
        raise TypeError(f"the model cannot take these inputs: {why} ({error})") from error


def _mismatch(module: nn.Module, inputs: Any) -> str | None:
    """Why a call may have failed: inputs that ``forward`` does not take, or of another type than the weights."""
    named, placed = (inputs, ()) if isinstance(inputs, Mapping) else ({}, (inputs,))
    try:
        inspect.signature(module.forward).bind(*placed, **named)
    except TypeError as error:
        return (
            f"its forward has other arguments ({error}). Logits must not depend on the targets, so give an argument "
            f"such as labels a default; leave entries that it does not take out of the batch; or {_OVERRIDE}."
        )
    if isinstance(inputs, (list, tuple)):
        return f"they are a {type(inputs).__name__} of {len(inputs)}; {_OVERRIDE}."
    for value in inputs.values() if isinstance(inputs, Mapping) else [inputs]:
        if isinstance(value, np.ndarray):
            return "they are NumPy arrays; pass tensors (torch.from_numpy, or a TensorDataset in a DataLoader)."
        if isinstance(value, Tensor) and value.is_floating_point():
            weight = next((p for p in module.parameters() if p.is_floating_point()), value)
            if weight.dtype != value.dtype:
                return (
                    f"they are {value.dtype} and the weights {weight.dtype}; convert the data, or the model (x.float() "
                    'for 32-bit weights; Trainer(precision="bf16-true") converts batches to a bfloat16 model).'
                )
    return None
