"""Examples that are in two data sets: an error, left out, or allowed."""

from __future__ import annotations

import operator
import random
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from lightning_cwrf.data.examples import ExampleId, Key, all_ids, example_ids, is_whole, reads_alike
from lightning_cwrf.data.loading import Batches, as_loader, loader_like, rebuilt
from lightning_cwrf.data.sampling import support

Overlap: TypeAlias = Literal["error", "drop", "allow"]
"""What to do with an example that is in two data sets: raise an error, leave it out of the second, or keep it."""

OVERLAPS = ("error", "drop", "allow")
REMEDY = (
    'Leave them out: lightning_cwrf.without_overlap returns the data without them, and overlap="drop" does so here. '
    'Where different examples may share all their content (categorical data), pass key=, or overlap="allow".'
)


def places_among(ids: Sequence[Hashable], others: Collection[Hashable]) -> list[int]:
    """The indices of those ``ids`` that are among the others."""
    return [place for place, known in enumerate(ids) if known in others]


def told(places: Sequence[int], total: int, name: str, what: str, by: str = "the same inputs and label") -> str:
    """A message: how many examples of the data called ``name`` are something else too, and where.

    >>> told([0, 4], 9, "nonmembers", "members")
    '2 of the 9 examples of nonmembers are members (the same inputs and label), at positions 0, 4'
    """
    shown = ", ".join(map(str, places[:10])) + (", ..." if len(places) > 10 else "")
    return f"{len(places)} of the {total} examples of {name} are {what} ({by}), at positions {shown}"


def check_disjoint(
    members: Sequence[Hashable], others: Sequence[Hashable], name: str, what: str = "members", *, whole: bool = True
) -> None:
    """Raise a ValueError if an example of the data called ``name`` is among the members, by its inputs.

    If many members share their content (categorical data), content identifies no example: then it is a warning, unless
    these are not the ``whole`` of them. Both are digests of inputs; ``what`` is what the message calls members.
    """
    places = places_among(others, set(members))
    if not places:
        return
    message = told(places, len(others), name, what, "the same inputs")
    if whole and is_ambiguous(members):
        warnings.warn(
            f"{message}. Many of the latter share their content with one another, so this may be chance: make sure "
            "that the data are disjoint.",
            stacklevel=5,
        )
        return
    raise ValueError(
        f"{message}: reference and non-member data must never have been trained on. lightning_cwrf.without_overlap "
        "gives the data without them."
    )


@overload
def without_overlap(data: Dataset[Any], *others: Batches, key: Key | None = None) -> Subset[Any]: ...
@overload
def without_overlap(data: DataLoader[Any], *others: Batches, key: Key | None = None) -> DataLoader[Any]: ...
def without_overlap(data: Any, *others: Batches, key: Key | None = None) -> Any:
    """The data without the examples that are also in the others, by inputs and label or by ``key``.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> x, y = torch.arange(6.0).view(6, 1), torch.zeros(6, dtype=torch.long)
    >>> train, test = TensorDataset(x[:4], y[:4]), TensorDataset(x[2:], y[2:])
    >>> [float(example) for example, _ in without_overlap(test, train)]
    [4.0, 5.0]

    Args:
        data: a map-style data set, or a DataLoader of one.
        others: loaders, data sets or lists of batches, which are read completely.
        key: gives the id of one example, in the form of its batch: ``(x[i], y[i])`` or
            ``{"ids": ids[i], "label": y[i]}``. Default: examples are compared by inputs and label.

    Returns:
        A ``Subset`` of a data set; or a DataLoader over one, in order, with the same batch size, workers and collate
        function.

    Raises:
        TypeError: not map-style data, or others that cannot be read completely.
        ValueError: data that read differently each time.
    """
    if not isinstance(data, (Dataset, DataLoader)) or isinstance(getattr(data, "dataset", data), IterableDataset):
        raise TypeError(
            f"without_overlap needs a map-style data set or a DataLoader of one, not {type(data).__name__}."
        )
    taken: set[ExampleId] = set()
    for each in (data, *others):
        if key is None and not reads_alike(each):
            raise ValueError(
                "the data read differently each time (random augmentation), so their examples cannot be compared by "
                "content; pass plain data, or key=."
            )
        ids = all_ids(each, key)
        if ids is None:
            raise TypeError(
                "the data must be read completely: pass data sets, DataLoaders of them, or lists of batches."
            )
        if each is data:
            own = ids
        else:
            taken.update(ids)
    loader = data if isinstance(data, DataLoader) else DataLoader(data)
    places = support(loader).places
    kept = [place for place, known in zip(places, own, strict=True) if known not in taken]
    subset = Subset(loader.dataset, kept)
    return rebuilt(loader, subset) if isinstance(data, DataLoader) else subset


def same_examples(first: Batches, second: Batches) -> bool:
    """Whether two data sets hold the same examples, in any order, by inputs and label.

    Parts of the same objects, such as a ``Subset`` of a ``Subset``, are compared by their indices. Otherwise both are
    read completely, once, and a few batches twice. Where random augmentation changes both, each is read from the same
    random state, so that an augmentation that draws from it is the same for equal examples. Where that does not
    help, or one of them alone is augmented, labels are compared, each as often as it occurs. Streams, which cannot be
    read completely, are not compared, and count as the same.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> x, y = torch.arange(6.0).view(6, 1), torch.zeros(6, dtype=torch.long)
    >>> same_examples(TensorDataset(x, y), TensorDataset(x.flip(0), y)), same_examples([(x, y)], [(x + 1, y)])
    (True, False)
    """
    if not (is_whole(first) and is_whole(second)):
        return True
    here, there = origins(first), origins(second)
    if here and there and {source for source, _ in here} == {source for source, _ in there}:
        return Counter(here) == Counter(there)
    alike = [reads_alike(data) for data in (first, second)]
    if not any(alike):
        first, second = (_steady(data) for data in (first, second))
        alike = [reads_alike(data) for data in (first, second)]
    ids, more = (Counter(all_ids(data) or ()) for data in (first, second))
    return ids == more if all(alike) else _by_label(ids) == _by_label(more)


def _by_label(ids: Counter[ExampleId]) -> dict[int | None, int]:
    """How often each label occurs."""
    found: dict[int | None, int] = {}
    for (_, label), count in ids.items():
        found[label] = found.get(label, 0) + count
    return found


def origins(data: Batches) -> list[tuple[int, Any]] | None:
    """Where each example comes from, below any ``Subset`` and ``ConcatDataset``; None: the data have no indices.

    Each is the ``id`` of the object that holds the example, and the example's index in it.
    """
    source: Any = data.dataset if isinstance(data, DataLoader) else data
    if not isinstance(source, Dataset) or not hasattr(source, "__len__"):  # a list of batches, or no map-style data
        return None
    places = support(data).places if isinstance(data, DataLoader) else range(len(source))
    return [_origin(source, place) for place in places]


def _origin(source: Any, place: Any) -> tuple[int, Any]:
    while hasattr(place, "__index__"):  # an int, of NumPy too
        place = operator.index(place)
        if type(source) is Subset:
            source, place = source.dataset, source.indices[place]
        elif type(source) is ConcatDataset:
            place %= len(source)
            part = bisect_right(source.cumulative_sizes, place)
            source, place = source.datasets[part], place - (source.cumulative_sizes[part - 1] if part else 0)
        else:
            return id(source), place + len(source) if place < 0 else place
    return id(source), place


class _Steady(Dataset[Any]):
    """A data set that is read from the same random state for each example; it leaves another one behind."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, place: Any) -> Any:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the global state is what users draw from
        torch.manual_seed(0)
        return self.data[place]


def _steady(data: Batches) -> Batches:
    """The data, in order, each example read from the same random state; lists of batches as they are."""
    loader = as_loader(data, shuffle=False)
    if not isinstance(loader, DataLoader):
        return data
    order: dict[str, Any] = {"batch_sampler": loader.batch_sampler}
    if loader.batch_sampler is None:
        order = {"batch_size": None, "sampler": loader.sampler}
    return loader_like(loader, dataset=_Steady(loader.dataset), **order)


class OverlapCheck:
    """Compares members with other data by their inputs: all at once, or batch by batch where that is impossible.

    Where many members share their content (categorical data), content does not identify an example, and an overlap is a
    warning. Where data read differently each time, nothing can be compared, which is a warning too. Where the members
    are None, only the batches given to :meth:`see` are compared.

    Attributes:
        others: the identity of each of the others; None where they cannot be read completely, or change.

    Raises:
        ValueError: an example is in both.
    """

    def __init__(self, members: Batches | None, others: Batches, name: str, what: str = "members") -> None:
        self.name = name
        self.what = what
        self._seen: tuple[list[ExampleId], list[ExampleId]] = ([], [])
        self._done = False
        self.others: list[ExampleId] | None = None
        changing = [what for data, what in ((members, "the training data"), (others, name)) if not _alike(data)]
        if changing:
            self._done = True
            warnings.warn(
                f"{' and '.join(changing)} read differently each time (random augmentation), so whether {name} hold "
                "training examples cannot be checked by content: make sure they do not.",
                stacklevel=3,
            )
            return
        inside, outside = (None if data is None else all_ids(data) for data in (members, others))
        self.others = outside
        if inside is not None and outside is not None:
            self._done = True
            self._compare(inside, outside)

    def see(self, member_batch: Any, batch: Any) -> None:
        """Compare one more batch of each with all batches so far, unless everything was compared at once."""
        if self._done:
            return
        for seen, shown in zip(self._seen, (member_batch, batch), strict=True):
            seen.extend(example_ids(shown))
        self._compare(*self._seen, whole=False)

    def _compare(self, inside: list[ExampleId], outside: list[ExampleId], whole: bool = True) -> None:
        # Labels do not count: those of reference data need not be true.
        members, others = ([digest for digest, _ in ids] for ids in (inside, outside))
        check_disjoint(members, others, self.name, self.what, whole=whole)


def is_ambiguous(ids: Sequence[Hashable]) -> bool:
    """Whether so many examples of a data set share their content that it identifies none: more than one in ten.

    >>> is_ambiguous([("a", 0), ("b", 0)]), is_ambiguous([("a", 0), ("a", 0), ("b", 0)])
    (False, True)
    """
    doubles = sum(count for count in Counter(ids).values() if count > 1)
    return doubles > 0.1 * len(ids)


def _alike(data: Batches | None) -> bool:
    """Whether map-style data read alike; others are not read."""
    source = data.dataset if isinstance(data, DataLoader) else data
    if not isinstance(source, Dataset) or isinstance(source, IterableDataset):
        return True
    return data is None or reads_alike(data)
