"""What a module has seen besides its training data: the non-members of its defense, the reference data of its scoring.

An audit with such examples as non-members would test on data that shaped the model. The record is an attribute of the
module, not part of its state dict; it is saved in the checkpoints of modules with a defense.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.data.examples import ExampleId

SCORED = "reference data of the scoring"
"""What a module has seen whose weights CWRF has scored."""

SEEN_KEY = "lightning_cwrf_seen"
"""Where a checkpoint has the record."""

_ATTRIBUTE = "_lightning_cwrf_seen"


def record_seen(module: nn.Module, what: str, ids: Iterable[ExampleId]) -> None:
    """Record on the module that it has seen these examples; ``what`` they are is in the words of a message.

    >>> record_seen(model := nn.Linear(2, 2), "reference data of the scoring", [(b"a", 0)])
    >>> seen_by(nn.Sequential(model))
    {'reference data of the scoring': {(b'a', 0)}}
    """
    record = vars(module).setdefault(_ATTRIBUTE, {})
    record.setdefault(what, set()).update(ids)


def seen_by(model: nn.Module) -> dict[str, set[ExampleId]]:
    """What a model and the modules inside it have seen, by kind."""
    found: dict[str, set[ExampleId]] = {}
    for module in model.modules():
        for what, ids in vars(module).get(_ATTRIBUTE, {}).items():
            found.setdefault(what, set()).update(ids)
    return found


def is_seen(known: ExampleId, seen: Collection[ExampleId]) -> bool:
    """Whether an example is among those seen, some of which have no label."""
    return known in seen or (known[0], None) in seen


def seen_state(module: nn.Module) -> dict[str, Any]:
    """The record as tensors and plain values, for a checkpoint."""
    state = {}
    for what, ids in vars(module).get(_ATTRIBUTE, {}).items():
        ordered = sorted(ids, key=repr)
        digests = torch.frombuffer(
            bytearray(b"".join(digest for digest, _ in ordered)) or bytearray(1), dtype=torch.uint8
        )
        labels = [-1 if label is None else label for _, label in ordered]
        state[what] = {"digests": digests, "labels": torch.tensor(labels, dtype=torch.long)}
    return state


def load_seen_state(module: nn.Module, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Add the record of a checkpoint."""
    for what, content in state.items():
        raw, labels = content["digests"].numpy().tobytes(), content["labels"].tolist()
        pieces = [raw[16 * i : 16 * (i + 1)] for i in range(len(labels))]
        record_seen(module, what, [(d, None if y == -1 else y) for d, y in zip(pieces, labels, strict=True)])
