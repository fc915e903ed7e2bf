"""Reading the pool and the population, twice, to check that they read the same."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import csgraph
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_cwrf.classification import split_batch
from lightning_cwrf.data import as_loader, check_disjoint, example_digests, isolated_rng
from lightning_cwrf.data.loading import Collated
from lightning_cwrf.shadows.membership import balanced_membership
from lightning_cwrf.targets import class_indices


@dataclass(frozen=True)
class PoolData:
    """Digests and targets of the pool, and of the population, which has none where there is no population."""

    digests: list[bytes]
    targets: Tensor
    population: list[bytes]
    population_targets: Tensor


def read_data(pool: Dataset[Any], population: Dataset[Any] | None) -> PoolData:
    """Read and check the pool and the population."""
    digests, targets = _read(pool, "pool")
    none: tuple[list[bytes], Tensor] = ([], torch.empty(0, dtype=torch.long))
    others, other_targets = none if population is None else _read(population, "population")
    check_disjoint(digests, others, "the population", "in the pool, which shadow models train on")
    return PoolData(digests, targets, others, other_targets)


def batched(data: Any, recipe: Any) -> Any:
    """A data set whose examples are batched by the recipe's ``collate_fn`` where PyTorch's own cannot, as padded text.

    PyTorch's own comes first, because that of a recipe may augment at random.
    """
    collate_fn = getattr(recipe, "collate_fn", None)
    if collate_fn is None or not isinstance(data, Dataset) or isinstance(data, (Collated, IterableDataset)):
        return data
    with isolated_rng():
        try:
            for _ in DataLoader(data, batch_size=256):
                pass
        except (RuntimeError, TypeError):
            return Collated(data, collate_fn)
    return data


def joint_digest(digests: list[bytes]) -> str:
    """One digest of all examples, in order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _read(data: Dataset[Any], name: str) -> tuple[list[bytes], Tensor]:
    """Digests and targets of every example, read twice: a label may be random where an input is not."""
    if isinstance(data, DataLoader):
        raise TypeError(f"the {name} must be a data set, not a DataLoader; pass its dataset.")
    if not isinstance(data, Dataset) or isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise TypeError(
            f"the {name} must be a torch data set with a length whose examples are read by index, not a "
            f"{type(data).__name__}: each shadow model is trained on its own half. TensorDataset, or a class of your "
            "own with __len__ and __getitem__ on top of Dataset, is one."
        )
    if len(data) == 0:
        raise ValueError(f"the {name} is empty.")
    with isolated_rng():
        digests, targets = read_once(data, name)
        again, targets_again = read_once(data, name)
    if digests != again or not torch.equal(targets, targets_again):
        raise ValueError(
            f"the {name} reads differently each time{'' if digests != again else ', in its labels'}; move random "
            "augmentation into the recipe, so that examples can be identified by content."
        )
    if targets.ndim != 1 or targets.is_floating_point() or targets.dtype == torch.bool or targets.min() < 0:
        raise ValueError(
            f"the labels of the {name} must be class indices from 0 on, one for each example, not {targets.dtype} of "
            f"shape {tuple(targets.shape)}{', some of them negative' if targets.ndim == 1 else ''}."
        )
    return digests, targets


def read_once(data: Dataset[Any], name: str) -> tuple[list[bytes], Tensor]:
    """Digests and class indices of every example."""
    digests: list[bytes] = []
    targets = []
    for batch in as_loader(data, shuffle=False):
        try:
            targets.append(class_indices(split_batch(batch)[1]))
        except TypeError as error:
            raise TypeError(f"the {name} must give pairs (inputs, target), or dicts with a target: {error}") from error
        digests += example_digests(batch)
    return digests, torch.cat(targets)


def membership_of(n: int, digests: list[bytes], seed: int, groups: Tensor | None = None) -> Tensor:
    """Balanced halves in which all copies of an example are on the same side; else it would be both IN and OUT.

    ``groups``, numbers ``(n,)``: all examples of one group are on the same side too, and with them the groups that
    copies connect.
    """
    first: dict[bytes, int] = {}
    unit = torch.tensor([first.setdefault(digest, len(first)) for digest in digests])
    if len(first) < len(digests):
        warnings.warn(
            f"{len(digests) - len(first)} of the {len(digests)} examples of the pool are copies of others. Copies are "
            "IN or OUT together, and each counts in every measure; remove them if they are unintended.",
            stacklevel=4,
        )
    if groups is not None:
        unit = _joined(unit, groups)
        if int(unit.max()) == 0:
            raise ValueError("groups must leave two halves: they have one group, or are all connected by copies.")
    membership = balanced_membership(n, int(unit.max()) + 1, seed)[:, unit]
    shares = membership.double().mean(1)
    if groups is not None and float(shares.min()) < 1 / 3:
        warnings.warn(
            f"the groups differ so much in size that some shadow models are trained on {float(shares.min()):.0%} of "
            f"the pool, and others on {float(shares.max()):.0%}. Attacks take all of them for alike: have groups of "
            "more equal sizes.",
            stacklevel=4,
        )
    return membership


def _joined(unit: Tensor, group: Tensor) -> Tensor:
    """The number of each example's connected part, where examples of one unit or of one group are connected."""
    nodes = (unit.numpy(), (group + int(unit.max()) + 1).numpy())
    size = int(nodes[1].max()) + 1
    edges = sparse.coo_array((np.ones(len(unit), dtype=bool), nodes), shape=(size, size))
    _, part = csgraph.connected_components(edges, directed=False)
    found: dict[int, int] = {}
    return torch.tensor([found.setdefault(each, len(found)) for each in part[nodes[0]].tolist()])
