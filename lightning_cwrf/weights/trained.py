"""Whether a model was trained at all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cwrf.data import Batches, isolated_rng
from lightning_cwrf.data.loading import some_batches
from lightning_cwrf.outputs import collect_outputs

_MANY_CLASSES = 10
_ENOUGH_WEIGHTS = 1000
GUESSES = "the model does no better on its training data than guessing"
LOOKS_UNTRAINED = "It looks untrained"
_LOAD = (
    'Load its finished weights first: load_from_checkpoint, or FinishedWeightsCallback("finished.ckpt") before the '
    "other callbacks"
)


def check_trained(
    model: nn.Module,
    members: Batches,
    vanilla: Mapping[str, Tensor] | None = None,
    *,
    transfer: Callable[[Any], Any] | None = None,
) -> None:
    """Raise where a model looks untrained, whatever the seed of its weights.

    Two things are looked at. One is what the model does on some of its training data. With many classes no random
    weights do better than guessing; with two they often do, and a weak model that was trained may not. The other is
    whether its weights correlate with the vanilla ones, as those of a model that was trained from them do:

    - A model that does no better than guessing is an error with ten classes or more, or if its weights do not correlate
      with the vanilla ones. If that is unknown, it is a warning.
    - Weights that do not correlate are an error if the loss is more than half of that of guessing, else a warning: then
      the vanilla weights are those of another training.

    Args:
        model: the model that is said to be finished.
        members: its training data; an iterator, which can be read only once, is not looked at.
        vanilla: its weights from before training; None where they were redrawn.
        transfer: as for :func:`~lightning_cwrf.outputs.collect_outputs`.

    Raises:
        ValueError: the model is untrained, or the vanilla weights are not its own.

    >>> check_trained(nn.Linear(4, 10), [(torch.randn(500, 4), torch.arange(500) % 10)])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: the model does no better on its training data than guessing: ...
    """
    if isinstance(members, Iterator):
        return
    descends = None if vanilla is None else descends_from(model, vanilla)
    with isolated_rng():
        outputs = collect_outputs(model, some_batches(members, 1024), name="members", transfer=transfer)
    found = outcome(outputs.logits, outputs.targets)
    if found.looks_untrained or (found.guesses and descends is False):
        raise ValueError(f"{GUESSES}: {found}. {LOOKS_UNTRAINED}. {_LOAD}.")
    if descends is False and found.loss > 0.5 * found.guessing:
        raise ValueError(
            f"the model's weights do not correlate with the vanilla weights, and {found}: either it is untrained, or "
            f'the vanilla weights are not those that it was trained from. {_LOAD}; or pass vanilla="redraw".'
        )
    if found.guesses and descends is None:
        warnings.warn(f"{GUESSES}: {found}. If it is untrained: {_LOAD}.", stacklevel=2)
    elif descends is False:
        warnings.warn(
            "the model's weights do not correlate with the vanilla weights: it was not trained from those. To rewind "
            'to them is like vanilla="redraw".',
            stacklevel=2,
        )


def descends_from(model: nn.Module, vanilla: Mapping[str, Tensor]) -> bool | None:
    """Whether a model's trainable weights correlate with vanilla ones, and are not the same; None: too few to say.

    The correlation is over all weights, each tensor standardised by itself, so that what all initialisations share does
    not count. Without any relation, the correlation times √n is standard normal; 4 is exceeded in 1 of 30,000 cases.
    """
    products, n, same = 0.0, 0, True
    for name, p in model.named_parameters():
        if not p.requires_grad or name not in vanilla or not p.is_floating_point():
            continue
        ours, theirs = (value.detach().cpu().double().flatten() for value in (p, vanilla[name]))
        same = same and torch.equal(ours, theirs)
        if min(float(ours.std(correction=0)), float(theirs.std(correction=0))) == 0.0:
            continue  # constant, as the weights of a norm are at first
        products += float(torch.dot(*((each - each.mean()) / each.std(correction=0) for each in (ours, theirs))))
        n += len(ours)
    if same:
        return False
    return None if n < _ENOUGH_WEIGHTS else products / math.sqrt(n) > 4


class Outcome(NamedTuple):
    """What a model does on its training data, and what guessing by the frequencies of the classes does."""

    loss: float
    guessing: float
    recall: float
    classes: int

    @property
    def guesses(self) -> bool:
        """Whether it does no better than guessing, in its loss and in its mean recall over the classes.

        The latter is because a model of weighted classes may have a large plain loss.
        """
        chance = 1 / self.classes
        return self.classes > 1 and self.loss >= 0.95 * self.guessing and self.recall < chance + 0.2 * (1 - chance)

    @property
    def looks_untrained(self) -> bool:
        """Whether it guesses, where no random weights do better."""
        return self.guesses and self.classes >= _MANY_CLASSES

    @property
    def remark(self) -> str | None:
        """For the report of an audit; None where there is nothing to remark."""
        if not self.guesses:
            return None
        looks = f"{LOOKS_UNTRAINED}: are" if self.looks_untrained else "Was it trained, and are"
        return f"{GUESSES}: {self}. {looks} its finished weights loaded? Attacks find nothing in an untrained model."

    def __str__(self) -> str:
        return f"its loss is {self.loss:.3g}, and guessing by the frequencies of the classes gives {self.guessing:.3g}"


def outcome(logits: Tensor, targets: Tensor) -> Outcome:
    """What outputs ``(n, K)`` on training examples with classes ``(n,)`` are worth, against guessing."""
    counts = torch.bincount(targets, minlength=logits.shape[1])
    found = torch.bincount(targets[logits.argmax(1) == targets], minlength=logits.shape[1])
    shares = counts[counts > 0] / len(targets)
    return Outcome(
        loss=float(F.cross_entropy(logits.float(), targets)),
        guessing=float(-(shares * shares.log()).sum()),
        recall=float((found / counts)[counts > 0].mean()),
        classes=len(shares),
    )
