"""Defenses by name, so that a sweep or a YAML file can choose one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from lightning_cwrf.defenses.base import DefenseMixin, check_settings

M = TypeVar("M", bound=type[DefenseMixin])
_DEFENSES: dict[str, type[DefenseMixin]] = {}


@dataclass(frozen=True)
class Defense:
    """A defense and its settings, checked, not yet given to a module."""

    mixin: type[DefenseMixin]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def attach(self, module: LightningModule) -> Any:
        """Give the defense to a module, in place (:meth:`DefenseMixin.attach`)."""
        return self.mixin.attach(module, **self.settings)


def register_defense(name: str) -> Callable[[M], M]:
    """A class decorator that makes a mixin known by a name.

    Raises:
        ValueError: another mixin has the name.

    >>> @register_defense("plain")
    ... class PlainMixin(DefenseMixin):
    ...     pass
    >>> create_defense("plain").mixin.__name__
    'PlainMixin'
    >>> _ = _DEFENSES.pop("plain")
    """
    if not isinstance(name, str):
        raise TypeError('register_defense needs a name: @register_defense("name").')

    def register(mixin: M) -> M:
        if not (isinstance(mixin, type) and issubclass(mixin, DefenseMixin)):
            raise TypeError(f"{mixin!r} is no DefenseMixin.")
        known = _DEFENSES.get(name, mixin)
        if (known.__module__, known.__qualname__) != (mixin.__module__, mixin.__qualname__):
            raise ValueError(f"there is a defense {name!r} already: {known.__name__}.")
        _DEFENSES[name] = mixin  # the same class again, from a cell that was run twice
        return mixin

    return register


def create_defense(name: str, **settings: Any) -> Defense:
    """The defense of that name with these settings, checked now.

    Raises:
        ValueError: an unknown name (the known ones are listed), or a setting out of range.
        TypeError: an unknown setting, or a class in the place of a name.

    >>> create_defense("relaxloss", alpha=1.0).settings
    {'alpha': 1.0}
    """
    if not isinstance(name, str):
        raise TypeError(
            f"create_defense takes the name of a defense, such as 'relaxloss', not {name!r}; of a class call attach."
        )
    if name not in _DEFENSES:
        raise ValueError(f"there is no defense {name!r}; known are {', '.join(available_defenses())}.")
    mixin = _DEFENSES[name]
    check_settings(mixin, settings)
    mixin.configure_defense(_Draft(), **settings)  # type: ignore[arg-type]
    return Defense(mixin, settings)


def available_defenses() -> list[str]:
    """The names that :func:`create_defense` knows."""
    return sorted(_DEFENSES)


class _Draft(SimpleNamespace):
    """Takes the settings in a module's place, so that they are checked before there is one."""

    def _set_defense(self, **settings: Any) -> None:
        pass
