"""The settings of a defense: one frozen dataclass each, from which constructors, YAML, hparams and recipes are read."""

# No postponed annotations here: jsonargparse evaluates them in the module of the subclass, whose names are others.

import dataclasses
import math
import types
from collections.abc import Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

M = TypeVar("M", bound=LightningModule)
D = TypeVar("D", bound="Defense")


class Defense:
    """A defense and its settings, checked, not yet given to a module.

    Each defense is a frozen dataclass that inherits from this class. Its fields are the defense's settings, and its
    ``__post_init__`` is their one check. The mixin that trains with it names it: ``class FocalMixin(DefenseMixin,
    settings=Focal)``. A setting that takes data, such as a loader, has ``field(metadata={"data": True})``: it is no
    hyper-parameter, and recipes carry it along.
    """

    mixin: ClassVar[Any]
    """The :class:`~lightning_cwrf.DefenseMixin` that trains with these settings."""
    per_example: ClassVar[bool] = False
    """Whether the loss of a batch is the mean of a loss of each example, so that DP-SGD can build on it."""
    strengths: ClassVar[tuple[Mapping[str, float], ...]] = ()
    """Settings that a search tries (:func:`~lightning_cwrf.searching.default_candidates`), from weak to strong."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Before __init__, so that a __post_init__ sees values of the right types.
        known = setting_names(cls)
        given = {**dict(zip(known, args, strict=False)), **kwargs}
        check_types(cls, {name: value for name, value in given.items() if name in known})
        return super().__new__(cls)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by name, data included."""
        return {name: getattr(self, name) for name in setting_names(type(self))}

    @property
    def data_settings(self) -> dict[str, Any]:
        """The settings that are data, by name."""
        return {name: getattr(self, name) for name in self.data_names()}

    @classmethod
    def data_names(cls) -> list[str]:
        """The names of the settings that are data."""
        return [name for name, field in _fields(cls).items() if field.metadata.get("data")]

    def plain(self) -> dict[str, Any]:
        """The settings as plain values, for hyper-parameters and checkpoints: without data."""
        plain = {name: value for name, value in self.settings.items() if name not in self.data_names()}
        if plain.get("on", ...) is None:
            del plain["on"]
        return {name: value.named() if isinstance(value, Defense) else value for name, value in plain.items()}

    def named(self) -> dict[str, Any]:
        """:meth:`plain` after the name of the mixin."""
        return {"name": self.mixin.__name__, **self.plain()}

    def check_mixin(self) -> None:
        """Raise unless a mixin trains with these settings."""
        if "mixin" not in dir(type(self)):
            name = type(self).__name__
            raise MisconfigurationException(
                f"no mixin trains with {name} yet: define class {name}Mixin(DefenseMixin, settings={name})."
            )

    def attach(self, module: M) -> M:
        """Attach the defense to a module, in place (:meth:`DefenseMixin.attach`)."""
        self.check_mixin()
        attached: M = self.mixin.attach_defense(module, self)
        return attached


def is_settings(cls: Any) -> bool:
    """Whether a class is a frozen dataclass that inherits :class:`Defense`."""
    own = vars(cls).get("__dataclass_params__") if isinstance(cls, type) and issubclass(cls, Defense) else None
    return own is not None and bool(own.frozen)


def setting_names(cls: type[Defense]) -> list[str]:
    """The names of a defense's settings."""
    return list(_fields(cls))


def build(cls: type[D], settings: Mapping[str, Any]) -> D:
    """The defense with these settings, checked; unknown ones are an error."""
    known = setting_names(cls)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise TypeError(f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}.")
    return cls(**settings)


def derived(parent: type[Defense], mixin: type) -> type[Defense]:
    """The settings class of a mixin that inherits its settings: the same fields, another mixin."""
    body = {
        "__module__": mixin.__module__,
        "__qualname__": f"{mixin.__qualname__}.defense_class",  # where pickle finds it
        "__doc__": f"The settings of {mixin.__name__}.",
        "per_example": parent.per_example and "defense_loss" not in vars(mixin),  # of another loss, nothing is known
    }
    made = types.new_class(mixin.__name__.removesuffix("Mixin"), (parent,), exec_body=lambda space: space.update(body))
    return dataclasses.dataclass(frozen=True)(made)


def check_types(cls: type[Defense], settings: Mapping[str, Any]) -> None:
    """Raise a TypeError for a setting whose type is not that of its field's annotation.

    Annotations of float, int, bool, str, None and Literal, and unions of these, are checked. A float must not be NaN,
    and another choice of a Literal's type is a wrong value (ValueError).
    """
    try:
        hints = get_type_hints(cls)
    except Exception:  # an annotation that is imported for type checkers alone
        hints = {}
    for name, value in settings.items():
        kinds = _kinds(hints.get(name, _fields(cls)[name].type))
        if kinds is None:
            continue
        if not any(_is_a(kind, value) for kind in kinds):
            wanted = " or ".join(kind.__name__ if isinstance(kind, type) else repr(kind) for kind in kinds)
            wanted = wanted.replace("NoneType", "None")
            error = ValueError if any(type(kind) is type(value) for kind in kinds) else TypeError
            raise error(f"{cls.__name__}: {name} must be {wanted}, not {value!r}.")
        if isinstance(value, Real) and math.isnan(value):
            raise ValueError(f"{cls.__name__}: {name} must be a number, not nan.")


def _fields(cls: type[Defense]) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init} if dataclasses.is_dataclass(cls) else {}


def _kinds(annotation: Any) -> list[Any] | None:
    """The types and literal values that an annotation lists; None where it has others too."""
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, {"Literal": Literal, "Union": Union})
        except Exception:
            return None
    if annotation is None:
        return [NoneType]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        parts = [_kinds(part) for part in get_args(annotation)]
        return None if None in parts else [kind for part in parts for kind in part or []]
    return [annotation] if annotation in (float, int, bool, str, NoneType) else None


def _is_a(kind: Any, value: Any) -> bool:
    if not isinstance(kind, type):
        return type(kind) is type(value) and bool(kind == value)
    if kind in (float, int):
        return isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)
    return isinstance(value, kind)
