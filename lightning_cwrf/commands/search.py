"""``cwrf search``: which hardening is the safest that loses little enough accuracy."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_cwrf.commands.audits import ShadowPlan, add_training_data, first_training
from lightning_cwrf.commands.base import DONE, Command, Job, UsageError, check_outputs
from lightning_cwrf.commands.loading import MODEL_OBJECTS, add_model_options, load
from lightning_cwrf.commands.objects import one_line
from lightning_cwrf.commands.progress import on_terminal
from lightning_cwrf.commands.training import add_fine_tuning_options, repeated, trainer_arguments
from lightning_cwrf.defenses import Defense, available_defenses, defense_class
from lightning_cwrf.recipes import ShadowRecipe
from lightning_cwrf.searching import RecipeSearch, default_candidates, search_recipes, write_search_report
from lightning_cwrf.searching.arguments import check_search
from lightning_cwrf.searching.candidates import RATES

FILES = ("search.json", "search.md", "search.png", "report.html")

_EXPLAINED = """It trains models as yours was trained, on halves of the members and non-members, and fine-tunes each of
them with every defense at several strengths, alone (r = 0) and after rewinding 1 %, 3 % or 10 % of the weights.
Each way is audited over its models: few for all ways, then more for those that may still be the best. The best
loses at most --floor of test accuracy and has the lowest AUC of LiRA; its figures come from examples that took no
part in the choice. Your finished model itself is not needed, and not changed: `cwrf harden` follows, with the
options that are printed.

It takes hours for a model that trains for minutes: start with --defenses [relaxloss] --rates [0,0.03], and see
--dry-run. A search that was killed goes on where it was.

example:
  cwrf search --model mine.Net --data mine.Data --training.max_epochs 100 --floor 0.02 --out searched"""


@dataclass
class SearchJob(Job):
    base: ShadowPlan
    candidates: Mapping[str, ShadowRecipe]
    out: Path
    options: Any

    def plan(self) -> list[str]:
        first = self.options.models[0]
        return [
            f"train {self.options.models[-1]} base models, kept in {self.base.store}",
            f"fine-tune {first} of them by each of {len(self.candidates)} candidates: "
            f"{first * len(self.candidates)} models, and more in later rounds",
            *(f"candidate: {name}" for name in self.candidates),
            *(f"write {self.out / name}" for name in FILES),
        ]

    def run(self) -> int:
        options = self.options
        if not on_terminal():
            print(f"searching over {len(self.candidates)} candidates", file=sys.stderr, flush=True)
        pool, population = self.base.data()
        found = search_recipes(
            self.base.recipe,
            self.candidates,
            pool,
            population=population,
            floor=options.floor,
            measure=options.measure,
            models=options.models,
            budget=options.budget,
            minutes=options.minutes,
            store=self.base.store,
            seed=options.seed,
            workers=options.workers,
            stack=options.stack,
            progress=on_terminal(),
        )
        found.save(self.out / FILES[0])
        (self.out / FILES[1]).write_text(found.to_markdown(), encoding="utf-8")
        found.plot(self.out / FILES[2])
        write_search_report(found, self.out / FILES[3], overwrite=True)
        print(f"{found}\n\nsaved {', '.join(str(self.out / name) for name in FILES)}{_next(found)}")
        return DONE


class SearchCommand(Command):
    name = "search"
    summary = "Find the safest hardening that loses little enough accuracy, over many models."
    objects = (*MODEL_OBJECTS, "reference", "population", "pool")

    def explain(self) -> str:
        return _EXPLAINED

    def add_options(self, parser: Any) -> None:
        add_model_options(parser, finished=False)
        add_training_data(parser)
        add_fine_tuning_options(parser)
        parser.add_argument("--floor", type=float, default=0.02, help="the test accuracy that may be lost, as a share")
        parser.add_argument(
            "--defenses", type=list[str] | None, help="to try, as [relaxloss,hamp]; default: all with strengths"
        )
        parser.add_argument(
            "--rates", type=list[float], default=list(RATES), help="r, the shares to rewind; 0 must be among them"
        )
        parser.add_argument("--models", type=list[int], default=[8, 16, 32], help="of each candidate in each round")
        parser.add_argument("--measure", type=str, default="lira/auroc", help="what should be low")
        parser.add_argument("--budget", type=int | None, help="the largest number of fine-tuned models")
        parser.add_argument("--minutes", type=float | None, help="no training begins after so many")
        parser.add_argument("--workers", type=int | None, help="processes; default: one per GPU, or per core")
        parser.add_argument(
            "--stack", type=int, default=1, help="models to train as one, at most: faster for small ones"
        )
        parser.add_argument("--out", type=str, default="searched", help="folder for everything that is written")

    def prepare(self, options: Any) -> SearchJob:
        out = Path(options.out)
        if out.is_file():
            raise UsageError(f"--out {out} is a file; name a folder.")
        check_outputs([out / name for name in FILES], options.overwrite, [*map(str, options.config or ())])
        loaded = load(options)
        plan = first_training(loaded, out / "shadows", "cwrf search")
        try:
            tune = repeated(trainer_arguments(options), loaded)
            candidates = default_candidates(
                tune,
                loaded.data("reference"),
                defenses=options.defenses,
                rates=options.rates,
                lam=options.lam,
                steps=options.steps,
            )
            names = ("floor", "measure", "models", "budget", "minutes", "seed", "stack")
            check_search(
                plan.recipe, candidates, population=plan.population, **{name: getattr(options, name) for name in names}
            )
        except (TypeError, ValueError) as error:
            raise UsageError(one_line(error)) from error
        return SearchJob(plan, candidates, out, options)


def _next(found: RecipeSearch) -> str:
    """The options of ``cwrf harden`` for the best candidate."""
    if found.best is None:
        return ""
    recipe = found.recipe
    words, defense, cwrf = [], recipe.defense, recipe.cwrf
    if defense is not None:
        words.append(f"--defense {_registered(defense)}")
        words += [f"--defense.{name} {defense.settings[name]:g}" for name in type(defense).strengths[0]]
    words += ["--rate 0"] if cwrf is None else [f"--rate {cwrf.rate:g} --lam {cwrf.lam:g} --steps {cwrf.steps}"]
    epochs = recipe.trainer_kwargs["max_epochs"]
    return f"\n\nnext: cwrf harden {' '.join(words)} --max_epochs {epochs}, with your model's options"


def _registered(defense: Defense) -> str:
    return next(name for name in available_defenses() if defense_class(name) is type(defense))
