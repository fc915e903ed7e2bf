"""Non-member batches for defenses that train against them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cwrf.classification import classification_step
from lightning_cwrf.data import Batches, as_loader, check_disjoint, cycle, example_digests
from lightning_cwrf.transfer import transfer_of


class NonmemberBatches:
    """Draws a non-member batch for each training step.

    Every epoch begins a new order that depends on the epoch and the rank alone, so a run that resumes at an epoch sees
    the batches that an unbroken one sees, and the caller's random state is not touched. During the first epoch the
    batches are compared by content with the members'.

    Args:
        data: a loader, a dataset or an iterable of batches; it begins again when it runs out.
        defense: the defense's name, for errors.
    """

    def __init__(self, data: Batches | None, defense: str) -> None:
        if data is None:
            raise MisconfigurationException(
                f"{defense} needs data the model is not trained on: pass nonmembers=, a loader or a dataset."
            )
        self.data = data
        self._batches: Iterator[Any] | None = None
        self._epoch = -1
        self._first_epoch: int | None = None
        self._seen: tuple[set[bytes], set[bytes]] = (set(), set())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None, "_epoch": -1}  # an iterator cannot be copied; it is begun again

    def raw(self, module: LightningModule, member_batch: Any) -> Any:
        """The next batch, on the module's device."""
        if self._batches is None or module.current_epoch != self._epoch:
            self._epoch = module.current_epoch
            generator = torch.Generator().manual_seed(2**20 * module.global_rank + self._epoch)
            self._batches = cycle(as_loader(self.data, shuffle=True, generator=generator), "nonmembers")
            self._first_epoch = self._epoch if self._first_epoch is None else self._first_epoch
        batch = next(self._batches)
        if self._epoch == self._first_epoch:
            members, others = self._seen
            members.update(example_digests(member_batch))
            others.update(example_digests(batch))
            check_disjoint(members, others, "nonmembers")
        return transfer_of(module.trainer)(batch)

    def step(self, module: LightningModule, member_batch: Any) -> tuple[Tensor, Tensor]:
        """Logits and targets of the next batch."""
        return classification_step(module, self.raw(module, member_batch))
