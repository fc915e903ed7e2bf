"""Classes and functions by their import path, and objects made of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from lightning_cwrf.commands.base import UsageError

Named = str | dict[str, Any]
"""An import path, or ``{class_path: ..., init_args: {...}}``."""


def with_arguments_apart(words: Sequence[str], objects: Sequence[str]) -> list[str]:
    """Words of a command line as jsonargparse takes them.

    ``--model.width 8`` becomes ``--model_args.width 8``, and ``--fail-above``, which may be repeated,
    ``--fail-above+``. ``--config`` comes first, wherever it was written, so that its lists are added to and not
    replaced.

    Raises:
        UsageError: two files, or a threshold without a word.

    >>> with_arguments_apart(["--model", "mine.Net", "--model.init_args.width=8", "--fail-above=a=1"], ["model"])
    ['--model', 'mine.Net', '--model_args.width=8', '--fail-above+=a=1']
    """
    dotted = re.compile(rf"--({'|'.join(objects) or '(?!)'})\.(?:init_args\.)?")
    rewritten = [dotted.sub(r"--\1_args.", word, count=1) if dotted.match(word) else word for word in words]
    rewritten = [re.sub(r"^--fail[-_](above|below)\+?(?=$|=)", r"--fail-\1+", word) for word in rewritten]
    files: list[str] = []
    others: list[str] = []
    for i, word in enumerate(rewritten):
        after_name = i > 0 and rewritten[i - 1] == "--config"
        (files if after_name or word == "--config" or word.startswith("--config=") else others).append(word)
    if sum(word.startswith("--config") for word in files) > 1:
        raise UsageError("--config is given twice, and the second file would replace lists of the first: write one.")
    for i, word in enumerate(others):
        option, _, value = word.partition("=")
        value = value or next(iter(others[i + 1 : i + 2]), "")
        if option in ("--fail-above+", "--fail-below+") and re.fullmatch(r"[\[\]\s,]*", value):
            raise UsageError(f"{option[:-1]} is empty: name a threshold, such as loss/auroc=0.6, or leave it out.")
    return [*files, *others]


def arguments_joined(options: Any, objects: Sequence[str]) -> Any:
    """The options with the arguments of each object below its ``class_path``, for a YAML file."""
    joined = options.clone()
    for name in objects:
        arguments = joined[f"{name}_args"]
        if arguments and joined[name] is not None:
            path, init = path_and_arguments(name, joined[name], arguments)
            joined[name], joined[f"{name}_args"] = {"class_path": path, "init_args": init}, {}
    return joined


def path_and_arguments(option: str, given: Named, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The import path and the arguments of an option; those of the command line win over the file's.

    >>> path_and_arguments("model", {"class_path": "mine.Net", "init_args": {"width": 4}}, {"width": 8})
    ('mine.Net', {'width': 8})
    """
    if isinstance(given, str):
        return given, dict(arguments)
    unknown = sorted(set(given) - {"class_path", "init_args"})
    path, init = given.get("class_path"), given.get("init_args") or {}
    if unknown or not isinstance(path, str) or not isinstance(init, Mapping):
        raise UsageError(
            f"--{option} must be an import path such as mine.Name, or class_path: mine.Name with init_args: below it"
            + (f"; it has {', '.join(unknown)}." if unknown else ".")
        )
    return path, {**init, **arguments}


def imported(option: str, path: str) -> Any:
    """What an import path names: ``package.module.Name``."""
    module, _, name = path.rpartition(".")
    if not module or not re.fullmatch(r"\w+(\.\w+)*", path):
        raise UsageError(f"--{option} must be an import path such as mine.Name, not {path!r}.")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module == missing or module.startswith(f"{missing}."):
            raise UsageError(
                f"--{option}: there is no module {missing!r}. Run cwrf in the folder that your own scripts run in, or "
                "install the package."
            ) from error
        raise UsageError(f"--{option}: {module} cannot be imported: it needs the module {missing!r}.") from error
    except Exception as error:  # the user's file may raise anything
        raise UsageError(f"--{option}: {module} cannot be imported ({type(error).__name__}: {error}).") from error
    if not hasattr(found, name):
        own = [each for each, value in vars(found).items() if getattr(value, "__module__", None) == module]
        listed = ", ".join(each for each in own if not each.startswith("_"))
        raise UsageError(f"--{option}: {module} has no {name!r}; it has {listed or 'no class or function'}.")
    return getattr(found, name)


def imported_class(option: str, path: str, kind: type) -> Any:
    """The class of that path, which must be a subclass of ``kind``."""
    found = imported(option, path)
    if not isinstance(found, type):
        raise UsageError(f"--{option} must name a class, and {path} is none (it is of type {type(found).__name__}).")
    if not issubclass(found, kind):
        old = any(base.__module__.startswith("pytorch_lightning.") for base in found.__mro__)
        more = " It inherits that of pytorch_lightning; import it from lightning.pytorch." if old else ""
        raise UsageError(f"--{option} must name a {kind.__name__}, and {path} is none.{more}")
    return found


def checked_arguments(option: str, target: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments as the types of a class or function say, as LightningCLI reads them from YAML.

    Only those given are read, so that the others may come from elsewhere (a checkpoint).
    """
    from jsonargparse import ArgumentParser

    name = getattr(target, "__name__", type(target).__name__)
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    every, parser = ArgumentParser(exit_on_error=False), ArgumentParser(exit_on_error=False)
    add = "add_class_arguments" if isinstance(target, type) else "add_function_arguments"
    getattr(every, add)(target, fail_untyped=False)
    known = [each.partition(".")[0] for each in every.get_defaults(skip_validation=True).keys()]  # noqa: SIM118
    getattr(parser, add)(target, fail_untyped=False, skip={each for each in known if each not in given})
    unknown = sorted(set(given) - set(known))
    if unknown and not takes_any:
        raise UsageError(
            f"--{option}: {name} has no argument {', '.join(unknown)}; it has {', '.join(known) or 'none'}."
        )
    try:
        read = parser.parse_object({each: value for each, value in given.items() if each in known})
        made = parser.instantiate(read) if hasattr(parser, "instantiate") else parser.instantiate_classes(read)
    except Exception as error:
        raise UsageError(f"--{option}: {one_line(error)}") from error
    return {**{each: given[each] for each in unknown}, **{each: made[each] for each in given if each in known}}


def made(option: str, path: str, given: Mapping[str, Any], kind: type | None = None) -> Any:
    """The object that a path and its arguments give: a class or a function is called, anything else is taken."""
    target = imported(option, path) if kind is None else imported_class(option, path, kind)
    if not callable(target):
        return target
    arguments = checked_arguments(option, target, given)
    try:
        return target(**arguments)
    except Exception as error:
        raise UsageError(f"--{option}: {path} could not be made ({type(error).__name__}: {error}).") from error


def one_line(error: BaseException) -> str:
    r"""The message of an error on one line.

    >>> one_line(ValueError('Parser key "rate":\n  Expected a <class \'float\'>. Got value: x'))
    'rate: Expected a float. Got value: x'
    """
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip()
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    return re.sub(r"\ba (int|object)\b", r"an \1", text)
