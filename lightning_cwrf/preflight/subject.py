"""What a preflight looks at, and what several of its rules need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_cwrf.data import Batches, all_ids, as_loader, bring_to, isolated_rng
from lightning_cwrf.data.examples import ExampleId
from lightning_cwrf.defenses import Defense
from lightning_cwrf.weights.vanilla import VanillaSource


@dataclass(frozen=True)
class Subject:
    """The arguments of :func:`~lightning_cwrf.check`."""

    model: LightningModule | nn.Module
    loader: Batches
    reference: Batches | None
    nonmembers: Batches | None
    members: Batches | None
    vanilla: VanillaSource | None
    defense: Defense | None
    trainer: Trainer | None
    steps: int
    lam: float
    validation: Batches | None = None
    checkpoint: str | PathLike[str] | None = None

    @property
    def plain(self) -> Batches:
        """The members as they are audited."""
        return self.loader if self.members is None else self.members

    @property
    def sides(self) -> dict[str, Batches]:
        """Every data set that was given, by the name of its argument."""
        named = {"members": self.plain, "reference": self.reference, "nonmembers": self.nonmembers}
        return {name: data for name, data in named.items() if data is not None}

    @cached_property
    def batch(self) -> Any:
        """The first training batch, where the model is."""
        return self.first(self.loader)

    def first(self, data: Batches) -> Any:
        """The first batch of these data, brought to the model.

        Raises:
            ValueError: there is none.
        """
        with isolated_rng():
            for batch in as_loader(data, shuffle=False):
                return bring_to(self.model)(batch)
        raise ValueError("the data hold no batch.")

    @cached_property
    def ids(self) -> dict[str, Sequence[ExampleId] | None]:
        """The identity of every example of each side; None for a stream. All data are read once for it."""
        return {name: all_ids(data) for name, data in self.sides.items()}
