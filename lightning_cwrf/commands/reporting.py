"""Audits as a report for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning_cwrf.report
from lightning_cwrf.auditing import AuditResult
from lightning_cwrf.commands.base import UsageError


def has_html() -> bool:
    """Whether ``lightning_cwrf.report`` has its HTML report yet."""
    return hasattr(lightning_cwrf.report, "write_report")


def check_html() -> None:
    """Raise where a report was asked for that cannot be written."""
    if not has_html():
        raise UsageError("this version of lightning_cwrf writes no HTML report yet; leave the report out.")


def write_html(results: Mapping[str, AuditResult], path: Path, **details: Any) -> Path:
    """Write one HTML file about audits by name; an existing file was checked for (``check_outputs``)."""
    write: Any = vars(lightning_cwrf.report)["write_report"]
    return Path(write(results, path, overwrite=True, **details))
