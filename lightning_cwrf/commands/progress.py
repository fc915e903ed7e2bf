"""Progress for a terminal and for a log, where a bar would be one line of thousands of characters."""

from __future__ import annotations

import sys

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar


def on_terminal() -> bool:
    """Whether somebody sees bars move."""
    return sys.stderr.isatty() and sys.stdout.isatty()


class EpochLines(ProgressBar):
    """At most ten lines about the epochs of a fit, instead of a bar."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = True

    def disable(self) -> None:
        self._shown = False

    def enable(self) -> None:
        self._shown = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done, every = trainer.current_epoch + 1, trainer.max_epochs or 1
        if self._shown and 10 * done // every > 10 * (done - 1) // every:
            print(f"epoch {done} of {every}", file=sys.stderr, flush=True)
