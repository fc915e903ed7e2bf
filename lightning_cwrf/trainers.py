"""What is read from a Trainer: its callbacks, and what it does to a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

C = TypeVar("C")


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
