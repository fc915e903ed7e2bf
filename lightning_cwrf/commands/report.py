"""``cwrf report``: saved audits as one HTML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_cwrf.auditing.saved import format_name
from lightning_cwrf.commands.audits import concluded
from lightning_cwrf.commands.base import DONE, Command, Job, UsageError, check_outputs, output_file
from lightning_cwrf.commands.record import MASK, Record, records_of
from lightning_cwrf.report import comparison_table, write_report
from lightning_cwrf.report.inputs import named_results
from lightning_cwrf.report.table import AnyAudit
from lightning_cwrf.searching import RecipeSearch, write_search_report
from lightning_cwrf.weights.masks import WeightMask

_EXPLAINED = """Audits are named by their files, in the given order: before, then after. No model is read. Where
harden wrote the audits, its settings.json beside them gives the settings, and mask.safetensors the rewound weights.
Audits of recipes have a page of their own, and so has a search, search.json.

examples:
  cwrf report hardened/finished.json hardened/hardened.json --out report.html
  cwrf report before.json after.json --mask mask.safetensors
  cwrf report searched/search.json"""


@dataclass
class ReportJob(Job):
    results: dict[str, AnyAudit]
    out: Path
    mask: Path | None
    settings: dict[str, Any]
    seconds: dict[str, float | None]
    remarks: list[str]

    def plan(self) -> list[str]:
        beside = [] if self.mask is None else [f"show the rewound weights of {self.mask}"]
        return [*beside, *self.remarks, f"write {self.out} about {', '.join(self.results)}"]

    def run(self) -> int:
        print(comparison_table(self.results, self.seconds))
        print("\n".join(self.remarks))
        more: dict[str, Any] = {"mask": self.mask, "settings": self.settings, "seconds": self.seconds}
        print(f"saved {write_report(self.results, self.out, overwrite=True, **more)}")
        print(concluded(self.results))
        return DONE


@dataclass
class SearchReportJob(Job):
    search: RecipeSearch
    out: Path

    def plan(self) -> list[str]:
        return [f"write {self.out} about a search over {len(self.search.trials)} recipes"]

    def run(self) -> int:
        print(self.search)
        print(f"\nsaved {write_search_report(self.search, self.out, overwrite=True)}")
        return DONE


class ReportCommand(Command):
    name = "report"
    summary = "Write a report that people can read, one HTML file, from saved audits or a search."

    def explain(self) -> str:
        return _EXPLAINED

    def add_options(self, parser: Any) -> None:
        parser.add_argument("audits", nargs="*", type=str, help="files that audit, harden or search saved")
        parser.add_argument(
            "--mask", type=str, help="the rewound weights; default: mask.safetensors where harden wrote the audits"
        )
        parser.add_argument("--out", type=str, default="report.html", help="the file to write")

    def prepare(self, options: Any) -> Job:
        if not options.audits:
            raise UsageError("name one or more saved audits, such as hardened.json.")
        out = output_file("out", options.out, ".html")
        assert out is not None
        check_outputs([out], options.overwrite, [*options.audits, options.mask])
        paths = [Path(each) for each in options.audits]
        names = [path.stem for path in paths]
        if len(set(names)) < len(names):
            names = [str(path.with_suffix("")) for path in paths]
        if len(set(names)) < len(names):
            raise UsageError("an audit is named twice.")
        searches = [path for path in paths if format_name(path) == RecipeSearch.__name__]
        if searches:
            if len(paths) > 1 or options.mask is not None:
                raise UsageError(f"{searches[0]} is a search, which has a page of its own: name it alone.")
            return SearchReportJob(RecipeSearch.load(searches[0]), out)
        results = named_results(dict(zip(names, paths, strict=True)))
        records = records_of(paths)
        mask, remarks = _mask(options.mask, records, paths)
        settings = {str(each.path.parent): each.settings for each in records}
        spent = {each.path.parent: each.seconds for each in records}
        seconds = {name: spent.get(p.parent, {}).get(p.name) for name, p in zip(names, paths, strict=True)}
        one = next(iter(settings.values())) if len(settings) == 1 else settings
        return ReportJob(results, out, mask, one, seconds, remarks)


def _mask(given: str | None, records: list[Record], audits: list[Path]) -> tuple[Path | None, list[str]]:
    """The file of the rewound weights, checked, and what there is to say where it is missing."""
    if given is not None:
        mask = WeightMask.load(given)
        for record in records if len(records) == 1 else ():
            record.check_mask(mask, Path(given))
        return Path(given), []
    owners = [each for each in records if each.path.parent / "hardened.json" in audits]
    if len(owners) > 1:
        return None, ["These are several hardenings: pass --mask to show the rewound weights of one."]
    for record in owners:
        path = record.path.parent / MASK
        if not path.is_file():
            return None, [f"There is no {path}: the report does not show the rewound weights."]
        record.check_mask(WeightMask.load(path), path)
        return path, []
    return None, []
