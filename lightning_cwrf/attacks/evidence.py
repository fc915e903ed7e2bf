"""What an attacker may see, of which the outputs of shadow models are by far the largest part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Signal: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class PerModel:
    """Outputs of k models, ``(k, ..., n, K)``, that are never copied as a whole: signals are taken model by model.

    Args:
        outputs: of the models on a pool, ``(k, ..., pool, K)``.
        columns: where in the pool each of the n examples is; None: they are the pool.

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
        self._kept: dict[Signal, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._outputs) if self._rows is None else len(self._rows)

    def __getitem__(self, rows: Tensor) -> PerModel:
        """The models of these rows; their signals are those of the whole, which are computed once."""
        drawn = PerModel(self._outputs, self._columns)
        drawn._whole = self if self._whole is None else self._whole
        drawn._rows = rows if self._rows is None else self._rows[rows]
        return drawn

    @property
    def device(self) -> torch.device:
        return self._outputs.device

    def tensor(self) -> Tensor:
        """All outputs, ``(k, ..., n, K)``: a copy, unless all models and the whole pool are asked for."""
        outputs = self._outputs if self._rows is None else self._outputs[self._rows]
        return outputs if self._columns is None else outputs.index_select(-2, self._columns.to(self.device))

    def signal(self, signal: Signal, targets: Tensor) -> Tensor:
        """``signal(logits, targets)`` of every model, ``(k, ..., n)``; kept, so that no attack computes it again."""
        if self._whole is not None and self._rows is not None:
            return self._whole.signal(signal, targets)[self._rows]
        known, found = self._kept.get(signal, (None, None))
        if known is not targets or found is None:
            found = torch.stack([signal(self._examples(each), targets) for each in self._outputs])
            self._kept[signal] = (targets, found)
        return found

    def _examples(self, outputs: Tensor) -> Tensor:
        return outputs if self._columns is None else outputs.index_select(-2, self._columns.to(self.device))


class _Stored:
    """A field that holds a :class:`PerModel` and reads as the tensor."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, evidence: Any, owner: type | None = None) -> Any:
        if evidence is None:
            return None  # the default of the field
        value = vars(evidence)[self._name]
        return value.tensor() if isinstance(value, PerModel) else value

    def __set__(self, evidence: Any, value: Any) -> None:
        vars(evidence)[self._name] = PerModel(value) if isinstance(value, Tensor) else value


_OUTPUTS = {
    "examples": ("shadow_logits", "targets"),
    "population": ("shadow_population_logits", "population_targets"),
    "views": ("shadow_view_logits", "targets"),
}


def _stored() -> Any:
    return _Stored()


@dataclass(frozen=True)
class Evidence:
    """What an attacker sees: outputs of the audited model, of shadow models, and on a population. No membership of it.

    The fields of shadow models' logits take a :class:`PerModel` too, and read as a tensor: a large one, and a copy
    where the examples are some of a pool. :meth:`shadow_signals` does without it.

    Attributes:
        logits: of the audited model on the n examples, ``(n, K)``.
        targets: class indices ``(n,)``.
        shadow_logits: of the k shadow models, ``(k, n, K)``.
        membership: of the shadow models, bool ``(k, n)``.
        population_logits: of the audited model on m examples that no model was trained on, ``(m, K)``.
        population_targets: ``(m,)``.
        shadow_population_logits: ``(k, m, K)``.
        inputs: flat features of the examples, ``(n, d)``.
        population_inputs: ``(m, d)``.
        view_logits: of the audited model on q augmented views of the examples, ``(q, n, K)``.
        shadow_view_logits: of the shadow models on the same views, ``(k, q, n, K)``.
    """

    logits: Tensor
    targets: Tensor
    shadow_logits: Tensor | None = _stored()  # noqa: RUF009 - a descriptor each, no shared value
    membership: Tensor | None = None
    population_logits: Tensor | None = None
    population_targets: Tensor | None = None
    shadow_population_logits: Tensor | None = _stored()  # noqa: RUF009 - a descriptor each, no shared value
    inputs: Tensor | None = None
    population_inputs: Tensor | None = None
    view_logits: Tensor | None = None
    shadow_view_logits: Tensor | None = _stored()  # noqa: RUF009 - a descriptor each, no shared value

    def has(self, *names: str) -> bool:
        """Whether all of these fields are there; unlike reading them, this copies nothing."""
        return all(vars(self).get(name) is not None for name in names)

    def shadow_signals(self, signal: Signal, of: Literal["examples", "population", "views"] = "examples") -> Tensor:
        """``signal(logits, targets)`` of every shadow model, computed model by model and once for all attacks.

        Args:
            signal: a function of logits ``(..., n, K)`` and targets ``(n,)``, such as
                :func:`~lightning_cwrf.attacks.logit_signal`. It is known again by identity: define it once.
            of: the examples, ``(k, n)``; the population, ``(k, m)``; or the views, ``(k, q, n)``.

        Raises:
            ValueError: the evidence has no such outputs.
        """
        name, labels = _OUTPUTS[of]
        if not self.has(name, labels):
            raise ValueError(f"the evidence has no {name if not self.has(name) else labels}.")
        outputs: PerModel = vars(self)[name]
        return outputs.signal(signal, getattr(self, labels))
