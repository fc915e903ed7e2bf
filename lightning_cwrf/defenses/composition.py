"""Defenses that add to the loss of another one: what they can build on, and its loss on their module."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F

from lightning_cwrf.defenses._legacy import Configured
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.settings import Defense
from lightning_cwrf.defenses.state import DefenseState


def base_loss(module: Any, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss that a module's defense adds to: that of its setting ``on``, or the mean cross-entropy."""
    base: Defense | None = module.defense.on
    if base is None:
        return F.cross_entropy(logits, targets)
    if module.defense_state not in _VIEWS:
        _VIEWS[module.defense_state] = _view_class(base.mixin)(module, base)
    loss: Tensor = _VIEWS[module.defense_state].defense_loss(logits, targets)
    return loss


def check_on(defense: Any, *, per_example: bool = False) -> None:
    """Raise unless a defense's setting ``on`` is None, or a defense that is a loss of logits and targets alone.

    ``per_example``: that loss must be the mean of a loss of each example.
    """
    base, name = defense.on, type(defense).__name__
    if base is None:
        return
    if not isinstance(base, Defense):
        raise TypeError(f"{name}: on must be a defense, such as RelaxLoss(alpha=1.0), not {base!r}.")
    base.check_mixin()
    mixins = [each for each in base.mixin.__mro__ if issubclass(each, DefenseMixin) and each is not DefenseMixin]
    own = {attribute for mixin in mixins for attribute in vars(mixin)}
    hooks = {"defense_step", "state_class", *(each for each in dir(LightningModule) if not each.startswith("__"))}
    if own & hooks:
        raise ValueError(
            f"{name} cannot build on {type(base).__name__}: on= takes a defense that is a loss of logits and targets "
            "alone, such as RelaxLoss or HAMP."
        )
    if per_example and not base.per_example:
        raise ValueError(
            f"{name} cannot build on {type(base).__name__}, which does not say that its loss is a mean over examples. "
            f"If it is, set per_example = True in class {type(base).__name__}."
        )


_VIEWS: weakref.WeakKeyDictionary[DefenseState, Any] = weakref.WeakKeyDictionary()
"""One view for as long as the defense is attached, because a loss may keep something between steps."""


class _View:
    """Everything but the defense is the module's."""

    def __init__(self, module: Any, defense: Defense) -> None:
        self._module = weakref.proxy(module)
        self.defense_state = DefenseState(module, defense)
        if isinstance(defense, Configured):
            defense.configure(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@functools.cache
def _view_class(mixin: type) -> Any:
    return type(f"{mixin.__name__}View", (_View, mixin), {"__init__": _View.__init__})
