"""A digest of what a shadow model came from, so that a stored signal is never taken for another's."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import sys
import sysconfig
import textwrap
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_cwrf.data import as_loader, isolated_rng, reads_alike, tensors_of


def identity(value: Any) -> str:
    """A hex digest of a value's content: plain values, containers, tensors, data sets and their loaders,
    dataclasses, functions and partials.

    A function is known by its name, its source, its defaults, and what it reads by name: constants by value, functions
    and classes of the user's own modules by source, and on from there. Installed packages are taken as they are. It
    must not be a closure, because what it closes over could not be told.
    Callables with arguments are a :func:`functools.partial` or a dataclass with ``__call__``.

    Raises:
        TypeError: a value of which the content cannot be told (which, and what to pass instead).

    >>> identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1}), identity(1) == identity(1.0)
    (True, False)
    """
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return ["float", value.hex()]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, Enum):
        return ["enum", type(value).__qualname__, value.name]
    if isinstance(value, (PurePath, torch.dtype, torch.device)):
        return [type(value).__name__, str(value)]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        array = value.detach().cpu().contiguous() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        content = hashlib.sha256(array.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        return ["array", str(array.dtype), list(array.shape), content]
    if isinstance(value, Mapping):
        return ["map", sorted([_plain(key), _plain(item)] for key, item in value.items())]
    if isinstance(value, (list, tuple)):
        return ["list", [_plain(item) for item in value]]
    if isinstance(value, functools.partial):
        return ["partial", _plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, DataLoader):
        return ["loader", value.batch_size, value.drop_last, type(value.sampler).__name__, _plain(value.dataset)]
    if isinstance(value, Dataset) and not dataclasses.is_dataclass(value):
        return ["data set", _content(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return ["dataclass", _plain(type(value)), _plain(fields)]
    if isinstance(value, type):
        family = _family(value)
        return ["class", _sources(family), _globals_of(_methods(family), value.__module__)]
    if isinstance(value, FunctionType):
        if value.__closure__:
            raise TypeError(
                f"{value.__qualname__} is a closure over {value.__code__.co_freevars}, which its name does not tell; "
                "pass these as arguments: functools.partial(recipe, ...), or a dataclass with __call__."
            )
        if value.__name__ == "<lambda>":
            raise TypeError("a lambda has no name to be known by; write it as a function (def).")
        return [
            "function",
            value.__qualname__,
            _source(value),
            _plain(value.__defaults__),
            _plain(value.__kwdefaults__),
            _globals_of([value], value.__module__),
        ]
    raise TypeError(
        f"cannot tell the content of a {type(value).__name__}; use plain values, tensors, data sets, functions, "
        "functools.partial or dataclasses as a recipe and its arguments."
    )


def _content(data: Dataset[Any]) -> list[Any]:
    """What a data set gives, read whole in its order."""
    if not reads_alike(data):
        raise TypeError("a data set in a recipe reads differently each time; take its random augmentation out.")
    with isolated_rng():
        return [_plain(tensors_of(batch)) for batch in as_loader(data, shuffle=False)]


def _globals_of(functions: list[FunctionType], module: str) -> Any:
    """The module-level values that functions read by name: constants by value, the user's own code by its source."""
    found: dict[str, Any] = {}
    queue, seen = [(f.__code__, f.__globals__) for f in functions], set()
    while queue:
        code, scope = queue.pop()
        if code in seen:
            continue
        seen.add(code)
        queue += [(const, scope) for const in code.co_consts if isinstance(const, CodeType)]
        for name in code.co_names:
            value = scope.get(name)
            if isinstance(value, ModuleType) and _is_users(value.__name__):
                found[name] = _source(value)
            elif isinstance(value, (FunctionType, type)) and _is_users(value.__module__, module):
                family = _family(value) if isinstance(value, type) else []
                found[name] = _sources(family or [value])
                inner = _methods(family) if isinstance(value, type) else [value]
                queue += [(f.__code__, f.__globals__) for f in inner]
            elif isinstance(value, (bool, int, float, str, bytes, tuple, list, Enum, PurePath, Tensor, np.ndarray)):
                found[name] = _plain(value)
    return sorted(found.items())


def _family(cls: type) -> list[type]:
    """A class and those of its bases that are the user's."""
    return [base for base in cls.__mro__ if base is cls or _is_users(base.__module__)]


def _methods(family: list[type]) -> list[FunctionType]:
    return [member for cls in family for member in vars(cls).values() if isinstance(member, FunctionType)]


def _sources(values: Sequence[FunctionType | type]) -> list[list[str]]:
    return [[value.__qualname__, _source(value)] for value in values]


@functools.cache
def _is_users(module: str, own: str | None = None) -> bool:
    """Whether a module is ``own``, or another of the user's rather than Python's, an installed package's, or ours."""
    if module == own:
        return True
    source = getattr(sys.modules.get(module), "__file__", None)
    if module.split(".")[0] == "lightning_cwrf" or source is None:
        return False
    path = Path(source).resolve()
    installed = {"site-packages", "dist-packages"}.intersection(path.parts)
    return not installed and Path(sysconfig.get_path("stdlib")).resolve() not in path.parents


def _source(value: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):  # defined in a shell or built in: its name must do
        return ""
