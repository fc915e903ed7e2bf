"""``cwrf report``: saved audits as one HTML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_cwrf.auditing import AuditResult
from lightning_cwrf.commands.base import DONE, Command, Job, UsageError, check_outputs, output_file
from lightning_cwrf.report import comparison_table, write_report

_EXPLAINED = """Audits are named by their files, in the given order: before, then after. No model is read.

example:
  cwrf report finished.json hardened.json --out report.html"""


@dataclass
class ReportJob(Job):
    results: dict[str, AuditResult]
    out: Path

    def plan(self) -> list[str]:
        return [f"write {self.out} about {', '.join(self.results)}"]

    def run(self) -> int:
        print(comparison_table(self.results))
        print(f"\nsaved {write_report(self.results, self.out, overwrite=True)}")
        return DONE


class ReportCommand(Command):
    name = "report"
    summary = "Write a report that people can read, one HTML file, from saved audits."

    def explain(self) -> str:
        return _EXPLAINED

    def add_options(self, parser: Any) -> None:
        parser.add_argument("audits", nargs="*", type=str, help="files that audit or harden saved")
        parser.add_argument("--out", type=str, default="report.html", help="the file to write")

    def prepare(self, options: Any) -> ReportJob:
        if not options.audits:
            raise UsageError("name one or more saved audits, such as hardened.json.")
        out = output_file("out", options.out, ".html")
        assert out is not None
        check_outputs([out], options.overwrite, options.audits)
        paths = [Path(each) for each in options.audits]
        names = [path.stem for path in paths]
        if len(set(names)) < len(names):
            names = [str(path.with_suffix("")) for path in paths]
        if len(set(names)) < len(names):
            raise UsageError("an audit is named twice.")
        results = {name: AuditResult.load(path) for name, path in zip(names, paths, strict=True)}
        comparison_table(results)  # raises where they cannot be compared
        return ReportJob(results, out)
