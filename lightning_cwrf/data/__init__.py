"""Data: reading batches again, recognising examples, and finding those that are in two data sets."""

from lightning_cwrf.data.examples import (
    Key,
    all_digests,
    all_ids,
    check_reads_alike,
    check_side,
    example_digests,
    example_ids,
    fingerprints,
    reads_alike,
    tensors_of,
)
from lightning_cwrf.data.loading import (
    Batches,
    SeededOrder,
    as_loader,
    bring_to,
    check_batches,
    cycle,
    first_batches,
    move,
)
from lightning_cwrf.data.overlap import Overlap, OverlapCheck, check_disjoint, same_examples, without_overlap
from lightning_cwrf.data.rng import isolated_rng

__all__ = [
    "Batches",
    "Key",
    "Overlap",
    "OverlapCheck",
    "SeededOrder",
    "all_digests",
    "all_ids",
    "as_loader",
    "bring_to",
    "check_batches",
    "check_disjoint",
    "check_reads_alike",
    "check_side",
    "cycle",
    "example_digests",
    "example_ids",
    "fingerprints",
    "first_batches",
    "isolated_rng",
    "move",
    "reads_alike",
    "same_examples",
    "tensors_of",
    "without_overlap",
]
