"""Saving θ_vn at the start of a first training."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cwrf.callbacks.common import CheckedCallback
from lightning_cwrf.checks import check_flag
from lightning_cwrf.files import load_tensors
from lightning_cwrf.weights.vanilla import capture, save_vanilla


class VanillaSnapshotCallback(CheckedCallback):
    """Saves the vanilla weights θ_vn before the first optimizer step, so that a later hardening finds them.

    Put it into the Trainer of the first training. A resumed run does not save again: its weights have seen data.

    Args:
        path: of the file; its format is safetensors, whatever the name ends with.
        overwrite: replace a file of other weights. Otherwise that is an error, because the earlier run could no longer
            be hardened.

    >>> VanillaSnapshotCallback("runs/init.safetensors").path.name
    'init.safetensors'
    """

    why_not_sharded = (
        "no process has all of them. Save the weights before the Trainer is made: "
        "lightning_cwrf.weights.save_vanilla(model, path)"
    )

    def __init__(self, path: str | PathLike[str] = "vanilla.safetensors", overwrite: bool = False) -> None:
        check_flag("overwrite", overwrite)
        self.path = Path(path)
        self.overwrite = overwrite

    @property
    def state_key(self) -> str:
        return self._generate_state_key(path=str(self.path))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > 0:
            if not self.path.is_file():
                raise MisconfigurationException(
                    f"this run has done {trainer.global_step} steps already and there is no {self.path}: its initial "
                    "weights are lost. Remove VanillaSnapshotCallback, or start the training again."
                )
            return
        fault = None
        if trainer.is_global_zero:
            fault = self._save(pl_module)
        fault = trainer.strategy.broadcast(fault)
        if fault is not None:
            raise MisconfigurationException(fault)

    def _save(self, pl_module: LightningModule) -> str | None:
        state = capture(pl_module)
        if self.path.is_file() and not self.overwrite:
            try:
                old = load_tensors(self.path, what="file of vanilla weights").tensors
            except ValueError as error:
                return f"{error} Pass overwrite=True to replace it, or another path."
            if old.keys() != state.keys() or not all(torch.equal(old[name], state[name]) for name in state):
                return (
                    f"{self.path} holds the vanilla weights of another run; give each first training its own "
                    "path, or pass overwrite=True. In a hardening run, remove this callback."
                )
            return None
        save_vanilla(state, self.path)
        return None
