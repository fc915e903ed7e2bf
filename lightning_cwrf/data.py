"""Batches: where they come from, how they are begun again, and how an example is recognised by its content."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from lightning_cwrf.classification import split_batch

if TYPE_CHECKING:
    Batches: TypeAlias = Dataset[Any] | DataLoader[Any] | Iterable[Any]
else:  # from a YAML file, jsonargparse would make a plain Dataset of a subclass of Dataset[Any]
    Batches = Dataset | DataLoader | Iterable
"""Where batches come from: a data set of single examples, a loader, or an iterable of batches."""


@contextmanager
def isolated_rng(device: torch.device | None = None) -> Iterator[None]:
    """Give the caller's random state (Python, NumPy, torch on CPU and on ``device``) back as it was."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is kept
    devices = [device] if device is not None and device.type not in ("cpu", "meta") else []
    kind = devices[0].type if devices else "cuda"
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def move(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move every tensor of a nested batch to ``device``, those of floats to ``dtype``; everything else stays."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else None)
    if isinstance(batch, Mapping):
        return {key: move(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device, dtype) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(move(value, device, dtype) for value in batch)
    return batch


def bring_to(model: nn.Module) -> Callable[[Any], Any]:
    """Moves a batch to where the model is; a model of half or double precision (``bf16-true``) wants such inputs."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return functools.partial(move, device=first.device, dtype=None if first.dtype == torch.float32 else first.dtype)


def as_loader(
    data: Batches, *, shuffle: bool, batch_size: int = 256, generator: torch.Generator | None = None
) -> Iterable[Any]:
    """A fresh pass over ``data`` that shares no iterator, sampler or worker with its owner.

    A running ``DataLoader`` with persistent workers has one iterator only, so iterating it from a callback would take
    batches from the training loop. Hence the loader is built anew over the same dataset, with every example in it.

    Args:
        data: a ``DataLoader``, a ``Dataset`` (of single examples), or any iterable of batches, which is returned as is.
        shuffle: draw the examples in random order, else in the dataset's order.
        batch_size: for a bare ``Dataset``.
        generator: of the order; None: torch's global one.
    """
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=batch_size)
    if not isinstance(data, (DataLoader, Iterable)):
        raise TypeError(f"expected a DataLoader, a Dataset or an iterable of batches, not {type(data).__name__}.")
    if not isinstance(data, DataLoader):
        return data
    common: dict[str, Any] = {
        "num_workers": data.num_workers,
        "collate_fn": data.collate_fn,
        "worker_init_fn": data.worker_init_fn,
        "multiprocessing_context": data.multiprocessing_context,
        "timeout": data.timeout,
        "generator": generator,
    }
    if isinstance(data.dataset, IterableDataset):
        return DataLoader(data.dataset, batch_size=data.batch_size, **common)
    own_batches = data.batch_sampler
    if own_batches is not None and type(own_batches) is not BatchSampler and not hasattr(own_batches, "batch_size"):
        return DataLoader(data.dataset, batch_sampler=own_batches, **common)
    size = data.batch_size if data.batch_size is not None else getattr(own_batches, "batch_size", None)
    return DataLoader(data.dataset, batch_size=size, shuffle=shuffle, **common)


def cycle(batches: Iterable[Any], name: str) -> Iterator[Any]:
    """Yield batches for ever, beginning again when they run out.

    Raises:
        ValueError: there is no batch at all, or a one-shot iterator ran out and cannot be begun again.
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
                f"{name} ran out after {seen} batches and cannot be begun again; pass a list or a DataLoader "
                "instead of a generator."
            )


def tensors_of(inputs: Any) -> list[Tensor]:
    """The tensors of a nest of inputs, in the order of their keys."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, np.ndarray):
        return [torch.from_numpy(inputs)]
    if isinstance(inputs, Mapping):
        return [leaf for key in sorted(inputs) for leaf in tensors_of(inputs[key])]
    if isinstance(inputs, (tuple, list)):
        return [leaf for value in inputs for leaf in tensors_of(value)]
    raise TypeError(f"cannot tell examples apart by content in inputs of type {type(inputs).__name__}.")


def fingerprints(inputs: Any) -> list[bytes]:
    """One 16-byte digest of content per example of a batch of inputs (a tensor, or a nest of tensors).

    Two examples have the same digest when their values, shape and dtype are the same, whatever their position.

    >>> a, b, c = fingerprints(torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]))
    >>> a == c, a == b
    (True, False)
    """
    leaves = [leaf.detach().cpu().contiguous() for leaf in tensors_of(inputs)]
    if not leaves or any(leaf.ndim == 0 or len(leaf) != len(leaves[0]) for leaf in leaves):
        raise ValueError(f"every input must have the batch first, not shapes {[tuple(leaf.shape) for leaf in leaves]}.")
    head = repr([(str(leaf.dtype), tuple(leaf.shape[1:])) for leaf in leaves]).encode()
    rows = [leaf.reshape(len(leaf), -1).view(torch.uint8).numpy() for leaf in leaves]
    digests = []
    for example in zip(*rows, strict=True):
        digest = hashlib.blake2b(head, digest_size=16)
        for row in example:
            digest.update(row.tobytes())
        digests.append(digest.digest())
    return digests


def example_digests(batch: Any) -> list[bytes]:
    """:func:`fingerprints` of a batch's inputs; of the whole batch where only the user's own step can take it apart."""
    try:
        inputs, _ = split_batch(batch)
    except TypeError:
        inputs = batch
    return fingerprints(inputs)


def reads_alike(data: Batches) -> bool:
    """Whether the first batch, labels too, is the same when it is read again; random augmentation makes it another."""
    with isolated_rng():  # a loader draws a seed for its workers
        first, again = (
            [fingerprints(batch) for batch in itertools.islice(as_loader(data, shuffle=False), 1)] for _ in range(2)
        )
    return first == again


def all_digests(data: Batches) -> set[bytes] | None:
    """Digests of every example, read in order; None where the data cannot be read whole and again.

    A list of batches can, and so can a map-style dataset or a loader of one.
    """
    source = data.dataset if isinstance(data, DataLoader) else data
    whole = not isinstance(source, IterableDataset) if isinstance(source, Dataset) else isinstance(source, Sequence)
    if not whole:
        return None
    return {digest for batch in as_loader(data, shuffle=False) for digest in example_digests(batch)}


def check_disjoint(members: Iterable[bytes], nonmembers: Sequence[bytes] | set[bytes], name: str) -> None:
    """Raise a ValueError when an example stands among the members and among the data called ``name``."""
    common = set(members).intersection(nonmembers)
    if common:
        raise ValueError(
            f"{len(common)} of the {len(set(nonmembers))} distinct examples of {name} are members (the very same "
            "content): reference and non-member data must never have been trained on. Remove them."
        )


class OverlapCheck:
    """Compares members with other data by content: whole, or batch by batch where one cannot be read whole.

    Args:
        members: training data; None: only what :meth:`see` is shown.
        others: data that must be apart from them.
        name: of the others, for the error.

    Raises:
        ValueError: an example stands on both sides.
    """

    def __init__(self, members: Batches | None, others: Batches, name: str) -> None:
        self.name = name
        self._seen: tuple[set[bytes], set[bytes]] = (set(), set())
        inside, outside = (None if data is None else all_digests(data) for data in (members, others))
        self._whole = inside is not None and outside is not None
        if inside is not None and outside is not None:
            check_disjoint(inside, outside, name)

    def see(self, member_batch: Any, batch: Any) -> None:
        """Compare one more batch of each side with all that were seen, unless everything was compared already."""
        if self._whole:
            return
        for seen, shown in zip(self._seen, (member_batch, batch), strict=True):
            seen.update(example_digests(shown))
        check_disjoint(*self._seen, self.name)


class SeededOrder(Sampler[int]):
    """Another order of n examples each epoch, a function of seed and epoch alone; Lightning sets the epoch."""

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
