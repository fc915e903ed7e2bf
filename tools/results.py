"""Write docs/results.md from the saved studies in examples/paper/results; no number on that page is typed.

python tools/results.py                 # write the page
python tools/results.py out/paper       # first take the studies that were run there
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "paper"))
from tables import markdown

RESULTS = ROOT / "examples" / "paper" / "results"
PAGE = ROOT / "docs" / "results.md"
HEAD = """# What the studies show

Each study is a script in [`examples/paper/`](../examples/paper/) that trains many models by each recipe, attacks each of them with the others
([`audit_recipe`](audit.md#a-way-of-training)), and records every number. This page is made from these records (`examples/paper/results/*.json`) by
`tools/results.py`. Its verdicts follow from the numbers by the rule that stands beside each; *reproduced* and *not* refer to the claims of the papers on
CWRF and PAST, at the sizes that were run here, which are far below the papers'. Numbers of the papers stand beside ours where they have any; they are of other data and networks.

Brackets are 95 % intervals over models and pools. *Above r = 0 at equal accuracy* is how much more AUC a recipe has than fine-tuning alone, on the line between the two
strengths of r = 0 (or no defense) that have just less and just more test accuracy. That line lies above the curve that it cuts, which favours the recipe.
Minutes are of the recipes that the study needs, on one thread of a machine with two cores that others used too; what several studies share counts in each.
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
    lines = [
        HEAD,
        "| study | claim | data, network | models of each recipe | minutes | peak memory |",
        "|---" * 6 + "|",
    ]
    for study, times in found:
        task, name = study["task"], study["study"]
        cells = [f"[{name}](#{name})", study["verdict"]["word"], f"{task['data']}, {task['network']}", task["models"]]
        cells += [f"{times['minutes']:.0f}", f"{times['peak_memory_gb']:.1f} GB"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", *(section(study) for study, _ in found)])


def section(study: dict[str, Any]) -> str:
    task = study["task"]
    members, nonmembers, reference = task["sizes"]
    lines = [
        f"## {study['study']}",
        "",
        f"{study['title']}: `{study['command']}`. {members:,} members of a pool of {members + nonmembers:,}, {reference:,} "
        f"examples of reference data, {task['epochs']} epochs and then {task['tune_epochs']} of fine-tuning, "
        f"{task['models']} models of each recipe, seed {study['settings']['seed']}, torch {study['versions']['torch']}.",
        "",
        markdown(study),
    ]
    agreement = study.get("agreement")
    if agreement:
        lines.append(
            f"*Earlier* numbers were measured by other code on another draw of the pool: {agreement['within_two_standard_errors']} "
            f"of {agreement['numbers']} agree within two standard errors of the difference.\n"
        )
    return "\n".join(lines)


def main() -> None:
    for folder in sys.argv[1:]:
        print(f"taken: {', '.join(take(Path(folder)))}")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
