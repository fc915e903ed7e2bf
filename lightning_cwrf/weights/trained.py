"""Whether a model was trained at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lightning_cwrf.data import Batches, isolated_rng
from lightning_cwrf.data.loading import some_batches
from lightning_cwrf.outputs import collect_outputs


def check_trained(model: nn.Module, members: Batches, *, transfer: Callable[[Any], Any] | None = None) -> None:
    """Raise where a model does no better than guessing on its own training data, as one with initial weights does.

    Whatever the seed of its weights: on about 1,000 members, its loss is at least 95 % of the entropy of the labels,
    *and* its mean recall over the classes is less than a fifth of the way from chance to 1. The second spares models
    that were trained with weighted classes, whose loss without the weights may be large.

    Args:
        model: the model that is said to be finished.
        members: its training data; an iterator, which can be read only once, is not looked at.
        transfer: as for :func:`~lightning_cwrf.outputs.collect_outputs`.

    Raises:
        ValueError: the model is untrained.

    >>> check_trained(nn.Linear(4, 3), [(torch.randn(90, 4), torch.arange(90) % 3)])
    Traceback (most recent call last):
    ValueError: the model does no better on its training data than guessing ...
    """
    if isinstance(members, Iterator):
        return
    with isolated_rng():
        outputs = collect_outputs(model, some_batches(members, 1024), name="members", transfer=transfer)
    logits, targets = outputs.logits.float(), outputs.targets
    counts = torch.bincount(targets, minlength=logits.shape[1])
    shares = counts[counts > 0] / len(targets)
    guessing = float(-(shares * shares.log()).sum())
    loss = float(F.cross_entropy(logits, targets))
    found = torch.bincount(targets[logits.argmax(1) == targets], minlength=logits.shape[1])
    recall = float((found / counts)[counts > 0].mean())
    chance = 1 / len(shares)
    if len(shares) > 1 and loss >= 0.95 * guessing and recall < chance + 0.2 * (1 - chance):
        raise ValueError(
            f"the model does no better on its training data than guessing: its loss is {loss:.3g}, and that of "
            f"guessing by the frequencies of the classes is {guessing:.3g}. It looks untrained. Load its finished "
            'weights first: load_from_checkpoint, or FinishedWeightsCallback("finished.ckpt") before the other '
            "callbacks."
        )
