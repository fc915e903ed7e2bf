"""What every command is: its options, the cheap checks before it, and its work."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

DONE, FAILED, WRONG_USE, EXCEEDED = 0, 1, 2, 3
EXIT_CODES = """exit codes:
  0  done, and every threshold was kept
  1  the work failed, or the preflight found an error
  2  wrong use: an option, a file, a class or the data; nothing was done or written
  3  a threshold of --fail-above or --fail-below was exceeded"""


class UsageError(Exception):
    """The user's mistake, found before much time was spent: one message, exit code 2."""


class Job(ABC):
    """A command whose options are fine: what it would do, and doing it."""

    @abstractmethod
    def plan(self) -> list[str]:
        """What would be done and written, a line each."""

    @abstractmethod
    def run(self) -> int:
        """Do it; the exit code."""


class Command(ABC):
    """One command of ``cwrf``."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line, for ``cwrf --help``."""
    objects: ClassVar[Sequence[str]] = ()
    """Options that name a class or a function, whose arguments are given as ``--option.argument value``."""

    @abstractmethod
    def explain(self) -> str:
        """What ``--help`` says after the summary: what it does, and an example. Registered names are listed now."""

    @abstractmethod
    def add_options(self, parser: Any) -> None:
        """Add the options to an ``ArgumentParser`` of jsonargparse."""

    @abstractmethod
    def prepare(self, options: Any) -> Job:
        """Check everything that can be checked before time is spent.

        Raises:
            UsageError: and any other error here: exit code 2.
        """


def add_common(parser: Any) -> None:
    """The options that every command has."""
    parser.add_argument("--config", action="config", help="a YAML file of these options (--print_config writes one)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist already")
    parser.add_argument(
        "--dry-run", action="store_true", help="do the cheap checks, print what would be done and written, and stop"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def check_outputs(paths: Sequence[Path], overwrite: bool, inputs: Sequence[Any] = ()) -> None:
    """Raise where a file exists that would be overwritten, is read or is written twice, or a folder is not writable."""
    resolved = [path.resolve() for path in paths]
    twice = next((path for path, each in zip(paths, resolved, strict=True) if resolved.count(each) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is named for two outputs.")
    read = {Path(each).resolve() for each in inputs if isinstance(each, (str, PathLike))}
    for path, each in zip(paths, resolved, strict=True):
        if each in read:
            raise UsageError(f"{path} is an input, which would be replaced; name another output.")
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file.")
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise UsageError(f"{', '.join(there)} exists already; pass --overwrite to replace it, or another --out.")
    for path in paths:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise UsageError(f"{path} cannot be written: {folder} is a file.")
        if not os.access(folder, os.W_OK):
            raise UsageError(f"{path} cannot be written: there is no permission to write to {folder}.")


def output_file(option: str, given: str | None, suffix: str) -> Path | None:
    """The file of an option; None where it is not given.

    Raises:
        UsageError: another suffix than that of its format.
    """
    if given is None:
        return None
    if Path(given).suffix.lower() != suffix:
        raise UsageError(f"--{option} {given}: its name must end in {suffix}.")
    return Path(given)
