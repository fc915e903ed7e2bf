"""What every study does: train recipes over one pool, audit them, and record every number.

A study is a script that says what is trained and what is measured. Everything that was trained is in ``--out``, which
all studies may share: a killed run resumes. NAME.json has every number and interval and is the same for the same seed
on the same machine; NAME.times.json has the minutes and the memory, NAME.md a table.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from comparing import ACCURACY, AUC, cell_of
from data_sets import flip_and_shift
from networks import IMAGES, NETWORKS, TEXTS
from tables import markdown, rounded
from tasks import SCALES, Task, quick, quiet

import lightning_cwrf
from lightning_cwrf import CWRFConfig, RecipeAudit, ShadowRecipe, audit_recipe, train_shadows
from lightning_cwrf.defenses import Defense
from lightning_cwrf.shadows import ShadowOutputs

BASE = "no defense"


class Study:
    """Recipes over one pool and membership, so that they are compared in pairs.

    Args:
        name: of its files.
        title: what it studies.
        arguments: of :func:`parse`.
        attacks: the attacks of every audit.
    """

    def __init__(
        self, name: str, title: str, arguments: argparse.Namespace, attacks: Sequence[str] = ("lira",)
    ) -> None:
        quiet()
        torch.set_num_threads(arguments.threads)
        self.name, self.title, self.attacks, self.arguments = name + variant(arguments), title, list(attacks), arguments
        self.task: Task = arguments.task
        self.out: Path = arguments.out
        fake = arguments.quick and arguments.scale == "paper"
        self.parts = self.task.parts(arguments.seed, arguments.folder, fake=fake)
        self.audits: dict[str, RecipeAudit] = {}
        self._seconds: dict[str, float] = {}

    def recipe(
        self, epochs: int | None = None, defense: Defense | None = None, lr: float | None = None, warmup: int = 0
    ) -> ShadowRecipe:
        """A training from scratch; ``epochs`` and ``lr``: other than the task's."""
        epochs = self.task.epochs if epochs is None else epochs
        accelerator = "cpu" if self.arguments.scale == "cpu" else "auto"
        arguments = {"max_epochs": epochs, "accelerator": accelerator}
        augment = flip_and_shift if self.task.augment else None
        build = self.task.build(epochs, lr, warmup)
        return ShadowRecipe(build, arguments, self.task.batch, defense=defense, augment=augment)

    def tuning(
        self,
        defense: Defense | None,
        cwrf: Mapping[str, Any] | None = None,
        *,
        epochs: int | None = None,
        lr: float | None = None,
        warmup: int = 0,
    ) -> ShadowRecipe:
        """A fine-tuning; with settings of :class:`CWRFConfig`, after a rewind."""
        plain = self.recipe(self.task.tune_epochs if epochs is None else epochs, defense, lr, warmup)
        if not cwrf:
            return plain
        return replace(plain, cwrf=CWRFConfig(self.parts.reference, **{**self.scoring, **cwrf}))

    @property
    def scoring(self) -> dict[str, Any]:
        """λ and T."""
        return {"lam": self.task.lam, "steps": self.task.steps}

    @functools.cached_property
    def base(self) -> ShadowOutputs:
        """The finished models, with their weights."""
        return self.train(self.recipe(), keep_weights=True)

    def train(self, recipe: Any, *, base: ShadowOutputs | None = None, keep_weights: bool = False) -> ShadowOutputs:
        """The models of a recipe, from the store where they are there."""
        began = time.perf_counter()
        defense = getattr(recipe, "defense", None)
        alone = (
            self.task.augment
            or self.task.network in TEXTS  # attention has no vectorised form on a CPU
            or self.task.network in IMAGES  # a stack of deep convolutions takes half as long again
            or not hasattr(recipe, "train_stack")
            or (defense is not None and defense.mixin.why_not_stacked())
        )
        shadows = train_shadows(
            recipe,
            self.parts.pool,
            self.task.models,
            population=self.parts.population,
            store=self.out / "store",
            base=base,
            keep_weights=keep_weights,
            seed=self.arguments.seed,
            workers=self.arguments.workers,
            stack=1 if alone else self.arguments.stack or self.task.models // 2,
            progress=False,
        )
        self._trained(shadows.store.key, time.perf_counter() - began)
        return shadows

    def _trained(self, key: str, seconds: float) -> None:
        """Add to the time of a recipe's models, of which larger and smaller studies have trained some.

        The file KEY.N has the time of those up to N that come after the next smaller file's. A study that takes fewer
        models than a file has that share of its time.
        """
        wanted, folder = self.task.models, self.out / "seconds"
        known = {int(path.suffix[1:]): float(path.read_text()) for path in folder.glob(f"{key}.*")}
        last = min((count for count in known if count >= wanted), default=wanted)
        known[last] = known.get(last, 0.0) + seconds
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.{last}").write_text(f"{known[last]:.1f}")
        self._seconds[key] = seconds_of(known, wanted)

    def audit(self, label: str, shadows: ShadowOutputs) -> RecipeAudit:
        """The audit of a recipe's models, which is kept beside them."""
        began = time.perf_counter()
        name = f"{shadows.store.key}-{len(shadows)}-{'-'.join(self.attacks)}"
        path = self.out / "audits" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            audit_recipe(shadows, attacks=self.attacks, seed=self.arguments.seed, progress=False).save(path)
        found = self.audits[label] = RecipeAudit.load(path)
        self.took(name, time.perf_counter() - began)
        print(f"{label}: {found.estimate(ACCURACY)}, LiRA {found.estimate(AUC)}", flush=True)
        return found

    def unprotected(self) -> RecipeAudit:
        """The audit of the finished models."""
        return self.audit(BASE, self.base)

    def from_scratch(self, label: str, defense: Defense | None) -> RecipeAudit:
        return self.audit(label, self.train(self.recipe(defense=defense)))

    def tuned(self, label: str, recipe: Any) -> RecipeAudit:
        """Of models that go on from the finished ones."""
        return self.audit(label, self.train(recipe, base=self.base))

    def write(
        self, head: Sequence[str], rows: Sequence[Sequence[Any]], verdict: Mapping[str, str], **more: Any
    ) -> dict[str, Any]:
        """Write the study's files.

        Args:
            head: the titles of the columns.
            rows: their cells: text, a number, None, an estimate or a difference.
            verdict: ``word`` (reproduced, partly, not; of a lever: better, no better), ``sentence`` and ``rule``.
            more: further content.
        """
        settings = {k: v for k, v in vars(self.arguments).items() if k not in ("command", "out", "task", "folder")}
        content = {
            "study": self.name,
            "title": self.title,
            "command": self.arguments.command,
            "settings": settings,
            "task": vars(self.task),
            "versions": versions(),
            "head": list(head),
            "rows": [[cell_of(cell) for cell in row] for row in rows],
            "verdict": dict(verdict),
            **more,
            "recipes": {label: {**audit.values(), **audit.bounds()} for label, audit in self.audits.items()},
        }
        content = rounded(content)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (self.out / f"{self.name}.md").write_text(markdown(content), encoding="utf-8")
        self._write_times()
        print(markdown(content))
        return content

    def took(self, what: str, seconds: float) -> None:
        """Add to the time that something has taken, in this run and earlier ones, of this study and others."""
        path = self.out / "seconds" / what
        path.parent.mkdir(parents=True, exist_ok=True)
        self._seconds[what] = seconds + (float(path.read_text()) if path.is_file() else 0.0)
        path.write_text(f"{self._seconds[what]:.1f}")

    def _write_times(self) -> None:
        path = self.out / f"{self.name}.times.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        here = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        memory = max(known.get("peak_memory_gb", 0), round(here / 1024**2, 2))
        times = {"minutes": round(sum(self._seconds.values()) / 60, 1), "peak_memory_gb": memory}
        path.write_text(json.dumps(times, indent=1) + "\n")


def seconds_of(known: Mapping[int, float], models: int) -> float:
    """The seconds that so many models took; ``known``: by a number of models, of those after the next smaller number.

    >>> seconds_of({16: 10.0, 32: 30.0}, 24)
    25.0
    """
    edges = [0, *sorted(known)]
    shares = {end: (min(end, models) - begin) / (end - begin) for begin, end in itertools.pairwise(edges)}
    return sum(share * known[end] for end, share in shares.items() if share > 0)


def versions() -> dict[str, str]:
    ours, torchs = lightning_cwrf.__version__, torch.__version__
    return {
        "python": platform.python_version(),
        "torch": torchs,
        "lightning": lightning.__version__,
        "lightning_cwrf": ours,
    }


def parser(script: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all studies have, of one script and its docstring."""
    made = argparse.ArgumentParser(Path(script).name, description=(description or "").splitlines()[0])
    made.add_argument("--scale", choices=list(SCALES), default="cpu", help="how large")
    made.add_argument("--data", choices=sorted({name for each in SCALES.values() for name in each}), help="which data")
    made.add_argument("--network", choices=["digits", *NETWORKS], help="another network")
    made.add_argument("--optimizer", choices=["adam", "sgd"], help="another optimizer, of all trainings")
    made.add_argument("--quick", action="store_true", help="a few models, examples and epochs, to try the script")
    made.add_argument("--models", type=int, help="of each recipe, even, at least 8")
    made.add_argument("--epochs", type=int, help="of the first training")
    made.add_argument("--tune-epochs", type=int, help="of the fine-tuning")
    made.add_argument("--folder", type=Path, help="of the data, where they are not downloaded")
    made.add_argument("--stack", type=int, default=0, help="models trained as one; 0: half of them")
    made.add_argument("--workers", type=int, default=1, help="processes")
    made.add_argument("--threads", type=int, default=1, help="of each process")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=Path("out/paper"), help="results; all studies may share it")
    return made


def variant(arguments: argparse.Namespace) -> str:
    """What a study's name says of a network and an optimizer that are not its data set's own."""
    own: Task = SCALES[arguments.scale][arguments.data]
    network, optimizer = arguments.task.network, arguments.task.optimizer
    return (f"-on-{network}" if network != own.network else "") + (
        f"-{optimizer}" if optimizer != own.optimizer else ""
    )


def _without(words: Sequence[str], *options: str) -> list[str]:
    """The words of a command line less some options with one value each."""
    return [each for before, each in zip(["", *words], words, strict=False) if not {before, each} & set(options)]


def parse(
    made: argparse.ArgumentParser,
    words: Sequence[str] | None,
    data: Mapping[str, str] | None = None,
    models: int | None = None,
) -> argparse.Namespace:
    """The arguments, with the task that they name.

    ``data``: the default data of a scale, where not its first; ``models``: of each recipe, where not the task's number.
    """
    words = sys.argv[1:] if words is None else list(words)
    arguments = made.parse_args(words)
    arguments.command = " ".join(["python", f"examples/paper/{made.prog}", *_without(words, "--out", "--folder")])
    tasks = SCALES[arguments.scale]
    arguments.data = arguments.data or (data or {}).get(arguments.scale) or next(iter(tasks))
    if arguments.data not in tasks:
        made.error(f"--scale {arguments.scale} has {', '.join(tasks)}, not {arguments.data}.")
    task = tasks[arguments.data]
    if arguments.network is not None:
        try:
            task = task.with_network(arguments.network)
        except ValueError as error:
            made.error(str(error))
    if arguments.optimizer is not None:
        task = task.with_optimizer(arguments.optimizer)
    task = quick(task) if arguments.quick else replace(task, models=models or task.models)
    given = {name: getattr(arguments, name) for name in ("models", "epochs", "tune_epochs")}
    task = replace(task, **{name: value for name, value in given.items() if value is not None})
    if task.models < 8 or task.models % 2:
        made.error(f"--models must be even and at least 8, not {task.models}.")
    arguments.task = task
    return arguments
