"""The content of a value as nested lists of plain values: what an identity is a digest of."""

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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_cwrf.data import as_loader, isolated_rng, reads_alike, tensors_of
from lightning_cwrf.shadows.identity.code import Reads, instructions, is_users, reads_of
from lightning_cwrf.shadows.identity.values import (
    C_FUNCTIONS,
    NAMED_ONLY,
    cells,
    descriptor,
    is_argument,
    is_redundant,
    known_fields,
    loader_settings,
    reduced,
    simple,
)


def as_text(content: Any) -> str:
    """A description as text, the same in every process."""
    return json.dumps(content, sort_keys=True)


def _sorted(contents: Iterable[Any]) -> list[Any]:
    return sorted(contents, key=as_text)


class NoContent(TypeError):
    """A value without comparable content; the message does not say yet where it was found."""


class Unsupported(NoContent):
    """The same, with the message for the caller."""


class Describer:
    """Turns one value into nested lists of plain values that describe its content.

    The words in these lists are part of every key in every store: a change makes users train again.

    Args:
        ignore_unknown: leave values without comparable content out, instead of raising.
    """

    def __init__(self, ignore_unknown: bool) -> None:
        self.ignore_unknown = ignore_unknown
        self.where: list[str] = []
        self.inside: list[int] = []
        self.known: dict[int, int] = {}
        self.kept: list[Any] = []  # keeps temporary objects alive, so that no id is used twice

    def describe(self, value: Any, *, read: bool = False) -> Any:
        """The content of a value; ``read``: it is read by the recipe's code, and not part of the recipe itself."""
        plain = simple(value)
        if plain is not None:
            return self._with_class(value, plain[0])
        if id(value) in self.inside:
            return ["again", len(self.inside) - self.inside.index(id(value))]
        self.inside.append(id(value))
        try:
            return self._structured(value, read)
        except NoContent as error:
            if self.ignore_unknown:
                return ["covered by the version", type(value).__qualname__]
            if isinstance(error, Unsupported):
                raise
            raise Unsupported(self._message(str(error))) from error
        finally:
            self.inside.pop()

    def _structured(self, value: Any, read: bool) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            return self._array(value)
        if isinstance(value, Enum):
            return ["enum", type(value).__qualname__, value.name, self.describe(value.value, read=read)]
        if isinstance(value, Mapping):
            pairs = [[self.describe(k, read=read), self.describe(v, read=read)] for k, v in value.items()]
            if isinstance(value, OrderedDict):
                return self._with_class(value, ["ordered map", pairs])
            made = [self.describe(value.default_factory, read=True)] if isinstance(value, defaultdict) else []
            return self._with_class(value, ["map", _sorted(pairs), *made])
        if isinstance(value, (list, tuple)):
            return self._with_class(value, ["list", [self.describe(item, read=read) for item in value]])
        if isinstance(value, (set, frozenset)):
            return self._with_class(value, ["set", _sorted(self.describe(item, read=read) for item in value)])
        if isinstance(value, CodeType):
            return ["code", self.describe(instructions(value))]
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return ["partial", *(self.describe(part, read=read) for part in parts)]
        if isinstance(value, types.MethodType):
            return ["method", self.describe(value.__func__, read=True), self.describe(value.__self__, read=read)]
        if isinstance(value, FunctionType):
            if not read and not self.ignore_unknown:
                _check_named(value)
            return self._once(value, self._function)
        if isinstance(value, type):
            return self._once(value, self._class)
        if isinstance(value, ModuleType):
            return self._module(value, None) if is_users(value.__name__) else ["module", value.__name__]
        if isinstance(value, DataLoader) and not read:
            settings = self._read_all(loader_settings(value), "DataLoader")
            return ["loader", settings, self.describe(value.dataset)]
        if dataclasses.is_dataclass(value):
            return ["dataclass", self.describe(type(value), read=read), self._fields(value, read)]
        if isinstance(value, Dataset) and not read:
            return ["data set", self._examples(value)]
        return self._object(value, read)

    def _with_class(self, value: Any, content: Any) -> Any:
        """The content of a container or a plain value, with its class where that is the user's own."""
        kind = type(value)
        if not is_users(kind.__module__):
            return content
        attributes = self._read_all(getattr(value, "__dict__", {}), kind.__qualname__)
        return ["of a class", self.describe(kind, read=True), attributes, content]

    def _array(self, value: Tensor | np.ndarray[Any, Any]) -> Any:
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise NoContent(f"a tensor of layout {value.layout} on {value.device}")
            array = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            kind, raw = str(array.dtype), array.reshape(-1).view(torch.uint8).numpy()
        elif value.dtype.hasobject:
            return ["objects", list(value.shape), self.describe(value.ravel().tolist())]
        else:
            kind, raw = value.dtype.str, np.ascontiguousarray(value)
        trained = ["trained"] if isinstance(value, Tensor) and value.requires_grad else []
        return ["array", kind, list(value.shape), hashlib.sha256(raw.tobytes()).hexdigest(), *trained]

    def _fields(self, value: Any, read: bool) -> Any:
        """A dataclass's fields, and other attributes that were set on the object."""
        named = known_fields(value)
        cached = {n for n in vars(type(value)) if isinstance(vars(type(value))[n], functools.cached_property)}
        others = set(getattr(value, "__dict__", ())) - cached - {field.name for field in dataclasses.fields(value)}
        named += [(name, getattr(value, name)) for name in others]
        return ["map", [[name, self.describe(each, read=read)] for name, each in sorted(named, key=lambda n: n[0])]]

    def _examples(self, data: Dataset[Any]) -> list[Any]:
        """Every example of a data set, in order."""
        if not reads_alike(data):
            raise NoContent("a data set that reads differently each time (take its random augmentation out)")
        with isolated_rng():
            return [self.describe(tensors_of(batch)) for batch in as_loader(data, shuffle=False)]

    def _once(self, value: Any, describe: Callable[[Any], Any]) -> Any:
        """Functions and classes refer to one another; the second time, one is described by its number."""
        if id(value) in self.known:
            return ["known", self.known[id(value)]]
        self.known[id(value)] = len(self.known)
        self.kept.append(value)
        return describe(value)

    def _function(self, value: FunctionType) -> Any:
        name = value.__qualname__
        closed = dict(zip(value.__code__.co_freevars, cells(value), strict=True))
        module = value.__globals__.get("__name__")  # a decorator's wrapper has the name of what it wraps
        if not is_users(module):
            # Of an installed decorator, its arguments only.
            closed["__wrapped__"] = vars(value).get("__wrapped__")
            given = {n: cell for n, cell in closed.items() if is_argument(cell)}
            return ["installed", module, value.__code__.co_name, self._read_all(given, name)]
        code = value.__code__
        own = {"defaults": value.__defaults__, "keyword defaults": value.__kwdefaults__, **vars(value)}
        reads = self._reads(reads_of(code, value.__globals__), name)
        return ["function", name, self.describe(instructions(code)), self._read_all({**own, **closed}, name), reads]

    def _reads(self, reads: Reads, name: str) -> Any:
        names = None if reads.whole_modules else frozenset(reads.names)
        with self._at(name):
            if reads.at_run_time and not self.ignore_unknown:
                raise Unsupported(self._message(f"what {' and '.join(sorted(reads.at_run_time))} looks up"))
            if None in reads.environment and not self.ignore_unknown:
                raise Unsupported(self._message("the environment (os.environ) under a name that is not constant"))
            modules = [[each, self._module(module, names)] for each, module in sorted(reads.modules.items())]
        environment = sorted([n, v] for n, v in reads.environment.items() if n is not None)
        return [self._read_all(reads.values, name), modules, environment]

    def _read_all(self, values: Mapping[str, Any], reader: str) -> Any:
        described = []
        for name, value in sorted(values.items()):
            with self._at(reader), self._at(name):
                described.append([name, self.describe(value, read=True)])
        return described

    def _module(self, module: ModuleType, names: frozenset[str] | None) -> Any:
        """The named parts of one of the user's modules; None: all of it."""
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
        heap = 1 << 9  # made by a class statement; in code without a module name, such a class says "builtins"
        if not is_users(value.__module__) and not (value.__module__ == "builtins" and value.__flags__ & heap):
            return ["installed class", value.__module__, vars(value).get("_identity_name", value.__qualname__)]
        name = value.__qualname__
        if issubclass(value, Enum):
            members = {each.name: each.value for each in value}
            methods = {n: v for n, v in vars(value).items() if isinstance(v, FunctionType) and n[:2] != "__"}
            return ["enum", name, self._read_all(members, name), self._read_all(methods, name)]
        bases = [self.describe(base, read=True) for base in (type(value), *value.__bases__)]
        attributes = {n: v for n, v in vars(value).items() if not is_redundant(n)}
        return ["class", name, bases, self._read_all(attributes, name)]

    def _object(self, value: Any, read: bool) -> Any:
        """An object by its class and its state, as for a copy."""
        if isinstance(value, C_FUNCTIONS):
            return self._compiled(value)
        if isinstance(value, NAMED_ONLY):
            return ["named", value.__name__]
        parts = descriptor(value)
        if parts is not None:
            return [type(value).__name__, *(self.describe(part, read=True) for part in parts)]
        if type(value) is object:
            if read:  # a mark, as for a missing argument
                return ["object"]
            raise NoContent("an object")
        try:
            copied = reduced(value)
        except Exception as error:  # whatever an object that cannot be copied raises
            raise NoContent(f"a {type(value).__qualname__}") from error
        if isinstance(copied, str):
            return ["name", type(value).__module__, copied]
        make, arguments, *rest = copied
        if make is copyreg.__newobj__ or make is copyreg.__newobj_ex__:  # type: ignore[attr-defined]
            arguments = (self.describe(arguments[0], read=read), *arguments[1:])
        return ["object", *(self.describe(part, read=read) for part in (make, arguments, *rest))]

    def _compiled(self, value: Any) -> Any:
        """A function in C, which counts by name."""
        owner = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__module__", "")
        if owner and owner != "__main__" and is_users(owner):
            raise NoContent(f"{value!r}, which is compiled")
        bound = getattr(value, "__self__", None)
        bound = None if isinstance(bound, ModuleType) else self.describe(bound, read=True)
        return ["built in", owner, value.__name__, bound]

    @contextmanager
    def _at(self, name: str) -> Iterator[None]:
        self.where.append(name)
        try:
            yield
        finally:
            self.where.pop()

    def _message(self, what: str) -> str:
        path = [name for i, name in enumerate(self.where) if i == 0 or name != self.where[i - 1]]
        read = f" (read as {' → '.join(path)})" if path else ""
        return (
            f"the content of {what}{read} cannot be compared, so a change in it would go unseen. Use plain values, "
            "tensors, data sets, functions, functools.partial or dataclasses; or pass version=, a text that you change "
            "whenever it changes."
        )


def _check_named(value: FunctionType) -> None:
    if value.__closure__:
        raise Unsupported(
            f"{value.__qualname__} is a closure over {value.__code__.co_freevars}; pass these as arguments: "
            "functools.partial(recipe, ...), or a dataclass with __call__."
        )
    if value.__name__ == "<lambda>":
        raise Unsupported("a lambda has no name to be found by; write it as a function (def).")
