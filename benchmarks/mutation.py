"""Mutation testing: the share of small faults put into the code that the tests find.

    python benchmarks/mutation.py --group metrics --sample 200

mutmut makes the faults (other operators, constants, arguments) in a copy of the tree under ``--out``; the text of
errors and warnings is left alone. ``--sample 0`` tries every mutant, which takes hours. Prints one row per group:
mutants tried, killed, and the 95 % interval of the share killed; the diffs of those that survived are in
``<out>/<group>/survivors.txt``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from lightning_cwrf.metrics.functional import clopper_pearson

ROOT = Path(__file__).resolve().parents[1]
SURVIVED, UNTESTED = 0, 33  # exit codes, as mutmut stores them
LOSSES = (
    "adversarial", "base", "baselines", "bases", "ccl", "hamp", "mixup_mmd", "nonmembers", "past", "registry",
    "relaxloss",
)  # fmt: skip
PRIVATE = ("dpsgd", "independence", "ledger", "private_checks", "private_step")
# What is mutated, and the tests that are asked: those of the group, without the slow ones over several processes.
GROUPS = {
    "metrics": (["lightning_cwrf/metrics/functional/*"], ["test_metrics.py", "test_statistics.py"]),
    "attacks": (["lightning_cwrf/attacks/*"], ["test_attacks.py", "test_more_attacks.py", "test_resampling.py"]),
    "weights": (
        [f"lightning_cwrf/{name}.py" for name in ("scores", "descent", "masks", "frozen", "top_share")],
        ["test_scores.py", "test_masks.py", "test_descent.py", "test_holding.py"],
    ),
    "callbacks": (
        ["lightning_cwrf/callbacks/*"],
        ["test_callbacks.py", "test_ablations.py", "test_holding.py", "test_resume.py", "test_members.py"],
    ),
    "defenses": (
        [f"lightning_cwrf/defenses/{name}.py" for name in LOSSES],
        [
            "test_defense_losses.py", "test_defense_training.py", "test_defense_settings.py", "test_defense_classes.py",
            "test_defenses.py", "test_against_nonmembers.py", "test_past.py", "test_hamp_output.py",
        ],
    ),
    "dpsgd": (
        [f"lightning_cwrf/defenses/{name}.py" for name in PRIVATE],
        ["test_dpsgd.py", "test_independence.py", "test_defense_settings.py"],
    ),
}  # fmt: skip
DESELECTED = [
    # 150 optimizers and settings, one after another: too slow to ask of every mutant.
    "test_holding.py::test_every_optimizer_leaves_frozen_weights_bit_identical",
    # The same for all defenses with and without CWRF, in two precisions.
    "test_defense_losses.py::test_every_defense_trains_and_resumes_to_the_same_weights",
    # save_hyperparameters reads the locals of __init__, which mutmut puts into a function of another name.
    "test_defenses.py::test_settings_that_changed_since_the_checkpoint_are_reported",
    "test_defenses.py::test_reference_data_are_no_hyper_parameters",
    # Two processes.
    "test_dpsgd.py::test_two_processes_are_one",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--group", choices=[*GROUPS, "all"], default="all")
    parser.add_argument("--sample", type=int, default=200, help="mutants per group; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--children", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "mutation")
    args = parser.parse_args()
    print("| group | mutants | tried | killed | share killed |\n|---|---|---|---|---|")
    for group in GROUPS if args.group == "all" else [args.group]:
        print(row(group, args.sample, args.seed, args.children, args.out / group), flush=True)


def row(group: str, sample: int, seed: int, children: int, folder: Path) -> str:
    stage(group, folder)
    mutmut(folder, "run", "--max-children", str(children), "no such mutant")  # makes them, and maps tests to functions
    names = sorted(outcomes(folder))
    if not names:
        raise SystemExit(f"mutmut made no mutants; see {folder / 'mutmut.log'}")
    chosen = names if sample in (0, *range(len(names), sample)) else sorted(random.Random(seed).sample(names, sample))
    mutmut(folder, "run", "--max-children", str(children), *chosen)
    found = outcomes(folder)
    tried = [name for name in chosen if found[name] is not None]
    alive = [name for name in tried if found[name] in (SURVIVED, UNTESTED)]
    with (folder / "survivors.txt").open("w") as file:
        for name in alive:
            file.write(f"{name}\n{mutmut(folder, 'show', name)}\n")
    killed = len(tried) - len(alive)  # a mutant that hangs, or crashes the interpreter, is found too
    low, high = clopper_pearson(killed, len(tried))
    return f"| {group} | {len(names)} | {len(tried)} | {killed} | {killed / len(tried):.3f} [{low:.3f}, {high:.3f}] |"


def stage(group: str, folder: Path) -> None:
    """A copy of the tree, configured for one group."""
    shutil.rmtree(folder, ignore_errors=True)
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    sources, tests = GROUPS[group]
    settings = {
        "source_paths": ["lightning_cwrf"],
        "only_mutate": sources,
        "also_copy": ["benchmarks", "docs", "examples", "README.md", "CHANGELOG.md"],
        "do_not_mutate_patterns": [r"raise \w+\(", r"warn\("],
        "pytest_add_cli_args": [
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-p",
            "no:randomly",
            *(f"--deselect=tests/{name}" for name in DESELECTED),
        ],
        "pytest_add_cli_args_test_selection": [f"tests/{name}" for name in tests],
        "process_isolation": "forkserver",  # torch's threads do not survive a fork
    }
    lines = ["", "[tool.mutmut]", *(f"{name} = {json.dumps(value)}" for name, value in settings.items())]
    with (folder / "pyproject.toml").open("a") as file:
        file.write("\n".join(lines) + "\n")


def mutmut(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    (folder / "mutmut.log").open("a").write(f"$ {' '.join(arguments)[:200]}\n{done.stdout}{done.stderr}\n")
    return done.stdout


def outcomes(folder: Path) -> dict[str, int | None]:
    """The exit code of each mutant's tests; None where it was not tried."""
    found = {}
    for path in sorted((folder / "mutants").rglob("*.meta")):
        found.update(json.loads(path.read_text())["exit_code_by_key"])
    return found


if __name__ == "__main__":
    main()
