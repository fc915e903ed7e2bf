"""Audits as a report for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_cwrf.auditing import AuditResult


def write_html(results: Mapping[str, AuditResult], path: Path, **details: Any) -> Path:
    """Write one HTML file about audits by name; an existing file was checked for (``check_outputs``)."""
    from lightning_cwrf.report import write_report

    return Path(write_report(results, path, overwrite=True, **details))
