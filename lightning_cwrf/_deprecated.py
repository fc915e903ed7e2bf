"""Names of the previous release, which warn and go on working for one release."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Modules that moved.
_MODULES = {
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
        # The frames of the import system stand between the user's line and this one; Python leaves them out.
        warnings.warn(f"{module.__name__} is now {new}; the old name goes in the next release.", FutureWarning, 2)
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
