"""Settings by ``configure_defense`` and ``_set_defense``, as in the previous release; they go in the next."""

# No postponed annotations here: jsonargparse evaluates them in the module of the subclass, whose names are others.

import dataclasses
import inspect
import warnings
from typing import Any, ClassVar

from lightning_cwrf.defenses.settings import Defense, setting_names

_UNSET = object()


class ConfigureDefense:
    """The two methods, for mixins that still have or call them."""

    def configure_defense(self: Any, **settings: Any) -> None:
        """Take the settings, without data."""
        self._set_defense(**{name: value for name, value in settings.items() if name not in self.defense.data_settings})

    def _set_defense(self: Any, **settings: Any) -> None:
        object.__setattr__(self.defense, "_plain", settings)
        self._show_defense()


class Configured(Defense):
    """Settings that a ``configure_defense`` takes."""

    taken: ClassVar[tuple[str, ...]]
    """The arguments of that method."""
    _plain: ClassVar[dict[str, Any]] = {}

    def plain(self) -> dict[str, Any]:
        return dict(self._plain)

    def configure(self, module: Any) -> None:
        """Have the module check and take the settings; one whose own ``__init__`` does it later has none yet."""
        given = {name: getattr(self, name) for name in self.taken}
        if all(value is not _UNSET for value in given.values()):
            module.configure_defense(**given)


def configured_settings(mixin: type, parent: type[Defense]) -> type[Defense]:
    """A settings class from the signature of a mixin's ``configure_defense``."""
    name = mixin.__name__
    warnings.warn(
        f"{name}.configure_defense is now a frozen dataclass: class {name}(..., settings=YourSettings); the old way "
        "goes in the next release.",
        FutureWarning,
        stacklevel=4,
    )
    configure = vars(mixin)["configure_defense"]
    try:
        signature = inspect.signature(configure, eval_str=True)
    except Exception:  # an annotation that is imported for type checkers alone
        signature = inspect.signature(configure)
    taken = dict(list(signature.parameters.items())[1:])
    fields: list[Any] = []
    for each in taken.values():
        default = _UNSET if each.default is each.empty else each.default
        annotation = Any if each.annotation is each.empty else each.annotation
        if each.name not in setting_names(parent):
            fields.append((each.name, annotation, dataclasses.field(default=default, kw_only=True)))
    body = {"__module__": mixin.__module__, "__qualname__": f"{mixin.__qualname__}.defense_class", "taken": (*taken,)}
    kind = name.removesuffix("Mixin")
    return dataclasses.make_dataclass(kind, fields, bases=(Configured, parent), frozen=True, namespace=body)
