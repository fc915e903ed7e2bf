"""The identity of an example: the content of its inputs and its label, or the user's own id."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_cwrf.classification import split_batch
from lightning_cwrf.data.loading import Batches, as_loader, check_batches, iterates_itself, some_batches
from lightning_cwrf.data.rng import isolated_rng
from lightning_cwrf.targets import class_indices

Key: TypeAlias = Callable[[Any], Hashable]
"""Gives the id of one example, in the form of its batch: ``(x[i], y[i])`` or ``{"ids": ids[i], "label": y[i]}``."""

ExampleId: TypeAlias = tuple[Hashable, int | None]
"""The identity of an example: a digest of its inputs and its label, or a key and None."""

_MASK = "attention_mask"
_NUMBERS = {"idx", "index", "indices", "id", "ids", "uid", "guid"}
"""Keys of a batch (also as the last part, ``sample_idx``) that number its examples."""


def tensors_of(inputs: Any) -> list[Tensor]:
    """The tensors of a nest of inputs, in the order of their keys."""
    if isinstance(inputs, Tensor):
        return [inputs.to_dense() if inputs.layout is not torch.strided else inputs]
    if isinstance(inputs, np.ndarray):
        return [torch.from_numpy(inputs)]
    if isinstance(inputs, Mapping):
        return [leaf for key in sorted(inputs) for leaf in tensors_of(inputs[key])]
    if isinstance(inputs, (tuple, list)):
        return [leaf for value in inputs for leaf in tensors_of(value)]
    raise TypeError(
        f"cannot recognise examples by content in inputs of type {type(inputs).__name__}: give batches of tensors, "
        "arrays or texts, the examples first (by the loader's collate_fn); build the object in classification_step."
    )


def fingerprints(inputs: Any) -> list[bytes]:
    """One 16-byte digest of content per example of a batch of inputs (a tensor, or a nest of tensors).

    Two examples have the same digest when their values, shape and dtype are the same, whatever their position. The
    padding of a batch does not count: neither what an ``attention_mask`` ``(n, length)`` masks in the other inputs, at
    either end, nor zeros at the end of integer sequences.

    >>> a, b, c = fingerprints(torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]))
    >>> a == c, a == b
    (True, False)
    >>> fingerprints(torch.tensor([[5, 7, 0]])) == fingerprints(torch.tensor([[5, 7, 0, 0, 0]]))
    True
    """
    mask = inputs.get(_MASK) if isinstance(inputs, Mapping) else None
    mask = None if not isinstance(mask, Tensor) or mask.ndim != 2 else mask.detach().cpu().bool()
    columns = _columns(inputs, mask)
    lengths = [len(rows) for _, rows in columns]
    if not columns or len(set(lengths)) > 1:
        raise ValueError(f"every input must have the batch first, not lengths {lengths}.")
    head = repr([kind for kind, _ in columns]).encode()
    digests = []
    for example in zip(*(rows for _, rows in columns), strict=True):
        digest = hashlib.blake2b(head, digest_size=16)
        for row in example:
            # With the lengths, rows of different lengths cannot be confused when joined.
            digest.update(len(row).to_bytes(8, "little") + row)
        digests.append(digest.digest())
    return digests


def _columns(inputs: Any, mask: Tensor | None) -> list[tuple[Any, list[bytes]]]:
    """Each leaf of a nest of inputs: its kind, and the bytes of each example."""
    if isinstance(inputs, Mapping):
        return [column for key in sorted(inputs) for column in _columns(inputs[key], mask)]
    if isinstance(inputs, (tuple, list)):
        if inputs and all(isinstance(value, (str, bytes, int, float)) for value in inputs):
            return [("text", [repr(value).encode() for value in inputs])]
        return [column for value in inputs for column in _columns(value, mask)]
    (leaf,) = tensors_of(inputs)
    leaf = leaf.detach().cpu().contiguous()
    if leaf.ndim == 0:
        raise ValueError("every input must have the batch first, not shape ().")
    masked = mask is not None and leaf.shape[:2] == mask.shape
    shape = ("sequence", *leaf.shape[2:]) if masked or _is_sequence(leaf) else tuple(leaf.shape[1:])
    return [((str(leaf.dtype), shape), _masked(leaf, mask) if masked and mask is not None else _rows(leaf))]


def _is_sequence(leaf: Tensor) -> bool:
    return leaf.ndim == 2 and not leaf.is_floating_point() and not leaf.is_complex()


def _masked(leaf: Tensor, mask: Tensor) -> list[bytes]:
    """The bytes of the unmasked part of each example, wherever in its row that is."""
    kept = leaf[mask].reshape(-1).view(torch.uint8).numpy()
    size = len(kept) // max(1, int(mask.sum()))
    ends = [0, *(mask.sum(1).cumsum(0) * size).tolist()]
    return [kept[begin:end].tobytes() for begin, end in itertools.pairwise(ends)]


def _rows(leaf: Tensor) -> list[bytes]:
    """The bytes of each example; integer sequences without the zeros at their end."""
    if not _is_sequence(leaf):
        return [row.tobytes() for row in leaf.reshape(len(leaf), -1).contiguous().view(torch.uint8).numpy()]
    width = leaf.shape[1]
    # After the last value that is not zero; a row of zeros has none.
    ends = width - leaf.ne(0).flip(1).int().argmax(1) if width else torch.zeros(len(leaf), dtype=torch.long)
    ends[~leaf.ne(0).any(1)] = 0
    return [row[:end].tobytes() for row, end in zip(leaf.numpy(), ends.tolist(), strict=True)]


def example_digests(batch: Any) -> list[bytes]:
    """:func:`fingerprints` of a batch's inputs, without the running numbers of the examples.

    These are not content: the same example has another number in another data set. They are recognised by their key
    (``"idx"``, ``"sample_id"``). In a batch that only the user's own step can interpret, everything that is one integer
    per example (labels, an index) is left out, unless there is nothing else.

    >>> a, b = example_digests({"x": torch.zeros(2, 3), "idx": torch.tensor([0, 1]), "label": torch.tensor([0, 0])})
    >>> a == b
    True
    """
    try:
        inputs, _ = split_batch(batch)
    except TypeError:
        larger = [value for value in batch if not _numbers(value)] if isinstance(batch, (tuple, list)) else None
        return fingerprints(larger or batch)
    if isinstance(inputs, Mapping):
        content = {
            name: value
            for name, value in inputs.items()
            if str(name).lower().strip("_").rpartition("_")[2] not in _NUMBERS or not _numbers(value)
        }
        inputs = content or inputs
    return fingerprints(inputs)


def _numbers(value: Any) -> bool:
    """Whether it is one integer, or one text, per example."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(isinstance(each, (str, bytes, int)) for each in value)
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    return isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point() and not value.is_complex()


def example_ids(batch: Any, key: Key | None = None) -> list[ExampleId]:
    """The identity of each example of a batch: the content of its inputs and its label, or its key.

    >>> (first, label), _ = example_ids((torch.zeros(2, 3), torch.tensor([4, 5])))
    >>> len(first), label
    (16, 4)
    >>> example_ids((torch.zeros(2, 3), torch.tensor([4, 5])), key=lambda example: int(example[1]))
    [(4, None), (5, None)]
    """
    if key is not None:
        return [(known, None) for known in example_keys(batch, key)]
    try:
        _, targets = split_batch(batch)
        labels = class_indices(torch.as_tensor(targets)).tolist()
        labels = list(map(int, labels))
    except (TypeError, ValueError, RuntimeError):  # only the user's own step can find them
        labels = []
    digests = example_digests(batch)
    if len(labels) != len(digests):
        return [(digest, None) for digest in digests]
    return list(zip(digests, labels, strict=True))


def example_keys(batch: Any, key: Key) -> list[Hashable]:
    """The key of each example of a batch."""
    if not callable(key):
        raise TypeError(f"key must be a function of one example that gives its id, not {type(key).__name__}.")
    found: list[Hashable] = []
    for i in range(_size(batch)):
        known: Any = key(_example(batch, i))
        if isinstance(known, (Tensor, np.ndarray, np.generic)):
            known = known.tolist()
        if known is None or not isinstance(known, Hashable) or known != known:
            raise TypeError(
                f"key must give an id of its example, such as a number or a string, not a {type(known).__name__}."
            )
        found.append(known)
    return found


def _size(batch: Any) -> int:
    if isinstance(batch, (Tensor, np.ndarray)):
        return len(batch)
    for value in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(value, (Tensor, np.ndarray, Mapping, tuple, list)):
            return _size(value)
    return len(batch)  # of texts


def _example(batch: Any, i: int) -> Any:
    """One example of a batch, in the batch's form."""
    if isinstance(batch, Mapping):
        return {name: _example(value, i) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, np.ndarray, Mapping, tuple, list)):
        parts = [_example(value, i) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch[i]


def reads_alike(data: Batches) -> bool:
    """Whether some batches, with labels, are the same when read again; random augmentation changes them.

    The second time they are read in reverse: workers that start with the same random state in every pass would augment
    the same examples in the same way.
    """

    def read(backwards: bool) -> list[list[bytes]]:
        return [sorted(fingerprints(batch)) for batch in some_batches(data, backwards=backwards)]

    with isolated_rng():  # a loader draws a seed for its workers
        first, again = read(False), read(True)
    return first in (again, again[::-1])


def check_reads_alike(data: Batches, name: str, transfer: Callable[[Any], Any] | None = None) -> None:
    """Raise a ValueError where the data read differently each time, so that examples have no fixed content.

    The Trainer's ``transfer`` of a batch, with the user's own hooks, must not augment either.
    """
    if not reads_alike(data):
        raise ValueError(
            f"{name} read differently each time (random augmentation, or a stream that continues): an audit needs the "
            f"plain examples. Pass {name}= a data set or a loader without random transforms."
        )
    if transfer is None:
        return
    with isolated_rng():
        for batch in some_batches(data, examples=1, batches=1):
            if fingerprints(transfer(batch)) != fingerprints(transfer(batch)):
                raise ValueError(
                    f"the module's batch transfer hooks change {name} at random (on_after_batch_transfer): an audit "
                    "needs the plain examples. Audit the finished model with lightning_cwrf.audit, or move the "
                    "augmentation into training_step."
                )


def check_side(data: Batches, name: str, transfer: Callable[[Any], Any] | None) -> None:
    """Raise if one side cannot be audited; ``name`` is that of its argument."""
    check_batches(data, name)
    if isinstance(data, Iterator):
        raise TypeError(
            f"{name}: a {type(data).__name__} can be read only once, and an audit reads data again; pass a list of its "
            "batches, a DataLoader or a data set."
        )
    if iterates_itself(data):
        warnings.warn(
            f"{name}: {type(data).__name__} has an __iter__ of its own, which an audit does not use: it reads the "
            "loader's data set with its collate function. If __iter__ changes the batches, pass a list of them.",
            stacklevel=4,
        )
    check_reads_alike(data, name, transfer)


def is_whole(data: Batches) -> bool:
    """Whether data can be read completely and repeatedly: no stream, no iterator."""
    source = data.dataset if isinstance(data, DataLoader) else data
    return not isinstance(source, IterableDataset) if isinstance(source, Dataset) else isinstance(source, Sequence)


def all_ids(data: Batches, key: Key | None = None) -> list[ExampleId] | None:
    """The identity of every example, in order; None where the data cannot be read completely and repeatedly.

    Lists of batches, map-style datasets and loaders of these can.
    """
    if not is_whole(data):
        return None
    with isolated_rng():
        return [known for batch in as_loader(data, shuffle=False) for known in example_ids(batch, key)]


def all_digests(data: Batches) -> set[bytes] | None:
    """Digests of every example's inputs; None where the data cannot be read completely and repeatedly."""
    ids = all_ids(data)
    return None if ids is None else {digest for digest, _ in ids if isinstance(digest, bytes)}
