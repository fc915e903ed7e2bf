"""Batches: read again without the owner's iterator, and moved to a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, SubsetRandomSampler

from lightning_cwrf.data.sampling import batch_size_of, support

if TYPE_CHECKING:
    Batches: TypeAlias = Dataset[Any] | DataLoader[Any] | Iterable[Any]
else:  # from a YAML file, jsonargparse would make a plain Dataset of a subclass of Dataset[Any]
    Batches = Dataset | DataLoader | Iterable
"""Where batches come from: a data set of single examples, a loader, or an iterable of batches."""


def move(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move every tensor of a nested batch to ``device`` and convert floats to ``dtype``; the rest is unchanged."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return apply_to_collection(batch, Tensor, moved, allow_frozen=True)


def bring_to(model: nn.Module, transfer: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
    """A function that brings a batch to a model: the one way in which scoring, defenses and audits do it.

    Args:
        model: to whose device tensors are moved; floats are converted for a model of half or double precision.
        transfer: applied to each batch before that, for example the user's own transfer hooks
            (:func:`~lightning_cwrf.trainers.transfer_of`).
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    dtype = None if first.dtype == torch.float32 else first.dtype

    def bring(batch: Any) -> Any:
        return move(batch if transfer is None else transfer(batch), first.device, dtype)

    return bring


def as_loader(
    data: Batches, *, shuffle: bool, batch_size: int | None = None, generator: torch.Generator | None = None
) -> Iterable[Any]:
    """A fresh pass over ``data`` that shares no iterator, sampler or worker with its owner.

    A running ``DataLoader`` with persistent workers has only one iterator, so iterating it from a callback would take
    batches from the training loop. Hence a new loader is built over the examples that the sampler can give
    (:func:`~lightning_cwrf.data.sampling.support`), each once.

    An iterable of batches is returned as it is. The default of ``batch_size`` is the loader's, or 256 for a data set;
    it has no effect where a data set gives whole batches, or the user's own batch sampler makes them.
    """
    check_batches(data)
    loader = _loader(data, batch_size)
    if loader is None:
        iterable: Iterable[Any] = data  # type: ignore[assignment]
        return iterable
    size = batch_size_of(loader)
    size = size if batch_size is None or size is None else batch_size
    if isinstance(loader.dataset, IterableDataset):
        return loader_like(loader, generator, batch_size=size, drop_last=loader.drop_last)
    given = support(loader)
    if not given.places:
        return []
    if given.batches is not None:
        groups = given.batches
        if shuffle:
            groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        return _grouped(loader, groups, generator)
    if given.places == range(len(loader.dataset)):  # type: ignore[arg-type]
        return loader_like(loader, generator, batch_size=size, shuffle=shuffle)
    order: Any = SubsetRandomSampler(given.places, generator) if shuffle else given.places
    return loader_like(loader, generator, batch_size=size, sampler=order)


def some_batches(data: Batches, examples: int = 256, batches: int = 3, *, backwards: bool = False) -> Iterable[Any]:
    """A few of the batches that :func:`as_loader` gives in order, spread over the data; for a stream the first ones.

    ``backwards`` reverses them, and the examples in each, where the data are not a stream.
    """
    loader = _loader(data, None)
    if loader is None or isinstance(loader.dataset, IterableDataset):
        first: Iterable[Any] = as_loader(data, shuffle=False)
        if isinstance(first, Sequence):
            return [first[i] for i in _spread(len(first), batches)]
        return itertools.islice(first, batches)
    given = support(loader)
    size = batch_size_of(loader) or 1
    groups = given.batches
    if groups is None:
        groups = [given.places[i : i + size] for i in range(0, len(given.places), size)]  # type: ignore[misc]
    chosen = [groups[i] for i in _spread(len(groups), max(batches, math.ceil(examples / size)))]
    if backwards:
        chosen = [group[::-1] for group in reversed(chosen)]
    if given.batches is None and loader.batch_sampler is None:
        return loader_like(loader, batch_size=None, sampler=[place for group in chosen for place in group])
    return _grouped(loader, chosen, None)


def _spread(length: int, count: int) -> list[int]:
    """``count`` numbers below ``length``, evenly spread from the first to the last."""
    return sorted({round(i * (length - 1) / max(1, count - 1)) for i in range(count)}) if length else []


def first_batches(data: Batches, batches: float) -> Any:
    """The examples that can be in the first batches of a pass, where only these are used (``limit_train_batches``).

    With a fixed order these are exactly the examples used; where each pass draws others, all that can be drawn.

    >>> first_batches(DataLoader(range(10), batch_size=2), 2).dataset[3]
    3
    >>> len(first_batches(DataLoader(range(10), batch_size=2), 2).dataset)
    4
    """
    if math.isinf(batches):
        return data
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return data[: int(batches)] if isinstance(data, Sequence) else _FirstBatches(data, int(batches))
    used = support(data, int(batches))
    if len(used.places) == len(support(data).places):
        return data
    if used.batches is not None:
        return _grouped(data, used.batches, None)
    return loader_like(data, dataset=Subset(data.dataset, list(used.places)), batch_size=batch_size_of(data))


class _FirstBatches:
    """The first batches of each pass over an iterable or a stream."""

    def __init__(self, data: Batches, batches: int) -> None:
        self.data = data
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(as_loader(self.data, shuffle=False)), self.batches)


def check_batches(data: Any, name: str = "") -> None:
    """Raise a TypeError unless ``data`` is a loader, a data set or an iterable of batches."""
    where = f"{name}: " if name else ""
    wanted = f"{where}expected a DataLoader, a Dataset or an iterable of batches, not"
    if isinstance(data, Mapping) and not isinstance(data, Dataset):
        raise TypeError(
            f"{wanted} a {type(data).__name__}; instead of several loaders pass one, or one over a ConcatDataset."
        )
    if isinstance(data, (str, bytes, Tensor, np.ndarray)) or not isinstance(data, (Dataset, DataLoader, Iterable)):
        what = "; make it a TensorDataset" if isinstance(data, (Tensor, np.ndarray)) else ""
        raise TypeError(f"{wanted} {type(data).__name__}{what}.")
    first = data[0] if isinstance(data, (list, tuple)) and data else None
    if isinstance(first, (Tensor, np.ndarray)):
        raise TypeError(
            f"{wanted} a {type(data).__name__} of {type(first).__name__}s; pass inputs and targets as a "
            "TensorDataset(inputs, targets), and a single batch in a list."
        )
    if isinstance(first, (DataLoader, Dataset)):
        raise TypeError(
            f"{wanted} a {type(data).__name__} of {type(first).__name__}s; instead of several loaders pass one, or one "
            "over a ConcatDataset."
        )


def iterates_itself(data: Any) -> bool:
    """Whether a loader's class overrides the iteration, which a newly built loader would not have.

    >>> iterates_itself(DataLoader(range(3)))
    False
    """
    kind = type(data)
    if not isinstance(data, DataLoader) or kind.__module__.partition(".")[0] == "torchdata":
        return False
    return kind.__iter__ is not DataLoader.__iter__


class Collated(Dataset[Any]):
    """A data set, and how its examples become a batch wherever it is read without a loader."""

    def __init__(self, data: Dataset[Any], collate_fn: Callable[[list[Any]], Any]) -> None:
        self.data = data
        self.collate_fn = collate_fn

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def _loader(data: Batches, batch_size: int | None) -> DataLoader[Any] | None:
    """The data's loader; None for an iterable of batches."""
    if isinstance(data, DataLoader):
        return data
    if not isinstance(data, Dataset):
        return None
    if not isinstance(data, IterableDataset) and hasattr(data, "__len__") and len(data) == 0:
        return DataLoader(data, batch_sampler=[])  # a RandomSampler would raise, with a message about itself
    return DataLoader(
        data, batch_size=batch_size or 256, collate_fn=data.collate_fn if isinstance(data, Collated) else None
    )


def loader_like(loader: DataLoader[Any], generator: torch.Generator | None = None, **settings: Any) -> DataLoader[Any]:
    """A new loader with the workers and collate function of this one."""
    kept: dict[str, Any] = {
        "dataset": loader.dataset,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "timeout": loader.timeout,
        "generator": generator,
    }
    return DataLoader(**{**kept, **settings})


def rebuilt(loader: DataLoader[Any], data: Dataset[Any]) -> DataLoader[Any]:
    """A loader of other data, in order, with the batch size, workers and collate function of this one."""
    size = batch_size_of(loader) or getattr(loader.batch_sampler, "batch_size", None)
    return loader_like(loader, dataset=data, batch_size=size)


def _grouped(loader: DataLoader[Any], groups: Sequence[Any], generator: torch.Generator | None) -> DataLoader[Any]:
    """A loader of these batches of indices."""
    if loader.batch_sampler is None:  # its data set takes whole batches
        return loader_like(loader, generator, batch_size=None, sampler=groups)
    return loader_like(loader, generator, batch_sampler=groups)


def cycle(batches: Iterable[Any], name: str) -> Iterator[Any]:
    """Yield batches endlessly, starting over when they run out.

    Raises:
        ValueError: there is no batch at all, or a one-shot iterator ran out and cannot be restarted.
    """
    seen = 0
    while True:
        before = seen
        for batch in batches:
            seen += 1
            yield batch
        if seen == 0:
            raise ValueError(f"{name} holds no batch: an empty loader cannot be scored or audited.")
        if seen == before:
            raise ValueError(
                f"{name} ran out after {seen} batches and cannot be restarted; pass a list or a DataLoader "
                "instead of a generator."
            )


class SeededOrder(Sampler[int]):
    """A different order of n examples each epoch, a function of seed and epoch alone; Lightning sets the epoch."""

    def __init__(self, examples: int, seed: int) -> None:
        self.examples = examples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.examples

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.examples).tolist())
