"""Poisson sampling, which the accounting of DP-SGD assumes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from lightning_utilities.core.apply_func import apply_to_collection
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_cwrf.data.loading import SeededOrder, loader_like


class PoissonBatches:
    """Batches that contain each example with the same probability, independently of all others.

    Each of the ``steps`` logical batches of a pass contains every example with probability ``sample_rate``
    (``1 / steps``) and is divided into ``parts`` physical batches of almost equal size. Its examples are a function of
    ``seed`` and the number of the step alone: workers may read ahead, a resumed run continues where it stopped, and all
    processes of a run draw the same logical batch, of which each takes its share.

    Args:
        loader: the user's loader: its dataset, ``collate_fn``, workers and memory pinning are kept, its order is not.
        steps: logical batches of a pass.
        parts: physical batches of a logical batch.
        seed: of the draws; keep it secret where the privacy of the examples depends on it.
        first_step: gives the number of the step at which a pass starts; by default 0.
        rank, world_size: of this process.

    Raises:
        TypeError: not a DataLoader, or one over a stream.
        ValueError: a loader whose sampler chooses examples, which Poisson sampling would undo.

    >>> import torch
    >>> batches = PoissonBatches(DataLoader(torch.arange(100), batch_size=25), steps=4)
    >>> len(list(batches)), batches.sample_rate, batches.expected_size
    (4, 0.25, 25.0)
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        steps: int,
        parts: int = 1,
        seed: int = 0,
        first_step: Callable[[], int] = int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_poisson(loader)
        self.loader = loader
        self.steps = steps
        self.parts = parts
        self.seed = seed
        self.first_step = first_step
        self.rank = rank
        self.world_size = world_size

    @property
    def sample_rate(self) -> float:
        """The probability that a logical batch contains an example."""
        return 1 / self.steps

    @property
    def expected_size(self) -> float:
        """The mean size of a logical batch, over all processes."""
        return len(self.loader.dataset) * self.sample_rate  # type: ignore[arg-type]

    def drawn(self, step: int) -> NDArray[np.int64]:
        """The examples of a logical batch, over all processes."""
        uniform = np.random.default_rng([self.seed, step]).random(len(self.loader.dataset))  # type: ignore[arg-type]
        return np.flatnonzero(uniform < self.sample_rate)

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[Any]:
        first = self.first_step()
        kept: dict[str, Any] = {"pin_memory": self.loader.pin_memory, "prefetch_factor": self.loader.prefetch_factor}
        # A new loader for each pass: its workers end with it.
        collate = functools.partial(_collate, self.loader.collate_fn, self.loader.dataset)  # can be sent to workers
        yield from loader_like(self.loader, batch_sampler=self._indices(first), collate_fn=collate, **kept)

    def state_dict(self) -> dict[str, int]:
        """The number of the next step. With this method, Lightning can resume in the middle of a pass."""
        return {"step": self.first_step()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to do: ``first_step`` gives the step of a resumed run."""

    def _indices(self, first: int) -> Iterator[list[int]]:
        for step in range(first, first + self.steps):
            share = self.drawn(step)[self.rank :: self.world_size]
            for part in np.array_split(share, self.parts):
                yield part.tolist()


def _collate(collate_fn: Callable[[list[Any]], Any], dataset: Dataset[Any], examples: list[Any]) -> Any:
    if examples:
        return collate_fn(examples)
    # No example was drawn: an empty batch of the same form.
    return apply_to_collection(collate_fn([dataset[0]]), Tensor, lambda tensor: tensor[:0])


def check_poisson(loader: Any) -> None:
    """Raise unless ``loader`` is a DataLoader over a whole dataset, so that its batches can be redrawn."""
    if not isinstance(loader, DataLoader):
        raise TypeError(f"DP-SGD draws its own Poisson batches, from one DataLoader; got a {type(loader).__name__}.")
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError("DP-SGD draws examples at random, which a stream (IterableDataset) does not allow.")
    if whole_order(loader) is None:
        batches: Any = loader.batch_sampler
        chooser = type(batches.sampler if type(batches) is BatchSampler else batches).__name__
        raise ValueError(
            f"the training loader's {chooser} chooses examples; DP-SGD draws Poisson batches from the whole dataset "
            "and would undo that choice. Pass a loader with batch_size= over the dataset (or over a Subset of it)."
        )


def users_loader(loader: Any) -> Any:
    """The user's loader, where Poisson batches replace it."""
    return loader.loader if isinstance(loader, PoissonBatches) else loader


def whole_order(loader: Any) -> Literal["shuffled", "in order"] | None:
    """How a DataLoader goes through its whole dataset; None where it does not, or is not a DataLoader of one.

    >>> whole_order(DataLoader(range(4), shuffle=True)), whole_order(DataLoader(range(4)))
    ('shuffled', 'in order')
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    # A loader with a given batch sampler does not have the sampler.
    order: Any = loader.batch_sampler.sampler if type(loader.batch_sampler) is BatchSampler else None
    if isinstance(order, SequentialSampler):
        return "in order"
    if isinstance(order, DistributedSampler):
        return "shuffled" if order.shuffle else "in order"
    whole = isinstance(order, RandomSampler) and not order.replacement and order.num_samples == len(order.data_source)
    return "shuffled" if whole or isinstance(order, SeededOrder) else None
