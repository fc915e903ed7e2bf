"""One quiet ``Trainer.fit``, and its augmented data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import Dataset

SILENT = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
"""Arguments of a shadow model's Trainer that a recipe cannot change."""


def fit(
    module: LightningModule,
    batches: Any,
    callbacks: list[Callback],
    trainer_kwargs: Mapping[str, Any],
    *models: nn.Module,
) -> None:
    """Train a module, and leave ``models`` on the device that it was trained on."""
    with quiet():
        defaults = {"accelerator": "auto", "devices": 1, **SILENT}
        trainer = Trainer(**{**defaults, **trainer_kwargs, "callbacks": callbacks})
        trainer.fit(module, batches)
    for model in models:
        model.to(trainer.strategy.root_device)


@contextmanager
def quiet() -> Iterator[None]:
    """Many trainings in a row: Lightning would repeat its advice on devices and loaders for each."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            advice = (
                "many workers|number of training batches|treespec|validation_step|fix=True replaced|vanilla='redraw'"
            )
            warnings.filterwarnings("ignore", f".*({advice}).*")
            yield
    finally:
        logger.setLevel(level)


class Augmented(Dataset[Any]):
    """A data set whose examples are augmented each time they are read."""

    def __init__(self, data: Dataset[Any], augment: Callable[[Any], Any]) -> None:
        self.data = data
        self.augment = augment

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.augment(self.data[index])
