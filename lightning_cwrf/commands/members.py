"""Whether the members that are audited are those that the model was trained on."""

from __future__ import annotations

from lightning_cwrf.commands.base import UsageError
from lightning_cwrf.data import Batches, same_examples


def check_fixed(members: Batches, again: Batches) -> None:
    """Raise where the members of a second run, under another random state, are others."""
    if not same_examples(members, again):
        raise UsageError(
            "--members are other examples under another random state, so those that the model was trained on are not "
            "known: the split depends on the random state: pass a generator with a fixed seed in random_split."
        )


def check_plain(members: Batches, plain: Batches) -> None:
    """Raise where ``--plain`` are not the members."""
    if not same_examples(members, plain):
        raise UsageError(
            "--plain are not the members: they must be the same examples as --members, all of them and no others, "
            "without random augmentation."
        )
