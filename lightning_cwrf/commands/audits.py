"""Audits as the commands run them: with progress, and with shadow models where asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset
from tqdm.auto import tqdm

from lightning_cwrf.attacks import create_attacks
from lightning_cwrf.auditing import AuditResult, audit
from lightning_cwrf.commands.base import UsageError
from lightning_cwrf.commands.loading import SILENT, Loaded
from lightning_cwrf.commands.objects import Named
from lightning_cwrf.commands.progress import on_terminal
from lightning_cwrf.commands.training import repeated, trainer_mapping
from lightning_cwrf.data import Batches, all_ids
from lightning_cwrf.data.loading import Collated
from lightning_cwrf.data.sampling import support
from lightning_cwrf.recipes import ShadowRecipe
from lightning_cwrf.report.changes import conclusion
from lightning_cwrf.report.table import AnyAudit
from lightning_cwrf.shadows import ShadowOutputs, train_shadows
from lightning_cwrf.shadows.workers import end_workers


def add_shadow_options(parser: Any) -> None:
    """``--shadows``, ``--training``, ``--population`` and ``--pool``."""
    parser.add_argument(
        "--shadows", type=int, default=0, help="shadow models for LiRA and RMIA, even, better 8 or more; 0: none"
    )
    add_training_data(parser)


def add_training_data(parser: Any) -> None:
    """``--training``, ``--population`` and ``--pool``: how and on what shadow models are trained."""
    parser.add_argument(
        "--training",
        type=dict[str, Any],
        default={},
        help="the Trainer of the first training, which shadow models repeat: --training.max_epochs 100",
    )
    parser.add_argument("--population", type=Named, help="further data that no model is trained on; RMIA needs it")
    parser.add_argument(
        "--pool",
        type=Named,
        help="import path of a data set with all members, all non-members and more, on halves of which shadow models "
        "are trained; default: members and non-members",
    )


def attacks_of(options: Any, named: list[str] | str | None = None) -> list[str]:
    """The attacks that will run: those named, or all usual ones for which the options give what they need.

    Raises:
        UsageError: an attack that needs what is not given, or an option that would have no effect.
    """
    if isinstance(named, str):
        raise UsageError(f"--attacks must be a list, such as --attacks [loss,entropy], not {named!r}.")
    if named is not None and not named:
        raise UsageError("--attacks is empty: name an attack, such as --attacks [loss,entropy], or leave it out.")
    if not options.shadows:
        unused = [name for name in ("population", "training", "pool", "store") if getattr(options, name, None)]
        if unused:
            raise UsageError(f"--{unused[0]} has no effect without --shadows.")
    usual = ["loss", "lira"] if options.shadows else ["loss"]
    usual += ["rmia"] if options.population is not None else []
    for attack in create_attacks(named or usual):
        if not options.shadows and any("shadow" in need or "population" in need for need in attack.needs):
            more = " and --population" if any("population" in need for need in attack.needs) else ""
            raise UsageError(f"--attacks: {attack.name} needs shadow models: pass --shadows{more}.")
        if options.population is None and any("population" in need for need in attack.needs):
            raise UsageError(f"--attacks: {attack.name} needs a population: pass --population.")
    return named or usual


@dataclass
class ShadowPlan:
    """How shadow models are trained for the finished model; those of a hardening go on from them."""

    recipe: ShadowRecipe
    pool: Dataset[Any]
    population: Batches | None
    n: int
    store: Path
    seed: int

    def train(self, recipe: ShadowRecipe | None = None, base: ShadowOutputs | None = None) -> ShadowOutputs:
        """The shadow models of the finished model, or of a hardening by ``recipe``."""
        pool, population = self.data()
        if not on_terminal():
            print(f"training {self.n} shadow models", file=sys.stderr, flush=True)
        return train_shadows(
            self.recipe if recipe is None else recipe,
            pool,
            self.n,
            population=population,
            store=self.store,
            base=base,
            keep_weights=base is None,
            seed=self.seed,
            progress=on_terminal(),
        )

    def data(self) -> tuple[Dataset[Any], Any]:
        """Pool and population, before a training of shadow models begins."""
        end_workers()  # those of earlier work in this process may not find the user's modules
        population: Any = self.population
        if isinstance(population, DataLoader):
            population = Collated(_examples(population, "population"), population.collate_fn)
        return self.pool, population


def shadow_plan(loaded: Loaded, store: Path) -> ShadowPlan | None:
    """The shadow models that the options ask for; None: none.

    Raises:
        UsageError: their training cannot be repeated.
    """
    options = loaded.options
    if options.shadows == 0:
        return None
    if options.shadows < 4 or options.shadows % 2:
        raise UsageError(f"--shadows must be an even number of at least 4, or 0, not {options.shadows}.")
    return first_training(loaded, store, "--shadows")


def first_training(loaded: Loaded, store: Path, asked: str) -> ShadowPlan:
    """How models are trained as the finished one was, for what was ``asked`` for.

    Raises:
        UsageError: its training cannot be repeated.
    """
    options = loaded.options
    if "max_epochs" not in options.training:
        raise UsageError(
            f"{asked} trains models as yours was trained first: pass the arguments of that Trainer, at least "
            "--training.max_epochs."
        )
    if not isinstance(loaded.members, DataLoader):
        raise UsageError(f"{asked} needs the training loader: pass --members a split, or a data set and --batch_size.")
    arguments = {**SILENT, "accelerator": options.accelerator, **trainer_mapping("training", options.training)}
    try:
        recipe = repeated(arguments, loaded)
    except ValueError as error:
        raise UsageError(f"{asked}: {error}") from error
    models = getattr(options, "shadows", 0)
    return ShadowPlan(recipe, _pool(loaded), loaded.data("population"), models, store, options.seed)


def _pool(loaded: Loaded) -> Dataset[Any]:
    """The examples that shadow models are trained on halves of: those of ``--pool``, or the audited ones."""
    given = loaded.data("pool")
    if given is None:
        return ConcatDataset([_examples(data, name) for name, data in loaded.audited.items()])
    pool = _examples(given, "pool")
    inside = set(all_ids(pool) or ())
    for name, data in loaded.audited.items():
        ids = all_ids(data) or ()
        lacking = sum(each not in inside for each in ids)
        if lacking:
            raise UsageError(
                f"--pool lacks {lacking} of the {len(ids)} examples of --{name}: it must hold every audited example, "
                "read in the same way and with the same label."
            )
    return pool


def hardened_recipe(trainer: Trainer, model: LightningModule) -> ShadowRecipe:
    """The recipe of a fine-tuning that has just ended."""
    return ShadowRecipe.like(trainer, model)


def audited(
    loaded: Loaded, model: LightningModule, name: str, shadows: ShadowOutputs | None = None, **settings: Any
) -> AuditResult:
    """Audit one model on the members and non-members, with a progress bar over its batches."""
    model = model.to(loaded.device)
    with _progress(model, f"audit of {name}"):
        sides = loaded.audited
        return audit(
            model,
            members=sides["members"],
            nonmembers=sides["nonmembers"],
            shadows=shadows,
            seed=loaded.options.seed,
            **settings,
        )


def concluded(results: Mapping[str, AnyAudit]) -> str:
    """What audits show, in the words of the report."""
    return "\n".join(["", "What this shows:", *(f"  {line}" for line in conclusion(results))])


@contextmanager
def _progress(model: LightningModule, text: str) -> Iterator[None]:
    with tqdm(desc=text, unit="batch", leave=False, disable=None) as bar:
        handle = model.register_forward_hook(lambda *_: bar.update() and None)
        try:
            yield
        finally:
            handle.remove()


def _examples(data: Batches, name: str) -> Dataset[Any]:
    """The examples of a loader or data set, one by one."""
    loader = data if isinstance(data, DataLoader) else DataLoader(data) if isinstance(data, Dataset) else None
    if loader is None or isinstance(loader.dataset, IterableDataset):
        raise UsageError(f"--shadows needs --{name} as a map-style data set or a loader of one.")
    if loader.batch_sampler is None:
        raise UsageError(f"--shadows needs --{name} one by one, and its data set gives whole batches.")
    places = support(loader).places
    return Subset(loader.dataset, list(places))
