"""Private examples, each of which is collated and transferred by itself, so that it cannot depend on others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lightning_cwrf.data import Batches, check_batches, example_ids, isolated_rng, reads_alike
from lightning_cwrf.data.examples import ExampleId, is_whole
from lightning_cwrf.data.loading import Collated, loader_like
from lightning_cwrf.data.poisson import whole_order

_AT_ONCE = 256
"""Within how many examples those of equal shape are looked for."""


class PrivateExamples:
    """The examples of a data set, in its order: ``collate_fn`` and ``transfer`` see one example at a time.

    What either makes of an example can then not depend on others (padding to the longest of a batch, mixing).

    Args:
        data: a data set, or a loader of all of it.
        transfer: applied to each example, a batch of one.

    Raises:
        TypeError: a stream, an iterator, or batches without the examples that they are made of.
        ValueError: a loader that leaves examples out, or draws them.

    >>> examples = PrivateExamples(TensorDataset(torch.randn(5, 2), torch.zeros(5, dtype=torch.long)))
    >>> [len(inputs) for inputs, _ in examples.groups(2)]
    [2, 2, 1]
    """

    def __init__(self, data: Batches, transfer: Callable[[Any], Any] | None = None) -> None:
        check_batches(data, "the private data")
        _check_access(data)
        if isinstance(data, DataLoader):
            _check_whole(data)
        own = data.collate_fn if isinstance(data, Collated) else None
        self.loader: DataLoader[Any] = data if isinstance(data, DataLoader) else DataLoader(data, collate_fn=own)  # type: ignore[arg-type]
        self.transfer = transfer

    def __len__(self) -> int:
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def ids(self) -> list[ExampleId]:
        """The identity of each example.

        Raises:
            ValueError: there is none; data that read differently each time; another number than the data set has.
        """
        if not len(self):
            raise ValueError("the private data hold no example.")
        with isolated_rng():
            ids = [known for example in self._collated(None) for known in example_ids(example)]
        self.check_number(len(ids))
        if not reads_alike(self._loader(None)):
            raise ValueError(
                "the private data read differently each time (random augmentation, or examples that are mixed): the "
                "gradient of an example must be its own. Leave that out."
            )
        return ids

    def check_number(self, seen: int) -> None:
        """Raise a ValueError where a pass gave another number of examples than the data set has."""
        if seen != len(self):
            raise ValueError(
                f"a pass over the private data gave {seen} examples, and the data set has {len(self)}: each must count "
                "once. If its items are batches, pass a data set of single examples."
            )

    def groups(self, size: int, first: int | None = None) -> Iterator[Any]:
        """The examples, or the ``first`` of them, in batches of at most ``size`` that have the same shapes."""
        examples = iter(self._alone(first))
        if size == 1:  # in their order
            yield from (pytree.tree_map(_stacked, example) for example in examples)
        while some := list(itertools.islice(examples, _AT_ONCE)):
            alike: dict[Any, list[Any]] = {}
            for example in some:
                alike.setdefault(_form(example), []).append(example)
            for group in alike.values():
                for begin in range(0, len(group), size):
                    yield pytree.tree_map(_stacked, *group[begin : begin + size])

    def _alone(self, first: int | None) -> Iterator[Any]:
        """Each example as a batch of one."""
        for example in self._collated(first):
            _check_one(example)
            yield example if self.transfer is None else self.transfer(example)

    def _collated(self, first: int | None) -> Iterable[Any]:
        data = self.loader.dataset
        if type(data) is TensorDataset and self.loader.collate_fn is default_collate:  # the same, without a copy
            places = range(len(self) if first is None else min(first, len(self)))
            return ([tensor[i : i + 1] for tensor in data.tensors] for i in places)
        return self._loader(first)

    def _loader(self, first: int | None) -> DataLoader[Any]:
        if first is None:
            return loader_like(self.loader, batch_size=1)
        single: dict[str, Any] = {"num_workers": 0, "timeout": 0, "multiprocessing_context": None}
        return loader_like(self.loader, batch_size=1, sampler=range(min(first, len(self))), **single)


def _check_access(data: Any) -> None:
    if not is_whole(data):
        raise TypeError(
            "the private data are read once for each draw: pass a data set or a loader of one, not a stream."
        )
    if not isinstance(data, (Dataset, DataLoader)):
        raise TypeError(
            "the private data are batches, and what is in one example may have been made of others (padding, "
            "normalisation): pass a data set of single examples, such as TensorDataset(inputs, targets), or a loader "
            "of one."
        )
    if isinstance(data, DataLoader) and data.batch_sampler is None:
        raise TypeError(
            "the private loader has batch_size=None, so its data set makes the batches, and an example could depend on "
            "others: pass a loader with batch_size= over a data set of single examples."
        )


def _check_whole(loader: DataLoader[Any]) -> None:
    if whole_order(loader) is None:
        raise ValueError(
            "the private loader's sampler chooses examples, so that one example could decide about others: pass a "
            "loader with batch_size= of the whole dataset, or of a Subset."
        )
    if loader.drop_last or getattr(loader.batch_sampler, "drop_last", False):
        raise ValueError(
            "the private loader has drop_last=True, so that one example could decide about others: every example must "
            "count once. Leave it out."
        )


def _check_one(example: Any) -> None:
    """Raise a ValueError unless every tensor has one row: what a batch holds beside could be of other examples."""
    for leaf in pytree.tree_leaves(example):
        if isinstance(leaf, (Tensor, np.ndarray)) and (leaf.ndim == 0 or len(leaf) != 1):
            raise ValueError(
                "one example of the private data, collated by itself, must give tensors with one row for each example, "
                f"not the shape {tuple(leaf.shape)}: let the data set give single examples, and the collate_fn batches."
            )


def _form(example: Any) -> Any:
    leaves, structure = pytree.tree_flatten(example)
    shapes = [
        (str(leaf.dtype), tuple(leaf.shape)) if isinstance(leaf, (Tensor, np.ndarray)) else None for leaf in leaves
    ]
    return str(structure), *shapes


def _stacked(*leaves: Any) -> Any:
    if isinstance(leaves[0], np.ndarray):
        return torch.from_numpy(np.concatenate(leaves))
    return torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0]
