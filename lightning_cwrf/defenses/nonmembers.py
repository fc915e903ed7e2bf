"""Non-member batches for defenses that train against them."""

# No postponed annotations here: jsonargparse evaluates them in the module of the subclass, whose names are others.

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_cwrf.classification import classification_step, split_batch
from lightning_cwrf.data import Batches, OverlapCheck, as_loader, check_batches, cycle, example_ids, isolated_rng
from lightning_cwrf.data.sampling import support
from lightning_cwrf.data.seen import record_seen
from lightning_cwrf.defenses.settings import Defense
from lightning_cwrf.defenses.state import DefenseState
from lightning_cwrf.targets import class_indices
from lightning_cwrf.trainers import transfer_of


@dataclass(frozen=True, kw_only=True)
class AgainstNonmembers(Defense):
    """Base of the defenses that train against data the model is not trained on.

    Args:
        nonmembers: a loader, a dataset or an iterable of batches.
    """

    title: ClassVar[str]
    """The defense's name, for messages."""
    nonmembers: Batches | None = field(default=None, repr=False, metadata={"data": True})

    def __post_init__(self) -> None:
        if self.nonmembers is None:
            raise MisconfigurationException(
                f"{self.title} needs data the model is not trained on: pass nonmembers=, a loader or a dataset."
            )
        check_batches(self.nonmembers, "nonmembers")


class NonmemberState(DefenseState):
    """The batches of non-members."""

    def __init__(self, module: LightningModule, defense: Any) -> None:
        super().__init__(module, defense)
        self.nonmembers = NonmemberBatches(defense.nonmembers, defense.title)


class NonmemberBatches:
    """Draws a non-member batch for each training step.

    The order is a function of the epoch and the rank alone, so a run that resumes at an epoch gets the batches of an
    uninterrupted one, and the caller's random state is not touched. Before the first batch the
    whole data are compared by content with the members'; where either cannot be read whole, the first epoch's
    batches are. The module keeps a record of what was drawn (:mod:`lightning_cwrf.data.seen`), for audits.
    """

    def __init__(self, data: Batches, defense: str) -> None:
        self.data = data
        self.defense = defense
        self._batches: Iterator[Any] | None = None
        self._generator: torch.Generator | None = None
        self._epoch = -1
        self._first_epoch: int | None = None
        self._overlap: OverlapCheck | None = None
        self._by_class: dict[int, Tensor] | None = None
        self._places: Sequence[Any] = ()

    def __getstate__(self) -> dict[str, Any]:
        # Iterators and generators cannot be copied; a copy makes new ones.
        return {**self.__dict__, "_batches": None, "_generator": None, "_epoch": -1}

    def generator(self, module: LightningModule) -> torch.Generator:
        """This epoch's own randomness."""
        if self._generator is None or module.current_epoch != self._epoch:
            self._epoch = module.current_epoch
            self._generator = torch.Generator().manual_seed(2**20 * module.global_rank + self._epoch)
            self._batches = None
            self._first_epoch = self._epoch if self._first_epoch is None else self._first_epoch
        return self._generator

    def step(self, module: LightningModule, member_batch: Any) -> tuple[Tensor, Tensor]:
        """Logits and targets of the next batch."""
        generator = self.generator(module)
        if isinstance(self.data, Sized) and len(self.data) == 0:
            raise ValueError("nonmembers holds no batch.")
        if self._batches is None:
            self._batches = cycle(as_loader(self.data, shuffle=True, generator=generator), "nonmembers")
        return classification_step(module, self._checked(module, member_batch, next(self._batches)))

    def like(self, module: LightningModule, member_batch: Any, targets: Tensor) -> Any:
        """A batch with one non-member of the class of each target, on the module's device."""
        generator = self.generator(module)
        loader = DataLoader(self.data, batch_size=256) if isinstance(self.data, Dataset) else self.data
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise TypeError(
                f"{self.defense} draws non-members by class: pass a dataset, or a DataLoader of one, as nonmembers, "
                f"not {type(self.data).__name__}."
            )
        if self._by_class is None:
            with isolated_rng():
                labels = torch.cat([class_indices(split_batch(each)[1]) for each in as_loader(loader, shuffle=False)])
            self._places = support(loader).places
            self._by_class = {c: (labels == c).nonzero().flatten() for c in set(labels.tolist())}
        chosen = []
        for target in targets.tolist():
            if target not in self._by_class:
                raise ValueError(f"nonmembers hold no example of class {target}, which {self.defense} needs.")
            places = self._by_class[target]
            chosen.append(self._places[int(places[torch.randint(len(places), (), generator=generator)])])
        batch = loader.collate_fn([loader.dataset[i] for i in chosen])
        return self._checked(module, member_batch, batch)

    def _checked(self, module: LightningModule, member_batch: Any, batch: Any) -> Any:
        what = f"non-members that {self.defense} trains against"
        if self._overlap is None:
            with isolated_rng():
                self._overlap = OverlapCheck(_whole(module.trainer.train_dataloader), self.data, "nonmembers")
            record_seen(module, what, self._overlap.others or ())
        if self._epoch == self._first_epoch:
            self._overlap.see(member_batch, batch)
            if self._overlap.others is None:
                record_seen(module, what, example_ids(batch))
        return transfer_of(module.trainer)(batch)


def _whole(loader: Any) -> Any:
    """The training data, where they are one loader or data set; else None, and batches are compared as they come."""
    try:
        check_batches(loader)
    except TypeError:
        return None
    return loader
