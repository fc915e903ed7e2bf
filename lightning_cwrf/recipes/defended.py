"""What recipes need to know of a defense: all of it is here."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_cwrf.data import Batches
from lightning_cwrf.defenses import DefenseMixin
from lightning_cwrf.defenses.registry import Defense


def original_class(model: LightningModule) -> Any:
    """The class of a model without the defense that was attached to it."""
    return getattr(type(model), "_attached_to", type(model))


def attached_defense(model: LightningModule) -> Defense | None:
    """The defense that was attached to a model, with its settings and data.

    None: it has none, or its class has one by inheritance, which the class builds again.

    Raises:
        ValueError: data of the defense that the model does not hold.
    """
    if original_class(model) is type(model):
        return None
    mixin: Any = type(model).__bases__[0]
    settings: dict[str, Any] = dict(model.defense_settings)  # type: ignore[arg-type]
    taken = [name for name in inspect.signature(mixin.configure_defense).parameters if name != "self"]
    for name in (name for name in taken if name not in settings):  # data are no settings
        holder = getattr(model, f"_{name}", None)
        if not hasattr(holder, "data"):
            raise ValueError(f"{mixin.__name__} has {name}, which cannot be read from the model: pass defense=.")
        settings[name] = holder.data  # type: ignore[union-attr]
    return Defense(mixin, settings)


def data_of(defense: Defense) -> dict[str, Batches]:
    """The data that a defense trains with, by the name that a message gives them."""
    return {
        f"{defense.mixin.__name__}'s {name}": value
        for name, value in defense.settings.items()
        if name == "nonmembers" or isinstance(value, (Dataset, DataLoader))
    }


def in_words(model: nn.Module) -> str:
    """The defense of a model and its settings, for a message.

    >>> in_words(LightningModule())
    'no defense'
    """
    if not isinstance(model, DefenseMixin):
        return "no defense"
    settings = dict(model._named_settings())
    name = settings.pop("name")
    return f"{name} ({', '.join(f'{key}={value}' for key, value in settings.items())})" if settings else str(name)
