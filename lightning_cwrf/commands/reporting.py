"""Audits as a report for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_cwrf.auditing import AuditResult
from lightning_cwrf.report import write_report


def write_html(results: Mapping[str, AuditResult], path: Path) -> Path:
    """Write one HTML file about audits by name."""
    return write_report(results, path)
