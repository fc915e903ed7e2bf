"""What is read off a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer


def transfer_of(trainer: Trainer) -> Callable[[Any], Any]:
    """A function that does to a batch what this trainer does: precision, the user's transfer hooks, the device."""

    def transfer(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return transfer
