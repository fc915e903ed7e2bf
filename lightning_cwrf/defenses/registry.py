"""Defenses by name, so that a sweep or a YAML file can choose one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning_cwrf.defenses.settings import Defense as Defense
from lightning_cwrf.defenses.settings import build, is_settings
from lightning_cwrf.registry import Registry

C = TypeVar("C", bound=type)
DEFENSES: Registry[type[Defense]] = Registry("defense")
"""Every registered defense."""


def register_defense(name: str) -> Callable[[C], C]:
    """A class decorator that registers a defense under a name: its settings class, or its mixin.

    Raises:
        TypeError: the class is neither, or the settings class is no frozen dataclass.
        ValueError: another defense has the name.

    >>> from lightning_cwrf.defenses import DefenseMixin
    >>> with DEFENSES.temporary():
    ...     @register_defense("plain")
    ...     class PlainMixin(DefenseMixin):
    ...         pass
    ...     create_defense("plain").mixin.__name__
    'PlainMixin'
    """
    DEFENSES.check_name(name)

    def register(cls: C) -> C:
        settings: Any = getattr(cls, "defense_class", cls)
        if not is_settings(settings):
            raise TypeError(f"{cls!r} is neither a DefenseMixin nor a Defense that is a frozen dataclass.")
        DEFENSES.add(name, settings)
        return cls

    return register


def defense_class(name: str) -> type[Defense]:
    """The settings class of the defense of that name.

    Raises:
        ValueError: an unknown name; the known ones are listed.
        TypeError: a class instead of a name.

    >>> import dataclasses
    >>> [field.name for field in dataclasses.fields(defense_class("hamp"))]
    ['gamma', 'alpha']
    """
    if not isinstance(name, str):
        raise TypeError(
            f"create_defense takes the name of a defense, such as 'relaxloss', not {name!r}; of a class call attach."
        )
    return DEFENSES.find(name)


def create_defense(name: str, **settings: Any) -> Defense:
    """The defense of that name with these settings, checked now.

    Raises:
        ValueError: an unknown name (the known ones are listed), or a setting out of range.
        TypeError: an unknown setting, one of the wrong type, or a class instead of a name.

    >>> create_defense("relaxloss", alpha=0.5)
    RelaxLoss(alpha=0.5, upper=1.0)
    """
    return build(defense_class(name), settings)


def available_defenses() -> list[str]:
    """The registered names."""
    return DEFENSES.names()
