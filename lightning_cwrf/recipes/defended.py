"""What recipes need to know of a defense: all of it is here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule

from lightning_cwrf.callbacks import DefenseCallback
from lightning_cwrf.data import Batches
from lightning_cwrf.defenses import Defense, DefenseMixin


def original_class(model: LightningModule) -> Any:
    """The class of a model without the defense that was attached to it."""
    return getattr(type(model), "_attached_to", type(model))


def attached_defense(model: LightningModule, callbacks: Sequence[Callback]) -> Defense | None:
    """The defense of a training: that of a DefenseCallback, or one that was attached to its model.

    None: it has none, or its class has one by inheritance, which the class builds again.
    """
    for callback in callbacks:
        if isinstance(callback, DefenseCallback):
            return callback.defense
    return model.defense if isinstance(model, DefenseMixin) and original_class(model) is not type(model) else None


def data_of(defense: Defense) -> dict[str, Batches]:
    """The data that a defense trains with, by the name that a message gives them."""
    return {f"{defense.mixin.__name__}'s {name}": value for name, value in defense.data_settings.items()}


def in_words(defense: Defense | None) -> str:
    """A defense and its settings, for a message.

    >>> in_words(None)
    'no defense'
    """
    if defense is None:
        return "no defense"
    settings = defense.named()
    name = settings.pop("name")
    return f"{name} ({', '.join(f'{key}={value}' for key, value in settings.items())})" if settings else str(name)
