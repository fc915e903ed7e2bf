"""What code does and reads, by its live code object: source files can be outdated, missing, or of other code."""

from __future__ import annotations

import builtins
import dis
import functools
import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

_ENVIRONMENT = ("environ", "environb", "getenv", "getenvb")
_OF_THE_MACHINE = {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
"""The share of the machine of a process; worker processes get theirs by these variables."""

_BY_TEXT = {"globals", "eval", "exec", "__import__"}
_COMMAND_LINE = {"argv", "parse_args", "parse_known_args"}
_GLOBAL_LOADS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_BETWEEN = {"PUSH_NULL", "PRECALL", "CACHE", "NOP", "EXTENDED_ARG"}


def instructions(code: CodeType) -> list[Any]:
    """What a code object does, without file names and line numbers, and Python's minor version, which it depends on."""
    consts = [instructions(const) if isinstance(const, CodeType) else const for const in code.co_consts]
    arguments = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    named = code.co_varnames[: sum(arguments[::2])], code.co_names, code.co_freevars, code.co_cellvars
    handlers = getattr(code, "co_exceptiontable", b"")  # from Python 3.11 on
    return [importlib.util.MAGIC_NUMBER, code.co_code, consts, arguments, code.co_flags, named, handlers]


@dataclass
class Reads:
    """What a code object and the functions inside it look up when they run.

    Attributes:
        values: what it reads by name from its module, and what it imports, by name.
        modules: the user's modules among these.
        names: every name in it, attributes too.
        environment: environment variables, with their present values; None: one under a computed name.
        at_run_time: functions that look names up by text, which may be any name.
    """

    values: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, ModuleType] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    environment: dict[str | None, str | None] = field(default_factory=dict)
    at_run_time: set[str] = field(default_factory=set)

    @property
    def whole_modules(self) -> bool:
        """Whether it looks attributes up at run time, which may be any part of a module."""
        return not self.names.isdisjoint(("getattr", "vars", "__dict__", "attrgetter"))


def reads_of(code: CodeType, scope: Mapping[str, Any]) -> Reads:
    """What a code object reads, with ``scope`` as its module's globals."""
    found = Reads()
    codes = [code]
    while codes:
        code = codes.pop()
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
        found.names.update(code.co_names)
        steps = [step for step in dis.get_instructions(code) if step.opname not in _BETWEEN]
        for i, step in enumerate(steps):
            if step.opname in _GLOBAL_LOADS and step.argval in scope:
                found.values[step.argval] = scope[step.argval]
            elif step.opname in _GLOBAL_LOADS and step.argval in _BY_TEXT:
                found.at_run_time.add(f"{step.argval}()")
            elif step.opname == "IMPORT_NAME":
                found.values.update(_imported(step.argval, steps[i - 2].argval, steps[i - 1].argval, scope))
        read = _environment(steps, scope, found.values)
        found.environment.update((name, value) for name, value in read if name not in _OF_THE_MACHINE)
    if not _COMMAND_LINE.isdisjoint(found.names):
        found.values["sys.argv"] = list(sys.argv)
    for name, value in list(found.values.items()):
        if value is os.environ or value is getattr(os, "environb", None):  # not the whole environment
            del found.values[name]
        elif isinstance(value, ModuleType):
            del found.values[name]
            if is_users(value.__name__):
                found.modules[name] = value
    return found


def _imported(name: str, level: int, wanted: tuple[str, ...] | None, scope: Mapping[str, Any]) -> dict[str, Any]:
    """What an import statement inside a function imports, by name; None: it cannot be imported."""
    package = scope.get("__package__") or str(scope.get("__name__", "")).rpartition(".")[0]
    try:
        whole = importlib.util.resolve_name("." * level + name, package) if level else name
        top = whole.partition(".")[0]
        if top not in sys.modules and importlib.util.find_spec(top) is None:
            return {whole: None}
        if not is_users(top):
            return {whole: os} if whole == "os" else {}  # os for its environment
        module = importlib.import_module(whole)
        if not wanted:
            return {whole: module}
        return {f"{whole}.{each}": _attribute(module, each) for each in wanted}
    except Exception:  # mostly an optional module; any other failure is repeated in the recipe
        return {name: None}


def _attribute(module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        importlib.import_module(f"{module.__name__}.{name}")  # a module of a package
    return getattr(module, name)


def _environment(
    steps: list[dis.Instruction], scope: Mapping[str, Any], values: Mapping[str, Any]
) -> Iterator[tuple[str | None, str | None]]:
    """The environment variables that code reads, without those that it sets."""
    own = [os.environ, os.getenv, getattr(os, "environb", None), getattr(os, "getenvb", None)]
    for i, step in enumerate(steps):
        taken = scope.get(step.argval) if step.opname in _GLOBAL_LOADS else None
        by_attribute = (
            step.argval in _ENVIRONMENT
            and step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"))
            and any(value is os for value in (*scope.values(), *values.values()))
        )
        if not by_attribute and not any(taken is each for each in own if each is not None):
            continue
        rest = steps[i + 1 : i + 5]
        method = rest[0].argval if rest and rest[0].opname in ("LOAD_ATTR", "LOAD_METHOD") else None
        rest = rest[1:] if method is not None else rest
        if rest and rest[0].opname == "CONTAINS_OP":  # the variable is on the left
            before = steps[max(i - 1 - by_attribute, 0)]
            name = _text(before, scope)
            yield name, os.environ.get(name or "")
            continue
        name = _text(rest[0], scope) if rest else None
        if name is not None and len(rest) > 1 and rest[1].opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            continue
        default = _text(rest[1], scope) if method == "setdefault" and len(rest) > 1 else None
        known = method in (None, "get", "setdefault") and name is not None
        yield (name, os.environ.get(name, default)) if known and name is not None else (None, None)


def _text(step: dis.Instruction, scope: Mapping[str, Any]) -> str | None:
    value = scope.get(step.argval) if step.opname in _GLOBAL_LOADS else step.argval
    value = value.decode() if isinstance(value, bytes) else value
    return value if isinstance(value, str) and (step.opname.startswith("LOAD_CONST") or value != step.argval) else None


@functools.cache
def is_users(module: str | None) -> bool:
    """Whether a module is the user's own: not of Python, an installed package, or this package.

    Code without a file (a notebook, a shell, a string) is the user's.
    """
    if module in (None, "__main__", "__mp_main__"):
        return True
    assert module is not None
    top = module.partition(".")[0]
    if top == "lightning_cwrf" or module in sys.builtin_module_names or module == builtins.__name__:
        return False
    found = sys.modules.get(module)
    spec = getattr(found, "__spec__", None)
    if found is None:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return True
    if getattr(spec, "origin", None) in ("built-in", "frozen"):
        return False
    source = getattr(found, "__file__", None) or getattr(spec, "origin", None)
    source = source or next(iter(getattr(spec, "submodule_search_locations", None) or ()), None)
    if source is None:
        return top == module or is_users(top)
    path = Path(source).resolve()
    installed = {"site-packages", "dist-packages"}.intersection(path.parts)
    return not installed and Path(sysconfig.get_path("stdlib")).resolve() not in path.parents
