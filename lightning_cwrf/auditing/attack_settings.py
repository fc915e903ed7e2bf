"""How an attack was run, so that two audits are compared where they ran the same one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning_cwrf.attacks.base import ATTACKS, Attack
from lightning_cwrf.shadows.identity import identity

_PLAIN = (str, bool, int, float, type(None))


def settings_told(attack: Attack) -> str:
    """An attack with all its settings, as text; one of other code than the package's by its function.

    >>> from lightning_cwrf.attacks import create_attack
    >>> settings_told(create_attack("lira", online=False))
    "lira(online=False, variance='auto')"
    """
    function = getattr(attack.function, "func", attack.function)
    module = str(getattr(function, "__module__", ""))
    own = module.partition(".")[0] == __name__.partition(".")[0]
    name = attack.name if own else f"{attack.name}: {module}.{getattr(function, '__qualname__', function)}"
    known = ATTACKS.get(attack.name)
    defaults = known.settings if known is not None and known.function is attack.function else {}
    settings = ", ".join(f"{key}={_told(value)}" for key, value in sorted({**defaults, **attack.settings}.items()))
    return f"{name}({settings})"


def _told(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    try:
        return identity(value)
    except TypeError:  # it has no content to compare
        return type(value).__name__


def settings_differ(
    first: Mapping[str, str], other: Mapping[str, str], attacks: Collection[str] | None = None
) -> list[str]:
    """The attacks (of these; None: of all) that two audits are known to have run with other settings."""
    both = [name for name in first if name in other and (attacks is None or name in attacks)]
    return [name for name in both if first[name] != other[name]]
