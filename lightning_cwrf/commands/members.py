"""Whether the members that are audited are those that the model was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from lightning_cwrf.commands.base import UsageError
from lightning_cwrf.data import Batches, all_ids, reads_alike


def check_fixed(members: Batches, again: Batches) -> None:
    """Raise where the members of a second run, under another random state, are others."""
    if _differ(members, again):
        raise UsageError(
            "--members are other examples under another random state, so those that the model was trained on are not "
            "known: the split depends on the random state: pass a generator with a fixed seed in random_split."
        )


def check_plain(members: Batches, plain: Batches) -> None:
    """Raise where ``--plain`` are not the members."""
    if _differ(members, plain):
        raise UsageError(
            "--plain are not the members: they must be the same examples as --members, all of them and no others, "
            "without random augmentation."
        )


def _differ(first: Batches, second: Batches) -> bool:
    """Whether they hold other examples, or where their content is random, others by their labels and number.

    Streams, which cannot be read completely, are not compared.
    """
    ids, others = all_ids(first), all_ids(second)
    if ids is None or others is None:
        return False
    if reads_alike(first) and reads_alike(second):
        return Counter(ids) != Counter(others)
    labels: list[Counter[Hashable]] = [Counter(label for _, label in each) for each in (ids, others)]
    return labels[0] != labels[1]
