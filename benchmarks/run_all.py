"""Run every benchmark, each in its own process, and print the results as one markdown table.

    python benchmarks/run_all.py [--out FILE]

The table goes to standard output, the progress to standard error. A missed target is shown in the table and is not an
error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Row, machine, markdown

BENCHMARKS = (
    "scoring",
    "step",
    "defenses",
    "top_scores",
    "memory",
    "import_time",
    "lira_speed",
    "rmia_speed",
    "attack_speed",
    "large_pool",
    "audit_speed",
    "audit_command",
    "shadows",
)


def rows_of(name: str) -> list[Row]:
    """The rows of one benchmark, or a row that says it broke, so that the others are still shown."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rows.json"
        script = Path(__file__).with_name(f"{name}.py")
        done = subprocess.run([sys.executable, script, "--json", found], stdout=sys.stderr, check=False)
        if done.returncode != 0 or not found.exists():
            return [Row(name, f"FAILED with exit code {done.returncode}")]
        return [Row(**row) for row in json.loads(found.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="file to write the markdown to, besides printing it")
    arguments = parser.parse_args()
    head = machine()  # before the benchmarks load it themselves
    text = f"{head}\n\n{markdown([row for name in BENCHMARKS for row in rows_of(name)])}"
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
