"""Callbacks that read data of the fit, and save what they found to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cwrf.callbacks.common import OncePerModule
from lightning_cwrf.checks import check_choice, check_flag
from lightning_cwrf.data import check_batches, first_batches
from lightning_cwrf.data.poisson import PoissonBatches, users_loader
from lightning_cwrf.lightning_private import in_started_processes
from lightning_cwrf.trainers import SPLITS, callbacks_of, datamodule_loader


class ReadsData(OncePerModule):
    """A callback with data arguments, each of which can be a split of the fit's DataModule.

    They are attributes under their names: as given, and in a fit the loader of the split.
    """

    _given: dict[str, Any]
    nonmembers: Any
    members: Any

    def take_data(self, **given: Any) -> None:
        """Keep data arguments: batches, the name of a split, or a DataModule (its test split); members may be None.

        Raises:
            TypeError: none of these.
            ValueError: no name of a split.
        """
        for name, data in given.items():
            if isinstance(data, str):
                check_choice(name, data, SPLITS, hint="Else pass a loader or a dataset.")
            elif not isinstance(data, LightningDataModule) and (data is not None or name != "members"):
                check_batches(data, name)
            setattr(self, name, data)
        self._given = given

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().prepare(trainer, pl_module, stage)
        if stage != "fit":
            return
        for name, data in self._given.items():
            if isinstance(data, LightningDataModule):
                if trainer.is_global_zero and data is not getattr(trainer, "datamodule", None):
                    data.prepare_data()
                trainer.strategy.barrier()
                setattr(self, name, datamodule_loader(data, "test"))
            elif isinstance(data, str):
                split: Any = data
                source = getattr(trainer, "datamodule", None) or pl_module
                setattr(self, name, datamodule_loader(source, split, ready=("fit",)))


class SavesResult(ReadsData):
    """A callback whose ``result`` can be saved to a file, which is checked when a fit starts."""

    save: Path | None
    overwrite: bool
    result: Any
    why_lost: ClassVar[str]
    """What happens in processes that a strategy starts, and what they do not return."""
    reads: ClassVar[str]
    """What loads the file."""

    def take_file(self, save: Path | None, overwrite: bool) -> None:
        """Keep the file, and whether that of an earlier run is replaced."""
        check_flag("overwrite", overwrite)
        self.save = save
        self.overwrite = overwrite

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().prepare(trainer, pl_module, stage)
        if stage != "fit":
            return
        files = [each.save.resolve() for each in callbacks_of(trainer, SavesResult) if each.save is not None]
        if self.save is not None and files.count(self.save.resolve()) > 1:
            raise MisconfigurationException(
                f"two callbacks in this Trainer save to {self.save}: give each its own save=."
            )
        if self.save is None and in_started_processes(trainer):
            rank_zero_warn(
                f"{self.why_lost}: pass {type(self).__name__}(save=...), a file for {self.reads}, or use the strategy "
                "'ddp'."
            )
        if self.save is not None and self.save.exists() and self.result is None and not self.overwrite:
            raise MisconfigurationException(
                f"{self.save} exists; pass another file as save=, or overwrite=True to replace it."
            )


def training_data(trainer: Trainer, callback: Callback) -> Any:
    """What the trainer's own loader gives in the batches that are used. Callbacks read a fresh copy (``as_loader``)."""
    loader = trainer.train_dataloader
    name = type(callback).__name__
    if loader is None:
        raise MisconfigurationException(f"{name} found no training data; pass members=...")
    try:
        check_batches(users_loader(loader))
    except TypeError as error:
        raise MisconfigurationException(
            f"{name} cannot read the training data: {error} Pass {name}(members=...), one loader or data set."
        ) from error
    if isinstance(loader, PoissonBatches):
        return loader.loader
    return first_batches(loader, trainer.num_training_batches)
