"""Mutation testing: the share of small faults put into the code that the tests find.

    python benchmarks/mutation.py --group metrics --sample 200

mutmut makes the faults (other operators, constants, arguments) in a copy of the tree under ``--out``. Messages are not
mutated: the text of errors and warnings, f-strings, strings of several words, ``hint=``, and the names passed to the
``check_...`` functions; conditions that lead to a message are. ``--sample 0`` tries every mutant, which takes hours.
Prints one row per group: mutants tried, killed, and the 95 % interval of the share killed; the diffs of the survivors
are in ``<out>/<group>/survivors.txt``.
"""

from __future__ import annotations

import argparse
import ast
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
# What is mutated, and the tests to run, without the slow ones over several processes.
GROUPS = {
    "metrics": (["metrics/functional/*"], ["metrics"]),
    "attacks": (["attacks/*"], ["attacks"]),
    "weights": (
        ["weights/*"],
        [
            "weights",
            "callbacks/test_gradient_mask.py",
            "callbacks/test_optimizers.py",
            "callbacks/test_manual_optimization.py",
        ],
    ),
    "callbacks": (["callbacks/*"], ["callbacks", "auditing/test_members.py", "auditing/test_audit.py"]),
    "defenses": (["defenses/*.py"], ["defenses"]),
    "dpsgd": (["defenses/dpsgd/*"], ["defenses/dpsgd", "data/test_poisson.py"]),
}
DESELECTED = [
    # Simulations of many samples, and tests over several processes.
    "metrics/functional/test_coverage.py::test_95_percent_intervals_cover_in_94_percent_of_samples",
    "metrics/functional/test_coverage.py::test_tpr_intervals_are_about_as_wide_as_with_a_known_family",
    "metrics/test_every_metric.py::test_two_processes_give_the_single_process_numbers",
    "metrics/test_membership.py::test_small_p_values_and_lower_bounds_agree",
    "attacks/test_resampling.py::test_the_interval_covers_the_mean_over_worlds_with_shared_errors",
    "attacks/test_resampling.py::test_the_interval_is_too_wide_rather_than_too_narrow_without_shared_errors",
    "attacks/test_resampling.py::test_shadow_intervals_cover_the_mean_over_worlds",
    "attacks/test_resampling.py::test_an_audit_has_intervals_over_shadow_models",
    "attacks/test_every_attack.py::test_every_attack_finds_a_signal_and_none_in_noise",
    # 90 optimizers and settings: too slow for every mutant.
    "callbacks/test_optimizers.py::test_every_optimizer_leaves_frozen_weights_bit_identical",
    # The same for all defenses with and without CWRF, in two precisions.
    "defenses/test_every_defense.py::test_every_defense_trains_and_resumes_to_the_same_weights",
    # save_hyperparameters reads the locals of __init__, which mutmut puts into a function of another name.
    "defenses/test_checkpoints.py::test_settings_that_changed_since_the_checkpoint_are_reported",
    "defenses/test_checkpoints.py::test_reference_data_are_no_hyper_parameters",
    # Several processes.
    "callbacks/test_ddp.py",
    "weights/test_memory.py",
    "defenses/dpsgd/test_training.py::test_two_processes_are_one",
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
    if not any((folder / "mutants").glob("mutmut-stats.json")):
        raise SystemExit(f"the tests of {group} do not pass without mutants; see {folder / 'mutmut.log'}")
    names = sorted(set(outcomes(folder)) - messages(folder))
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
    killed = len(tried) - len(alive)  # a mutant that hangs or crashes the interpreter counts as killed
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
        "only_mutate": [f"lightning_cwrf/{source}" for source in sources],
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


class _WithoutMessages(ast.NodeTransformer):
    """A function's syntax tree in which all messages read the same."""

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise()

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("")

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) and " " in node.value else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        called = ast.unparse(node.func).rsplit(".")[-1]
        if "warn" in called:
            return ast.Constant("")
        if called.lstrip("_").startswith("check_"):
            node.args = [each for each in node.args if not isinstance(each, ast.Constant)]
            node.keywords = [each for each in node.keywords if each.arg != "hint"]
        return self.generic_visit(node)


def messages(folder: Path) -> set[str]:
    """The mutants that differ from the code only in a message."""
    found = set()
    for path in sorted((folder / "mutants" / "lightning_cwrf").rglob("*.py")):
        module = ".".join(path.relative_to(folder / "mutants").with_suffix("").parts)
        seen = {}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "__mutmut_" in node.name:
                name, node.name = node.name, ""
                seen[name] = ast.dump(_WithoutMessages().visit(node))
        for name, code in seen.items():
            original = name.rsplit("__mutmut_", 1)[0] + "__mutmut_orig"
            if name != original and code == seen[original]:
                found.add(f"{module.removesuffix('.__init__')}.{name}")
    return found


def outcomes(folder: Path) -> dict[str, int | None]:
    """The exit code of each mutant's tests; None where it was not tried."""
    found = {}
    for path in sorted((folder / "mutants").rglob("*.meta")):
        found.update(json.loads(path.read_text())["exit_code_by_key"])
    return found


if __name__ == "__main__":
    main()
