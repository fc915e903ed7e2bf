"""A digest of what a shadow model came from, so that a stored signal is never taken for another's."""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import hashlib
import json
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_cwrf.data import as_loader, isolated_rng, reads_alike, tensors_of
from lightning_cwrf.shadows.code import Reads, instructions, is_users, reads_of
from lightning_cwrf.shadows.values import cells, descriptor, is_given, is_made, loader_settings, module_state, simple

_NAMED_ONLY = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)
_C_FUNCTIONS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.ClassMethodDescriptorType, np.ufunc)


def identity(value: Any, version: str | None = None) -> str:
    """A hex digest of a value's content: plain values, containers, tensors, data sets and their loaders, dataclasses,
    other objects by their state, functions, classes and partials.

    A function is known by what it does: its live code, its defaults, and what it reads by name, wherever it was
    defined (a file, a notebook, standard input). Of what it reads, values are known by content, functions and classes
    of the user's own modules by their code in turn, and variables of the environment by their present value. A class
    is known by its attributes as they are now. So a changed setting, a reassigned attribute, or a class that was
    defined anew is another identity, and a comment is not. Installed packages are taken by name.

    A recipe itself must be neither a closure nor a lambda. Callables with arguments are a :func:`functools.partial` or
    a dataclass with ``__call__``.

    Args:
        value: what to tell.
        version: part of the digest where given. What cannot be told is then taken as covered by it, and not refused.

    Raises:
        TypeError: a value of which the content cannot be told (which, and what to pass instead).

    >>> identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1}), identity(1) == identity(1.0)
    (True, False)
    """
    if version is not None and not (isinstance(version, str) and version):
        raise TypeError(f"version must be a text that is not empty, not {version!r}.")
    try:
        content = _Teller(covered=version is not None).plain(value)
    except _Refused as error:
        raise TypeError(str(error)) from error.__cause__
    return hashlib.sha256(_text(content if version is None else ["version", version, content]).encode()).hexdigest()


def _text(content: Any) -> str:
    return json.dumps(content, sort_keys=True)


class _Untold(TypeError):
    """What cannot be told, before it is known where it stands."""


class _Teller:
    """Turns one value into lists and plain values that say its content.

    Args:
        covered: take what cannot be told as told.
    """

    def __init__(self, covered: bool) -> None:
        self.covered = covered
        self.where: list[str] = []
        self.inside: list[int] = []
        self.known: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no id is given twice

    def plain(self, value: Any, *, read: bool = False) -> Any:
        """The content of a value; ``read``: it is not the recipe's own, but what its code reads."""
        told = simple(value)
        if told is not None:
            return self._with_class(value, told[0])
        if id(value) in self.inside:
            return ["again", len(self.inside) - self.inside.index(id(value))]
        self.inside.append(id(value))
        try:
            return self._told(value, read)
        except _Untold as error:
            if self.covered:
                return ["covered by the version", type(value).__qualname__]
            if isinstance(error, _Refused):
                raise
            raise _Refused(self._refusal(str(error))) from error
        finally:
            self.inside.pop()

    def _told(self, value: Any, read: bool) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            return self._array(value)
        if isinstance(value, Enum):
            return ["enum", type(value).__qualname__, value.name, self.plain(value.value, read=read)]
        if isinstance(value, Mapping):
            pairs = [[self.plain(k, read=read), self.plain(v, read=read)] for k, v in value.items()]
            if isinstance(value, OrderedDict):
                return self._with_class(value, ["ordered map", pairs])
            made = [self.plain(value.default_factory, read=True)] if isinstance(value, defaultdict) else []
            return self._with_class(value, ["map", _sorted(pairs), *made])
        if isinstance(value, (list, tuple)):
            return self._with_class(value, ["list", [self.plain(item, read=read) for item in value]])
        if isinstance(value, (set, frozenset)):
            return self._with_class(value, ["set", _sorted(self.plain(item, read=read) for item in value)])
        if isinstance(value, CodeType):
            return ["code", self.plain(instructions(value))]
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return ["partial", *(self.plain(part, read=read) for part in parts)]
        if isinstance(value, types.MethodType):
            return ["method", self.plain(value.__func__, read=True), self.plain(value.__self__, read=read)]
        if isinstance(value, FunctionType):
            if not read and not self.covered:
                _check_named(value)
            return self._once(value, self._function)
        if isinstance(value, type):
            return self._once(value, self._class)
        if isinstance(value, ModuleType):
            return self._module(value, None) if is_users(value.__name__) else ["module", value.__name__]
        if isinstance(value, DataLoader) and not read:
            settings = self._read_all(loader_settings(value), "DataLoader")
            return ["loader", settings, self.plain(value.dataset)]
        if dataclasses.is_dataclass(value):
            return ["dataclass", self.plain(type(value), read=read), self._fields(value, read)]
        if isinstance(value, Dataset) and not read:
            return ["data set", self._examples(value)]
        return self._object(value, read)

    def _with_class(self, value: Any, content: Any) -> Any:
        """The content of a container or a plain value, with its class where that is the user's own."""
        kind = type(value)
        if not is_users(kind.__module__):
            return content
        attributes = self._read_all(getattr(value, "__dict__", {}), kind.__qualname__)
        return ["of a class", self.plain(kind, read=True), attributes, content]

    def _array(self, value: Tensor | np.ndarray[Any, Any]) -> Any:
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise _Untold(f"a tensor of layout {value.layout} on {value.device}")
            array = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            kind, raw = str(array.dtype), array.reshape(-1).view(torch.uint8).numpy()
        elif value.dtype.hasobject:
            return ["objects", list(value.shape), self.plain(value.ravel().tolist())]
        else:
            kind, raw = value.dtype.str, np.ascontiguousarray(value)
        trained = ["trained"] if isinstance(value, Tensor) and value.requires_grad else []
        return ["array", kind, list(value.shape), hashlib.sha256(raw.tobytes()).hexdigest(), *trained]

    def _fields(self, value: Any, read: bool) -> Any:
        """A dataclass's fields, and what else was set on the object."""
        names = {field.name for field in dataclasses.fields(value)}
        cached = {n for n in vars(type(value)) if isinstance(vars(type(value))[n], functools.cached_property)}
        names |= set(getattr(value, "__dict__", ())) - cached
        return ["map", [[n, self.plain(getattr(value, n), read=read)] for n in sorted(names) if hasattr(value, n)]]

    def _examples(self, data: Dataset[Any]) -> list[Any]:
        """What a data set gives, read whole in its order."""
        if not reads_alike(data):
            raise _Untold("a data set that reads differently each time (take its random augmentation out)")
        with isolated_rng():
            return [self.plain(tensors_of(batch)) for batch in as_loader(data, shuffle=False)]

    def _once(self, value: Any, tell: Callable[[Any], Any]) -> Any:
        """Functions and classes refer to one another; the second time, one is known by when it came first."""
        if id(value) in self.known:
            return ["known", self.known[id(value)]]
        self.known[id(value)] = len(self.known)
        self.kept.append(value)
        return tell(value)

    def _function(self, value: FunctionType) -> Any:
        name = value.__qualname__
        closed = dict(zip(value.__code__.co_freevars, cells(value), strict=True))
        module = value.__globals__.get("__name__")  # a decorator's wrapper bears the name of what it wraps
        if not is_users(module):
            # Of an installed decorator, what it was given; the rest is taken as it is.
            closed["__wrapped__"] = vars(value).get("__wrapped__")
            given = {n: cell for n, cell in closed.items() if is_given(cell)}
            return ["installed", module, value.__code__.co_name, self._read_all(given, name)]
        code = value.__code__
        own = {"defaults": value.__defaults__, "keyword defaults": value.__kwdefaults__, **vars(value)}
        reads = self._reads(reads_of(code, value.__globals__), name)
        return ["function", name, self.plain(instructions(code)), self._read_all({**own, **closed}, name), reads]

    def _reads(self, reads: Reads, name: str) -> Any:
        if reads.at_run_time and not self.covered:
            with self._at(name):
                raise _Refused(self._refusal(f"what {' and '.join(sorted(reads.at_run_time))} looks up"))
        if None in reads.environment:
            with self._at(name):
                if not self.covered:
                    raise _Refused(self._refusal("the environment (os.environ) under a name that is no constant"))
        names = None if reads.whole_modules else frozenset(reads.names)
        modules = []
        for each, module in sorted(reads.modules.items()):
            with self._at(name):
                modules.append([each, self._module(module, names)])
        environment = sorted([n, v] for n, v in reads.environment.items() if n is not None)
        return [self._read_all(reads.values, name), modules, environment]

    def _read_all(self, values: Mapping[str, Any], reader: str) -> Any:
        told = []
        for name, value in sorted(values.items()):
            with self._at(reader), self._at(name):
                told.append([name, self.plain(value, read=True)])
        return told

    def _module(self, module: ModuleType, names: frozenset[str] | None) -> Any:
        """Those parts of a module of the user's that are named; None: all of it."""
        mark = ("module", module.__name__, names)
        if id(module) in self.inside[:-1] or mark in self.kept:
            return ["module again", module.__name__]
        self.kept.append(mark)
        parts = {n: v for n, v in vars(module).items() if (n in names if names is not None else n[:2] != "__")}
        modules = [part for part in parts.values() if isinstance(part, ModuleType) and is_users(part.__name__)]
        parts = {n: v for n, v in parts.items() if not isinstance(v, ModuleType)}
        inner = [[part.__name__, self._module(part, names)] for part in modules]
        return ["module", module.__name__, self._read_all(parts, module.__name__), inner]

    def _class(self, value: type) -> Any:
        heap = 1 << 9  # made by a class statement: one in code without a module's name is called builtins'
        if not is_users(value.__module__) and not (value.__module__ == "builtins" and value.__flags__ & heap):
            return ["installed class", value.__module__, value.__qualname__]
        name = value.__qualname__
        if issubclass(value, Enum):
            members = {each.name: each.value for each in value}
            methods = {n: v for n, v in vars(value).items() if isinstance(v, FunctionType) and n[:2] != "__"}
            return ["enum", name, self._read_all(members, name), self._read_all(methods, name)]
        bases = [self.plain(base, read=True) for base in (type(value), *value.__bases__)]
        attributes = {n: v for n, v in vars(value).items() if not is_made(n)}
        return ["class", name, bases, self._read_all(attributes, name)]

    def _object(self, value: Any, read: bool) -> Any:
        """An object by its class and its state, as a copy would be made of it."""
        if isinstance(value, _C_FUNCTIONS):
            owner = getattr(value, "__module__", None) or getattr(
                getattr(value, "__objclass__", None), "__module__", ""
            )
            if owner and owner != "__main__" and is_users(owner):
                raise _Untold(f"{value!r}, which is compiled")
            bound = getattr(value, "__self__", None)
            bound = None if isinstance(bound, ModuleType) else self.plain(bound, read=True)
            return ["built in", owner, value.__name__, bound]
        if isinstance(value, _NAMED_ONLY):
            return ["named", value.__name__]
        parts = descriptor(value)
        if parts is not None:
            return [type(value).__name__, *(self.plain(part, read=True) for part in parts)]
        if type(value) is object:
            if read:  # a mark, as for a missing argument
                return ["object"]
            raise _Untold("a object")
        try:
            registered = copyreg.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(4) if registered is None else registered(value)
        except Exception as error:  # whatever an object that cannot be copied raises
            raise _Untold(f"a {type(value).__qualname__}") from error
        if isinstance(reduced, str):
            return ["name", type(value).__module__, reduced]
        make, arguments, *rest = reduced
        if isinstance(value, nn.Module) and rest and isinstance(rest[0], dict):
            rest[0] = module_state(rest[0])
        if make is copyreg.__newobj__ or make is copyreg.__newobj_ex__:  # type: ignore[attr-defined]
            arguments = (self.plain(arguments[0], read=read), *arguments[1:])
        state, items, pairs = [*rest, None, None, None][:3]
        listed = [None if each is None else list(each) for each in (items, pairs)]
        return ["object", *(self.plain(part, read=read) for part in (make, arguments, state, *listed))]

    @contextmanager
    def _at(self, name: str) -> Iterator[None]:
        self.where.append(name)
        try:
            yield
        finally:
            self.where.pop()

    def _refusal(self, what: str) -> str:
        path = [name for i, name in enumerate(self.where) if i == 0 or name != self.where[i - 1]]
        read = f" (read as {' → '.join(path)})" if path else ""
        return (
            f"cannot tell the content of {what}{read}, so a change in it would go unseen. Use plain values, tensors, "
            "data sets, functions, functools.partial or dataclasses; or pass version=, a text that you change "
            "whenever it changes."
        )


class _Refused(_Untold):
    """What cannot be told, with the message that the caller sees."""


def _sorted(contents: Iterable[Any]) -> list[Any]:
    return sorted(contents, key=_text)


def _check_named(value: FunctionType) -> None:
    if value.__closure__:
        raise _Refused(
            f"{value.__qualname__} is a closure over {value.__code__.co_freevars}, which its name does not tell; "
            "pass these as arguments: functools.partial(recipe, ...), or a dataclass with __call__."
        )
    if value.__name__ == "<lambda>":
        raise _Refused("a lambda has no name to be known by; write it as a function (def).")
