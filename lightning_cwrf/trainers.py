"""What is read from a Trainer: its callbacks, and what it does to a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch import Trainer

C = TypeVar("C")


def callbacks_of(trainer: Trainer, *kinds: type[C]) -> list[C]:
    """The trainer's callbacks of these classes and their subclasses, in order."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kinds)]


def transfer_of(trainer: Trainer) -> Callable[[Any], Any]:
    """A function that does to a batch what this trainer does: precision, the user's transfer hooks, the device."""

    def transfer(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return transfer
