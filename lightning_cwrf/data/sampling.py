"""The examples that a DataLoader can give, determined from its sampler or a copy of it, never from the loader itself.

A running loader with persistent workers has only one iterator, so nothing here iterates a loader or draws from the
caller's samplers and generators.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_cwrf.data.rng import isolated_rng
from lightning_cwrf.lightning_private import wrapped_sampler

_PASSES = 16
"""The most passes over a sampler of unknown kind until one gives nothing new."""


@dataclass(frozen=True)
class Support:
    """The indices of a data set that a loader can give.

    Attributes:
        places: each index once: in the loader's order where all passes have the same, else in order of appearance.
        batches: the indices by batch, where the user's own batch sampler makes the batches; else None.
        misses: float64, one for all indices or one each: the probability that a pass does not give an index.
    """

    places: Sequence[Any]
    batches: list[list[Any]] | None
    misses: Tensor

    def unseen(self, passes: float) -> float:
        """The share of the indices that this many passes are expected not to give.

        >>> support(DataLoader(range(10), batch_size=5, shuffle=True), batches=1).unseen(passes=2)
        0.25
        """
        return float(self.misses.pow(passes).mean())


@dataclass(frozen=True)
class _Order:
    """One sampler: the indices it gives, the length of a pass, and whether all passes are the same.

    ``weights`` are the probabilities of a single draw where indices are drawn with replacement.
    """

    places: Sequence[Any]
    length: int
    fixed: bool
    weights: Tensor | None = None
    replicas: int = 1

    def support(self, length: int) -> Support:
        """What passes of ``length`` indices give."""
        if self.fixed:
            given = self.places[:length]
            return Support(
                given if isinstance(given, range) else _once(given), None, torch.zeros((), dtype=torch.float64)
            )
        if self.weights is not None:
            return Support(self.places, None, (1 - self.weights / self.weights.sum()).pow(length))
        missed = 1 - min(1.0, length / max(1, len(self.places)))
        return Support(self.places, None, torch.tensor(missed, dtype=torch.float64))


def support(loader: DataLoader[Any], batches: int | None = None) -> Support:
    """The indices of its map-style data set that a loader can give, in passes of at most ``batches`` batches.

    ======================================= ========================================================================
    in order, or another fixed order        what a pass gives; with ``drop_last`` without the last, incomplete batch
    shuffled, DistributedSampler            the whole data set
    SubsetRandomSampler                     its indices
    WeightedRandomSampler                   the indices whose weight is not zero
    other samplers and batch samplers       what passes over a deep copy give, until a pass gives nothing new
    ======================================= ========================================================================

    Args:
        loader: of a map-style data set.
        batches: the number of batches of each pass that are used; default: all.

    Raises:
        ValueError: a sampler that cannot be copied, does not end, or gives other indices in every pass.

    >>> from torch.utils.data import SubsetRandomSampler
    >>> support(DataLoader(range(100), sampler=SubsetRandomSampler([3, 1, 2]))).places
    [3, 1, 2]
    """
    with isolated_rng():  # samplers may draw from the global random state
        return _support(loader, batches)


def batch_size_of(loader: DataLoader[Any]) -> int | None:
    """The batch size of a loader that makes its batches; None where its data set or own batch sampler makes them.

    >>> batch_size_of(DataLoader(range(9), batch_sampler=BatchSampler(range(9), 4, drop_last=False)))
    4
    """
    if isinstance(loader.dataset, IterableDataset):
        return loader.batch_size
    own: Any = loader.batch_sampler
    return int(own.batch_size) if type(own) is BatchSampler else None


def _support(loader: DataLoader[Any], batches: int | None) -> Support:
    # A loader with a given batch sampler has no batch size and sampler of its own.
    own: Any = loader.batch_sampler
    if own is None:
        if _gives_lists(loader):
            return _grouped(loader.sampler, loader, batches)
        order = _order(loader.sampler, loader)
        return order.support(order.length if batches is None else min(order.length, batches * order.replicas))
    if type(own) is not BatchSampler:
        return _grouped(own, loader, batches)
    order = _order(own.sampler, loader)
    size = own.batch_size * order.replicas
    length = order.length - order.length % size if own.drop_last else order.length
    return order.support(length if batches is None else min(length, batches * size))


def _order(sampler: Any, loader: DataLoader[Any]) -> _Order:
    if _runs(sampler, SequentialSampler):
        return _Order(range(len(sampler.data_source)), len(sampler.data_source), fixed=True)
    if _runs(sampler, RandomSampler):
        n = len(sampler.data_source)
        weights = torch.ones(n, dtype=torch.float64) if sampler.replacement else None
        return _Order(range(n), sampler.num_samples, fixed=False, weights=weights)
    if _runs(sampler, SubsetRandomSampler):
        places = _once(sampler.indices)
        return _Order(places, len(places), fixed=False)
    if _runs(sampler, WeightedRandomSampler):
        weights = sampler.weights.double().cpu()
        places = weights.nonzero().flatten().tolist()
        return _Order(places, sampler.num_samples, fixed=False, weights=weights[places])
    if isinstance(sampler, DistributedSampler):
        inner = wrapped_sampler(sampler.dataset)
        if inner is None:
            order = _Order(range(len(sampler.dataset)), len(sampler.dataset), fixed=not sampler.shuffle)  # type: ignore[arg-type]
        else:
            order = _order(inner, loader)
        return _Order(order.places, order.length, order.fixed, order.weights, sampler.num_replicas)
    passes = _passes(sampler, loader)
    length = len(passes[0])
    if all(each == passes[0] for each in passes):
        return _Order(passes[0], length, fixed=True)
    places = _once(itertools.chain.from_iterable(passes))
    repeats = length > len(_once(passes[0]))
    return _Order(places, length, False, torch.ones(len(places), dtype=torch.float64) if repeats else None)


def _grouped(batch_sampler: Any, loader: DataLoader[Any], batches: int | None) -> Support:
    """The support of a sampler that gives lists of indices."""
    passes = [[list(map(_place, batch)) for batch in each] for each in _passes(batch_sampler, loader)]
    fixed = all(each == passes[0] for each in passes)
    seen: set[Any] = set()
    groups: list[list[Any]] = []
    for batch in itertools.chain.from_iterable([passes[0][:batches]] if fixed else passes):
        new = [place for place in dict.fromkeys(batch) if place not in seen]
        seen.update(new)
        groups += [new] if new else []
    places = [place for group in groups for place in group]
    given = len({place for batch in passes[0][:batches] for place in batch})
    missed = 0.0 if fixed else 1 - given / max(1, len(places))
    return Support(places, groups, torch.tensor(missed, dtype=torch.float64))


def _passes(sampler: Any, loader: DataLoader[Any]) -> list[list[Any]]:
    """Whole passes over a copy of a sampler: at least two, until one gives no new index."""
    name = type(sampler).__name__
    mine = _copied(sampler, loader)
    # Some samplers never end. A pass may contain repetitions, but not that many.
    most = 1000 + 100 * len(loader.dataset) if hasattr(loader.dataset, "__len__") else 10**7
    passes: list[list[Any]] = []
    seen: set[Any] = set()
    for number in range(_PASSES):
        if hasattr(mine, "set_epoch"):
            mine.set_epoch(number)
        passes.append([_place(item) for item in itertools.islice(mine, most + 1)])
        if len(passes[-1]) > most:
            raise ValueError(
                f"which examples the {name} gives cannot be determined: it does not end. Pass the examples themselves "
                "as a data set (for members: members=...)."
            )
        new = {place for item in passes[-1] for place in (item if isinstance(item, list) else [item])} - seen
        seen |= new
        if number > 0 and not new:
            return passes
    raise ValueError(
        f"which examples the {name} gives cannot be determined: each of {_PASSES} passes over a copy gave others. Pass "
        "the examples themselves as a data set (for members: members=...)."
    )


def _copied(sampler: Any, loader: DataLoader[Any]) -> Any:
    try:
        return copy.deepcopy(sampler, _shared(loader.dataset))
    except Exception as error:
        raise ValueError(
            f"which examples the {type(sampler).__name__} gives cannot be determined: it cannot be copied ({error}). "
            "Pass the examples themselves as a data set (for members: members=...)."
        ) from error


def _gives_lists(loader: DataLoader[Any]) -> bool:
    """Whether the sampler gives the indices of a whole batch, which the data set takes as a list."""
    return isinstance(_place(next(iter(_copied(loader.sampler, loader)), None)), list)


def _shared(data: Any) -> dict[int, Any]:
    """The memo of a deep copy that shares a data set and those inside it."""
    shared: dict[int, Any] = {}
    while data is not None and id(data) not in shared:
        shared[id(data)] = data
        data = getattr(data, "dataset", None)
    return shared


def _runs(sampler: Any, kind: type) -> bool:
    """Whether it is of this class and does not override the iteration."""
    return isinstance(sampler, kind) and type(sampler).__iter__ is kind.__iter__  # type: ignore[attr-defined]


def _place(item: Any) -> Any:
    """An index as a plain value; a list of them stays one."""
    if isinstance(item, (list, Tensor)) and not (isinstance(item, Tensor) and item.ndim == 0):
        return [_place(each) for each in item]
    return item.item() if isinstance(item, Tensor) else item


def _once(places: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(_place(place) for place in places))
