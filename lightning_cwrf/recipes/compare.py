"""Comparing a model, and its defense, with the module that a recipe builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_cwrf.callbacks.defense import defense_of
from lightning_cwrf.data.seen import SCORED, seen_by
from lightning_cwrf.defenses import Defense, DefenseMixin
from lightning_cwrf.shadows import ShadowOutputs
from lightning_cwrf.weights.copies import check_not_lazy


def differences(built: LightningModule, model: LightningModule, *, with_cwrf: bool) -> list[str]:
    """How ``model`` was visibly not trained by the recipe that built the other (:meth:`ShadowRecipe.differences`)."""
    found = []
    if _shapes(built) != _shapes(model):
        found.append("its weights have other names or shapes than theirs")
    trained, theirs = defense_of(model), defense_of(built)
    if trained is not None and in_words(trained) != in_words(theirs):
        found.append(f"it was trained with {in_words(trained)}, and they with {in_words(theirs)}")
    if not with_cwrf and SCORED in seen_by(model):
        found.append("it was hardened by CWRF, and they were not")
    return found


def check_no_models(name: str, data: Any) -> None:
    """Raise a ValueError where what shapes a recipe's training, called ``name``, is a model of the protected data."""
    if isinstance(data, (nn.Module, ShadowOutputs)):
        raise ValueError(
            f"{name} was trained on the data to protect, and each shadow model needs one that was trained on its own "
            "half. Make that a part of the recipe: SELENARecipe(recipe) does for SELENA; for DMP, write a function of "
            "members and seed (docs/defenses/dmp.md)."
        )


def check_rebuilt(built: LightningModule, model: LightningModule, *, may_freeze: bool) -> None:
    """Raise a ValueError unless a recipe that was read from a model builds the same module again."""
    check_not_lazy(built)
    ours, theirs = _shapes(built), _shapes(model)
    if ours != theirs:
        names = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"the rebuilt module has other weights than the model, such as {names[0]}; pass build_module=, a function "
            "that builds it as it was."
        )
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    changed = [name for name, p in built.named_parameters() if p.requires_grad != trainable[name]]
    if changed and not may_freeze:
        now = "trained" if trainable[changed[0]] else "frozen"
        raise ValueError(
            f"{len(changed)} parameters, such as {changed[0]}, are {now} in the model (requires_grad) and not in the "
            "rebuilt module; pass build_module=, a function that builds it and sets requires_grad as in the training."
        )
    if isinstance(model, DefenseMixin) and not isinstance(built, DefenseMixin):
        raise ValueError("the model has a defense, and the rebuilt module has none; pass defense=.")
    trained, again = defense_of(model), defense_of(built)
    if original_class(model) is type(model) and in_words(trained) != in_words(again):  # one that its class inherits
        raise ValueError(
            f"the model has {in_words(trained)}, and the rebuilt module has {in_words(again)}; pass build_module=, a "
            "function that builds it with its defense, as it was."
        )


def original_class(model: LightningModule) -> Any:
    """The class of a model without the defense that was attached to it."""
    return getattr(type(model), "_attached_to", type(model))


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


def _shapes(module: nn.Module) -> Mapping[str, Any]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
