"""Names of the previous release: they work for one more release, and warn."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])

# Modules that moved.
_MODULES = {
    "lightning_cwrf.attacks.evidence": "lightning_cwrf.attacks",
    "lightning_cwrf.attacks.learned": "lightning_cwrf.attacks",
    "lightning_cwrf.attacks.registry": "lightning_cwrf.attacks",
    "lightning_cwrf.attacks.threshold": "lightning_cwrf.attacks",
    "lightning_cwrf.audit": "lightning_cwrf.auditing",
    "lightning_cwrf.canaries": "lightning_cwrf.auditing.canaries",
    "lightning_cwrf.masks": "lightning_cwrf.weights.masks",
    "lightning_cwrf.overlap": "lightning_cwrf.data.overlap",
    "lightning_cwrf.poisson": "lightning_cwrf.data.poisson",
    "lightning_cwrf.scores": "lightning_cwrf.weights",
    "lightning_cwrf.vanilla": "lightning_cwrf.weights.vanilla",
}


class _Alias(ModuleType):
    """A module under its old name. ``lightning_cwrf.audit`` is a function too, and stays one when the alias is
    imported, because importing a submodule sets the package's attribute of that name.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(_MODULES[self.__name__]), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _AliasLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        new = _MODULES[module.__name__]
        # Python does not count the frames of the import system between the user's line and this one.
        warn_renamed(module.__name__, new)
        module.__doc__ = import_module(new).__doc__


class _AliasFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, _AliasLoader()) if fullname in _MODULES else None


def install() -> None:
    """Make the old module names importable."""
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AliasFinder())


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn at the line that called the caller of this function; ``stacklevel`` as in :func:`warnings.warn`."""
    warnings.warn(f"{old} is now {new}; the old name goes in the next release.", FutureWarning, stacklevel=stacklevel)


def renamed_names(module: str, **names: str) -> Callable[..., Any]:
    """A module's ``__getattr__`` that finds renamed classes and functions: ``old="new"``."""

    def find(name: str, stacklevel: int = 3) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", f"{module}.{names[name]}", stacklevel)
        return getattr(import_module(module), names[name])

    return find


def renamed(words: Mapping[str, str] | None = None, /, **names: str) -> Callable[[T], T]:
    """A decorator that takes arguments by their old names too (``old="new"``); on a class, attributes as well.

    ``words`` are values that were renamed along with them: under an old name, the old value is given and read.

    >>> @renamed(start="base")
    ... def train(base=None):
    ...     return base
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     train(start=3)
    3
    >>> print(caught[0].message)
    train(start=) is now train(base=); the old name goes in the next release.
    """

    def decorate(target: T) -> T:
        if not isinstance(target, type):
            return _takes_old_names(target, target.__name__, names, words or {})
        owner: Any = target
        # dataclasses.replace passes every field by its new name beside what the user gave by an old one.
        replaces = is_dataclass(owner)
        owner.__init__ = _takes_old_names(owner.__init__, owner.__name__, names, words or {}, old_name_wins=replaces)
        back = {new: old for old, new in (words or {}).items()}
        for old, new in names.items():
            setattr(owner, old, property(functools.partial(_attribute, old=old, new=new, words=back)))
        return target

    return decorate


def _takes_old_names(
    call: T, name: str, names: Mapping[str, str], words: Mapping[str, str], *, old_name_wins: bool = False
) -> T:
    @functools.wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for old in names.keys() & kwargs.keys():
            new = names[old]
            if new in kwargs and not old_name_wins:
                raise TypeError(f"{name} takes {new}=, or {old}=, its old name, but not both.")
            warn_renamed(f"{name}({old}=)", f"{name}({new}=)")
            value = kwargs.pop(old)
            kwargs[new] = words.get(value, value) if isinstance(value, str) else value
        return call(*args, **kwargs)

    wrapped: Any = wrapper
    return wrapped  # type: ignore[no-any-return]


def _attribute(instance: Any, *, old: str, new: str, words: Mapping[str, str]) -> Any:
    name = type(instance).__name__
    warn_renamed(f"{name}.{old}", f"{name}.{new}")
    value = getattr(instance, new)
    return words.get(value, value) if isinstance(value, str) else value
