"""The entry point: reads the command line or YAML, runs one command, and turns errors into lines and exit codes."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning_cwrf._version import __version__
from lightning_cwrf.commands.audit import AuditCommand
from lightning_cwrf.commands.base import DONE, EXIT_CODES, FAILED, WRONG_USE, Command, UsageError, add_common
from lightning_cwrf.commands.check import CheckCommand
from lightning_cwrf.commands.export import ExportCommand
from lightning_cwrf.commands.harden import HardenCommand
from lightning_cwrf.commands.objects import arguments_joined, one_line, with_arguments_apart
from lightning_cwrf.commands.report import ReportCommand
from lightning_cwrf.commands.search import SearchCommand

COMMANDS: tuple[Command, ...] = (
    CheckCommand(),
    HardenCommand(),
    AuditCommand(),
    SearchCommand(),
    ReportCommand(),
    ExportCommand(),
)
_EXAMPLES = """examples:
  cwrf check --model mine.Net --data mine.Data --checkpoint finished.ckpt --vanilla init.safetensors
  cwrf harden --model mine.Net --data mine.Data --checkpoint finished.ckpt --vanilla init.safetensors --out hardened
  cwrf audit --model mine.Net --data mine.Data --checkpoint hardened/hardened.ckpt --fail-above loss/auroc=0.6
  cwrf search --model mine.Net --data mine.Data --training.max_epochs 100 --floor 0.02 --out searched
  cwrf report hardened/finished.json hardened/hardened.json --out report.html
  cwrf export --model mine.Net --checkpoint hardened/hardened.ckpt --out model.safetensors

Each command has its own --help. Every option can be written in a YAML file: --print_config writes one, --config
reads it."""


def main(words: Sequence[str] | None = None) -> int:
    """Run ``cwrf``; the words default to the command line.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong use, 3 a threshold exceeded.

    >>> main(["audit", "--checkpoint", "finished.ckpt"])
    2
    """
    given = list(sys.argv[1:] if words is None else words)
    sys.path.insert(0, os.getcwd())  # as for `python train.py`
    try:
        with _plain_words():
            return _run(given)
    finally:
        sys.path.remove(os.getcwd()) if os.getcwd() in sys.path else None


def _run(words: list[str]) -> int:
    command = next((each for each in COMMANDS if words and each.name == words[0]), None)
    if command is None:
        return _top_level(words)
    name = f"cwrf {command.name}"
    printed = any(word.startswith("--print_config") for word in words)
    words = [word for word in words if not word.startswith("--print_config")]
    try:
        parser = _parser(command)
        options = parser.parse_args(with_arguments_apart(words[1:], command.objects))
        if printed:
            print(parser.dump(arguments_joined(options, command.objects)), end="")
            return DONE
    except SystemExit as end:  # --help
        return end.code if isinstance(end.code, int) else DONE
    except Exception as error:  # jsonargparse raises many kinds
        return _fail(name, error, WRONG_USE, debug="--debug" in words)
    try:
        _check_arguments_used(options, command.objects)
        job = command.prepare(options)
        if options.dry_run:
            print("\n".join(["This would be done:", *(f"  {line}" for line in job.plan())]))
            return DONE
    except Exception as error:
        return _fail(name, error, WRONG_USE, debug=options.debug)
    try:
        return job.run()
    except KeyboardInterrupt:
        print(f"{name}: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        code = WRONG_USE if isinstance(error, UsageError) else FAILED
        return _fail(name, error, code, debug=options.debug)


def _check_arguments_used(options: Any, objects: Sequence[str]) -> None:
    """Raise for arguments of an object that is not there."""
    for name in objects:
        given = options[f"{name}_args"]
        if given and options[name] is None:
            raise UsageError(f"--{name}.{next(iter(given))} is given without --{name}.")


def _top_level(words: list[str]) -> int:
    names = ", ".join(command.name for command in COMMANDS)
    if words and words[0] == "--version":
        print(f"lightning_cwrf {__version__}")
        return DONE
    if words and words[0] not in ("-h", "--help"):
        print(f"cwrf: error: there is no command {words[0]!r}; there are {names}. See cwrf --help.", file=sys.stderr)
        return WRONG_USE
    listed = "\n".join(f"  {command.name:<8} {command.summary}" for command in COMMANDS)
    text = (
        "usage: cwrf COMMAND [options]\n\nMakes a finished Lightning classifier safer against membership inference, "
        f"and measures by how much.\n\ncommands:\n{listed}\n\n{_EXAMPLES}\n\n{EXIT_CODES}"
    )
    print(text, file=sys.stdout if words else sys.stderr)
    return DONE if words else WRONG_USE


def _parser(command: Command) -> Any:
    from jsonargparse import SUPPRESS, ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        """Keeps the lines of the explanation as they are written."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return "".join(indent + line for line in text.splitlines(keepends=True))

    parser = ArgumentParser(
        prog=f"cwrf {command.name}",
        description=command.summary,
        epilog=f"{command.explain()}\n\n{EXIT_CODES}",
        exit_on_error=False,
        formatter_class=Formatter,
        allow_abbrev=False,  # --conf would be read after the thresholds and replace them
    )
    command.add_options(parser)
    for name in command.objects:
        parser.add_argument(f"--{name}_args", type=dict[str, Any], default={}, help=SUPPRESS)
    add_common(parser)
    return parser


def _fail(name: str, error: BaseException, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    known = type(error).__name__ not in ("KeyError", "AttributeError", "IndexError", "AssertionError")
    message = one_line(error) if known and str(error) else f"{type(error).__name__}: {one_line(error)}"
    print(f"{name}: error: {message}", file=sys.stderr)
    if not debug:
        print(f"See {name} --help; --debug shows where it happened.", file=sys.stderr)
    return code


@contextmanager
def _plain_words() -> Iterator[None]:
    """Warnings as one line each, once, without the line of code; Lightning's remarks about devices left out."""
    told: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = str(message)
        if text not in told and issubclass(category, UserWarning):
            told.add(text)
            print(f"warning: {text}", file=sys.stderr)

    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(many workers|number of training batches|treespec|validation_step).*")
        warnings.showwarning = show
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)
