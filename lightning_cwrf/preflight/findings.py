"""What a preflight found."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException

Level = Literal["ok", "warning", "error"]
_SIGNS: dict[Level, str] = {"ok": "OK", "warning": "warning", "error": "ERROR"}
_WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """One line of a preflight.

    Attributes:
        name: of what was looked at, for example ``"overlap"``.
        level: ``"ok"``, ``"warning"`` or ``"error"``; after an error, a hardening or its audit would fail or mean
            nothing.
        found: what was found, and, where the check itself says so, the fix.
        fix: what to do, where ``found`` does not say it.
    """

    name: str
    level: Level
    found: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.found} {self.fix}".strip()
        head = f"{_SIGNS[self.level]:<8} {self.name:<14} "
        return textwrap.fill(
            text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False
        )


@dataclass(frozen=True)
class Preflight:
    """The findings of :func:`~lightning_cwrf.check`, in order; ``print`` shows them as a table.

    >>> report = Preflight((Finding("batch form", "ok", "inputs (16, 4)"), Finding("overlap", "error", "2 of 9 ...")))
    >>> report.ok, [finding.name for finding in report.errors]
    (False, ['overlap'])
    >>> print(report)
    OK       batch form     inputs (16, 4)
    ERROR    overlap        2 of 9 ...
    1 error, 0 warnings
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error; there may be warnings."""
        return not self.errors

    @property
    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """The findings that are warnings."""
        return [finding for finding in self.findings if finding.level == "warning"]

    def raise_for_errors(self) -> None:
        """Raise where there are errors.

        Raises:
            MisconfigurationException: names every error and its fix.
        """
        if self.errors:
            told = "; ".join(f"{finding.name}: {finding.found} {finding.fix}".strip() for finding in self.errors)
            raise MisconfigurationException(f"the preflight found {_counted(len(self.errors), 'error')}: {told}")

    def __str__(self) -> str:
        count = f"{_counted(len(self.errors), 'error')}, {_counted(len(self.warnings), 'warning')}"
        return "\n".join([*map(str, self.findings), count])


def attempt(name: str, rule: Callable[[], str], *, fix: str = "") -> list[Finding]:
    """Run a check of the package: its errors and warnings become findings, and so does the text that it returns.

    Args:
        name: of the findings.
        rule: returns what was found, for a finding that is fine; an empty text for none.
        fix: what to do about an error whose own message does not say it.
    """
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            text = rule()
        except Exception as error:  # the user's own model and data may raise anything
            known = isinstance(error, (ValueError, TypeError, MisconfigurationException))
            message = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
            return [*_warned(name, seen), Finding(name, "error", message, fix)]
    found = _warned(name, seen)
    return [*found, Finding(name, "ok", text)] if text else found


def _warned(name: str, seen: list[warnings.WarningMessage]) -> list[Finding]:
    told = dict.fromkeys(str(each.message) for each in seen if issubclass(each.category, UserWarning))
    return [Finding(name, "warning", message) for message in told]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
