"""Outputs of several models, whose signals are computed model by model and only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Signal: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


class PerModel:
    """Outputs of k models, ``(k, ..., n, K)``. They are never copied as a whole: signals are taken model by model.

    Args:
        outputs: of the models on a pool, ``(k, ..., pool, K)``.
        columns: the position of each of the n examples in the pool. None: the examples are the pool.

    >>> outputs = PerModel(torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]), torch.tensor([1]))
    >>> outputs.signal(lambda logits, targets: logits.sum(-1), torch.tensor([0]))
    tensor([[8.]])
    """

    def __init__(self, outputs: Tensor, columns: Tensor | None = None) -> None:
        if columns is not None and torch.equal(columns, torch.arange(outputs.shape[-2], device=columns.device)):
            columns = None
        self._outputs, self._columns = outputs, columns
        self._whole: PerModel | None = None
        self._rows: Tensor | None = None
        self._signals: dict[Signal, tuple[Tensor, Tensor, int]] = {}

    def __len__(self) -> int:
        return len(self._outputs) if self._rows is None else len(self._rows)

    def __getitem__(self, rows: Tensor) -> PerModel:
        """The models of these rows. Their signals are read from those of all models, which are computed once."""
        drawn = PerModel(self._outputs, self._columns)
        drawn._whole = self if self._whole is None else self._whole
        drawn._rows = rows if self._rows is None else self._rows[rows]
        return drawn

    @property
    def device(self) -> torch.device:
        return self._outputs.device

    def tensor(self) -> Tensor:
        """All outputs, ``(k, ..., n, K)``: a copy, unless they are those of all models on the whole pool."""
        return self._examples(self._outputs if self._rows is None else self._outputs[self._rows])

    def signal(self, signal: Signal, targets: Tensor) -> Tensor:
        """``signal(logits, targets)`` of every model, ``(k, ..., n)``. Cached: do not write into it."""
        if self._whole is not None and self._rows is not None:
            return self._whole.signal(signal, targets)[self._rows]
        if signal not in self._signals or self._signals[signal][0] is not targets:
            first = signal(self._examples(self._outputs[0]), targets)
            values = first.new_empty(len(self._outputs), *first.shape)  # stacking would hold all of them twice
            values[0] = first
            for i in range(1, len(values)):
                values[i] = signal(self._examples(self._outputs[i]), targets)
            self._signals[signal] = (targets, values, version_of(values))
        return self._signals[signal][1]

    def writes(self) -> dict[str, int]:
        """How often the outputs were written to in place, and each cached signal, by name."""
        whole = self if self._whole is None else self._whole
        signals = {
            f"'s {getattr(signal, '__name__', 'signal')}": version_of(values) - before
            for signal, (_, values, before) in whole._signals.items()
        }
        return {"": version_of(self._outputs), **signals}

    def _examples(self, outputs: Tensor) -> Tensor:
        return outputs if self._columns is None else outputs.index_select(-2, self._columns.to(self.device))


class _PerModelField:
    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, evidence: Any, owner: type | None = None) -> Any:
        if evidence is None:
            return None  # the field's default
        value = vars(evidence)[self._name]
        return value.tensor() if isinstance(value, PerModel) else value

    def __set__(self, evidence: Any, value: Any) -> None:
        vars(evidence)[self._name] = PerModel(value) if isinstance(value, Tensor) else value


def per_model_field() -> Any:
    """A dataclass field, by default None, that stores a tensor as :class:`PerModel` and reads as the tensor."""
    return _PerModelField()
