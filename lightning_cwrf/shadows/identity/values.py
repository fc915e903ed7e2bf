"""Kinds of values, and the parts that make their identity."""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import hashlib
import types
from enum import Enum
from pathlib import PurePath
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, default_collate

NAMED_ONLY = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)
C_FUNCTIONS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.ClassMethodDescriptorType, np.ufunc)

_MADE_BY_PYTHON = {
    "__abstractmethods__", "__annotate__", "__annotate_func__", "__annotations__", "__annotations_cache__",
    "__classdictcell__", "__dataclass_fields__", "__dataclass_params__", "__dict__", "__doc__", "__firstlineno__",
    "__match_args__", "__module__", "__orig_bases__", "__parameters__", "__qualname__", "__signature__",
    "__slotnames__", "__static_attributes__", "__weakref__", "_abc_impl",
}  # fmt: skip
"""Attributes of a class that do not affect what it does, or repeat others."""


def simple(value: Any) -> tuple[Any] | None:
    """The description of a plain value, in a tuple; None: it is not one."""
    if isinstance(value, Enum):
        return None
    if value is None or isinstance(value, (bool, int, str)):
        return (value,)
    if isinstance(value, float):
        return (["float", value.hex()],)
    if isinstance(value, complex):
        return (["complex", value.real.hex(), value.imag.hex()],)
    if isinstance(value, (bytes, bytearray)):
        return (["bytes", value.hex()],)
    if value is Ellipsis or value is NotImplemented:
        return ([repr(value)],)
    if isinstance(value, (PurePath, torch.dtype, torch.device)):
        return ([type(value).__name__, str(value)],)
    if isinstance(value, np.generic) and not value.dtype.hasobject:
        return (["array", value.dtype.str, [], hashlib.sha256(value.tobytes()).hexdigest()],)
    return None


def known_fields(value: Any) -> list[tuple[str, Any]]:
    """A dataclass's fields by the names, and with the words, that keys know them by (:func:`identity`)."""
    named = []
    for field in dataclasses.fields(value):
        told, now = field.metadata, getattr(value, field.name, dataclasses.MISSING)
        came_later = told.get("identity_without_default", False)
        if now is dataclasses.MISSING or (came_later and now == field.default):
            continue
        words = told.get("identity_values")
        named.append((told.get("identity", field.name), words.get(now, now) if words else now))
    return named


def is_redundant(attribute: str) -> bool:
    """Whether an attribute of a class only repeats others; pydantic's schemas also contain addresses."""
    pydantics = attribute.startswith("__pydantic_") and attribute not in (
        "__pydantic_fields__",
        "__pydantic_decorators__",
    )
    return attribute in _MADE_BY_PYTHON or pydantics


def cells(value: FunctionType) -> list[Any]:
    """What a function closes over."""
    contents = []
    for cell in value.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # not filled yet
            contents.append(None)
    return contents


def is_argument(value: Any) -> bool:
    """Whether a value that an installed decorator holds looks like one of its arguments: plain values, functions."""
    kinds = (FunctionType, types.MethodType, type, functools.partial)
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        return all(map(is_argument, value.values() if isinstance(value, dict) else value))
    return simple(value) is not None or isinstance(value, kinds)


def descriptor(value: Any) -> tuple[Any, ...] | None:
    """The functions inside a descriptor or a wrapper; None: the value is something else."""
    if isinstance(value, property):
        return (value.fget, value.fset, value.fdel)
    if isinstance(value, (staticmethod, classmethod)):
        return (value.__func__,)
    if isinstance(value, functools.cached_property):
        return (value.func,)
    if isinstance(value, functools.partialmethod):
        return (value.func, value.args, value.keywords)
    if hasattr(value, "__wrapped__") and callable(value) and type(value).__module__ in ("functools", "builtins"):
        return (value.__wrapped__,)  # lru_cache
    return None


def loader_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """How a loader reads its data set: which examples, in which order, in which batches."""
    own = loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler
    sampler: Any = loader.batch_sampler if own else loader.sampler
    held = getattr(sampler, "__dict__", None)
    state = sampler if held is None else {n: _seed_of(v) for n, v in held.items() if v is not loader.dataset}
    return {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "sampler": [type(sampler), state],
        "generator": _seed_of(loader.generator),
        "collate_fn": None if loader.collate_fn is default_collate else loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
    }


def _seed_of(value: Any) -> Any:
    """A generator by its seed, because its state changes whenever the loader is read."""
    return value.initial_seed() if isinstance(value, torch.Generator) else value


def reduced(value: Any) -> str | tuple[Any, ...]:
    """What pickle needs to copy an object: a name, or (function, arguments, state, items, pairs)."""
    registered = copyreg.dispatch_table.get(type(value))
    parts: Any = value.__reduce_ex__(4) if registered is None else registered(value)
    if isinstance(parts, str):
        return parts
    make, arguments, state, items, pairs = [*parts, None, None, None][:5]
    if isinstance(value, nn.Module) and isinstance(state, dict):
        state = _module_state(state)
    return (make, arguments, state, *(None if each is None else list(each) for each in (items, pairs)))


def _module_state(state: dict[str, Any]) -> dict[str, Any]:
    """A module's state with its children in order, and with hooks without their numbers in this process."""
    hooks = {n: list(v.values()) for n, v in state.items() if "_hooks" in n and isinstance(v, dict)}
    return {**state, **hooks, "order": list(state.get("_modules", ()))}
