"""What is read from a Trainer and its DataModule: callbacks, loaders, and what is done to a batch."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cwrf.checks import check_choice
from lightning_cwrf.data import check_batches, isolated_rng, same_examples

C = TypeVar("C")

Split: TypeAlias = Literal["train", "val", "test", "predict"]
"""A split of a DataModule, by the name of its hook: ``train_dataloader`` and so on."""

SPLITS = {"train": "fit", "val": "fit", "test": "test", "predict": "predict"}
"""The stage that a DataModule is set up for to have each split."""


def callbacks_of(trainer: Trainer, *kinds: type[C]) -> list[C]:
    """The trainer's callbacks of these classes and their subclasses, in order."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kinds)]


def refuse_pytorch_lightning(*objects: Any) -> None:
    """Raise a TypeError for a class or an object of ``pytorch_lightning``, whose classes are no others' subclasses.

    Checks of this package would miss its callbacks and strategies.
    """
    for each in objects:
        cls = each if isinstance(each, type) else type(each)
        theirs = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "pytorch_lightning"]
        if theirs:
            raise TypeError(
                f"{cls.__name__} is a {theirs[0].__name__} of pytorch_lightning, and lightning_cwrf works with "
                "lightning.pytorch, the same library under its present name. Import everything from there, in all "
                "files: `import lightning.pytorch as pl`, `from lightning.pytorch import ...`. Checkpoints stay as "
                "they are."
            )


def warn_if_finished(trainer: Trainer) -> None:
    """Warn in ``setup`` of a fit where this Trainer has trained all its epochs before: the fit trains nothing."""
    epochs = trainer.max_epochs
    if epochs is not None and 0 < epochs <= trainer.current_epoch:
        rank_zero_warn(
            f"this Trainer has trained its max_epochs={epochs} in an earlier fit, so this one trains nothing. "
            "Make a new Trainer, with new callbacks."
        )


def transfer_of(trainer: Trainer) -> Callable[[Any], Any]:
    """A function that does to a batch what this trainer does: precision, the user's transfer hooks, the device."""

    def transfer(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return transfer


def datamodule_loader(
    source: LightningDataModule | LightningModule, split: Split, *, ready: Collection[str] = ()
) -> Any:
    """The loader of one split of a DataModule, or of a module that has the loader hooks itself.

    Args:
        source: whose data are prepared (``prepare_data``); a DataModule is set up for the split's stage.
        split: which loader.
        ready: the stages that the DataModule is set up for already, such as ``"fit"`` inside of a fit.

    Raises:
        ValueError: an unknown split.
        MisconfigurationException: there is no such loader, or it gives several loaders.
    """
    check_choice("split", split, SPLITS)
    hook, name = f"{split}_dataloader", type(source).__name__
    if not is_overridden(hook, source):
        raise MisconfigurationException(
            f"there is no {split!r} split: {name} has no {hook}. Pass a loader or a dataset."
        )
    stage = SPLITS[split]
    with isolated_rng():
        if not isinstance(source, LightningDataModule) or stage in ready:
            loader = getattr(source, hook)()
        else:
            loader = _set_up_copy(source, stage, hook)
    return _one(loader, f"{name}.{hook}")


def _one(loader: Any, where: str) -> Any:
    """One loader, which may be in a list; ``where`` it is from, for messages."""
    if isinstance(loader, (list, tuple)) and len(loader) == 1:
        loader = loader[0]
    try:
        check_batches(loader)
    except TypeError as error:
        raise MisconfigurationException(
            f"{where} cannot be used as one split: {error} Pass a loader or a dataset."
        ) from error
    return loader


def _set_up_copy(source: LightningDataModule, stage: str, hook: str) -> Any:
    """A loader of a shallow copy that is set up: on the DataModule itself it could change what a fit trains on.

    Where that draws random numbers, it is done again after other ones, and must give the same examples: then both are
    read completely, unless they are parts of one object.
    """

    def loader() -> Any:
        work = copy.copy(source)
        work.setup(stage)
        return _one(getattr(work, hook)(), f"{type(source).__name__}.{hook}")

    before = _random_states()
    first = loader()
    if _random_states() != before and not same_examples(first, loader()):
        raise MisconfigurationException(
            f"{type(source).__name__} splits its data at random, so its examples are others each time it is set up: "
            "what the model was trained on would be in its test split. Pass random_split a generator of a fixed seed, "
            "generator=torch.Generator().manual_seed(0), in this training and in the first."
        )
    return first


def _random_states() -> tuple[Any, ...]:
    numpy = repr(np.random.get_state())  # noqa: NPY002 - the global state is what users draw from
    return random.getstate(), numpy, bytes(torch.get_rng_state().numpy())
