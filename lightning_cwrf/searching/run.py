"""The search: few models for all candidates, then more for those that may still be the best."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import joblib
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lightning_cwrf.auditing import RecipeAudit, audit_recipe
from lightning_cwrf.checks import check_flag
from lightning_cwrf.data import isolated_rng
from lightning_cwrf.recipes import ShadowRecipe
from lightning_cwrf.recipes.stacking import check_stackable
from lightning_cwrf.searching.arguments import check_search
from lightning_cwrf.searching.result import BASE, RecipeSearch, Trial
from lightning_cwrf.searching.selection import ACCURACY, Standing, best, ranked, ruled_out
from lightning_cwrf.shadows import ShadowOutputs, train_shadows
from lightning_cwrf.shadows.workers import visible_gpus


def search_recipes(
    base: ShadowRecipe,
    candidates: Mapping[str, ShadowRecipe],
    pool: Dataset[Any],
    *,
    population: Dataset[Any] | None = None,
    floor: float = 0.02,
    measure: str = "lira/auroc",
    models: Sequence[int] = (8, 16, 32),
    budget: int | None = None,
    minutes: float | None = None,
    store: str | PathLike[str] = "shadow_store",
    seed: int = 0,
    workers: int | None = None,
    stack: int = 1,
    progress: bool = True,
) -> RecipeSearch:
    """Find the way of hardening that leaks least among those that lose little enough accuracy.

    By successive halving: every candidate fine-tunes ``models[0]`` base models. Those that the paired differences rule
    out are dropped, and at most half of them go on to ``models[1]`` models, and so on. Candidates are chosen on one
    half of the pool's and of the population's examples; the figures that are shown come from the other half. Both
    halves have the same models, so a part of what distinguishes the chosen one may still be the luck of its models:
    with another ``seed`` its audit has none.

    Everything that was trained is in the store. A search that was killed goes on where it was when it is called again.

    Args:
        base: how the finished model was trained, without defense and CWRF.
        candidates: fine-tunings of it by name, as of :func:`default_candidates`. One at least must not rewind.
        pool: the members and as many non-members, as for :func:`~lightning_cwrf.train_shadows`.
        population: examples that no model is trained on: for RMIA, and for a more precise test accuracy.
        floor: the test accuracy that may be lost, as a share: 0.02 is two points.
        measure: what should be low, as in :meth:`RecipeAudit.minus`, such as ``"lira/tpr_at_fpr_0.001"``.
        models: of each candidate in each round; increasing, even, at least 8.
        budget: the largest number of fine-tuned models; fewer candidates go on where it would be exceeded.
        minutes: the time after which no further training begins; the last complete round then counts. It makes the
            result depend on the machine.
        store: folder of the store, as for ``train_shadows``.
        seed: of the pool's halves, the models and the examples that choose.
        workers: processes, as for ``train_shadows``.
        stack: how many models to train as one, at most; recipes that cannot are trained one by one.
        progress: show a progress bar over all models.

    Raises:
        TypeError: something that is not a ShadowRecipe.
        ValueError: no candidate without rewinding; a base with a defense or CWRF; rounds or a budget that do not fit;
            an unknown measure; a pool that is too small.
        RuntimeError: trainings failed, or the time was over before the first round was.
    """
    numbers = {"models": models, "budget": budget, "minutes": minutes, "seed": seed, "stack": stack}
    check_search(base, candidates, population=population, floor=floor, measure=measure, **numbers)
    check_flag("progress", progress)
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    settings = {"population": population, "store": store, "seed": seed, "workers": workers}
    with tqdm(desc="search: models", unit="model", disable=not progress) as bar:
        search = _Search(base, candidates, pool, settings, floor, measure, tuple(models), budget, stack, deadline, bar)
        return search.run()


@dataclass
class _Search:
    base: ShadowRecipe
    candidates: Mapping[str, ShadowRecipe]
    pool: Dataset[Any]
    settings: Mapping[str, Any]
    floor: float
    measure: str
    models: tuple[int, ...]
    budget: int | None
    stack: int
    deadline: float
    bar: Any
    bases: ShadowOutputs | None = None
    trained: dict[str, int] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def run(self) -> RecipeSearch:
        going, finalists, used = list(self.candidates), {}, 0
        for number, models in enumerate(self.models):
            self._expect(going, number)
            standings = self._round(going, number)
            if standings is None:
                break
            going, more = self._go_on(standings, number)
            finalists, used = {name: standings[name] for name in going}, models
            if not more:
                break
        for name, each in finalists.items():
            self.trials[name] = self._trial(name, each, None)
        audits = {name: self._audited(name, used, held_out=True) for name in (BASE, *finalists)}
        return RecipeSearch(
            floor=self.floor,
            measure=self.measure,
            trials=[self.trials[name] for name in self.candidates],
            audits=audits,
            best=best({name: each for name, each in finalists.items() if each.within}),
            remarks=self.remarks,
            recipes=dict(self.candidates),
        )

    def _round(self, going: Sequence[str], number: int) -> dict[str, Standing] | None:
        """All candidates of a round; None: the time was over, and the round before counts."""
        models = self.models[number]
        standings: dict[str, Standing] = {}
        base: RecipeAudit | None = None
        for name in going:
            if time.monotonic() > self.deadline:
                if number == 0:
                    raise RuntimeError(
                        f"the time was over after {len(standings)} of {len(going)} candidates of the first round. What "
                        "was trained is in the store: call it again, with more minutes or fewer candidates."
                    )
                self.remarks.append(
                    f"the time was over in the round of {models} models, which does not count: the figures are of "
                    f"{self.models[number - 1]} models of each candidate"
                )
                return None
            base = self._audited(BASE, models) if base is None else base
            audit = self._audited(name, models)
            rewinds = self.candidates[name].cwrf is not None
            standings[name] = Standing.of(audit, base, self.floor, self.measure, rewinds=rewinds)
        return standings

    def _go_on(self, standings: Mapping[str, Standing], number: int) -> tuple[list[str], bool]:
        """Those that stay, and whether another round follows; those that are dropped become trials with the reason."""
        if number + 1 == len(self.models):
            return list(standings), False
        out = ruled_out(standings, self.floor)
        order = [name for name in ranked(standings) if name not in out]
        places = max(2, len(standings) // 2)
        if self.budget is not None:
            left = self.budget - sum(n for name, n in self.trained.items() if name != BASE)
            places = min(places, left // (self.models[number + 1] - self.models[number]))
        more = places >= 2
        if not more:
            self.remarks.append(f"the budget ended the search after {self.models[number]} models of each candidate")
        kept = order[:places] if more else order
        out |= {name: f"{places} others were better by their estimates" for name in order if name not in kept}
        for name, why in out.items():
            self.trials[name] = self._trial(name, standings[name], why)
        return kept, more

    def _expect(self, going: Sequence[str], number: int) -> None:
        """How many models there will be if half of the candidates go on each time."""
        total, candidates = sum(self.trained.values()), len(going)
        for done, models in zip((0, *self.models)[number:], self.models[number:], strict=False):
            total += (candidates + 1) * (models - done)
            candidates = max(2, candidates // 2)
        self.bar.total = total
        self.bar.refresh()

    def _trial(self, name: str, standing: Standing, dropped: str | None) -> Trial:
        return Trial(
            name=name,
            rewinds=standing.rewinds,
            models=len(standing.audit),
            test_accuracy=standing.audit.estimate(ACCURACY),
            leak=standing.leak,
            accuracy_change=standing.accuracy_change,
            dropped=dropped,
        )

    def _audited(self, name: str, models: int, *, held_out: bool = False) -> RecipeAudit:
        """The audit of one recipe, on the half of the examples that chooses or on the other one."""
        outputs = self._outputs(name, models)
        choose, show = _halves(outputs, self.settings["seed"])
        attack = self.measure.partition("/")[0]
        attacks = list(dict.fromkeys(["loss", "lira", attack])) if held_out else [attack]
        part = outputs.part(*(show if held_out else choose))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on one candidate, which its trial has
            return audit_recipe(part, attacks=attacks, seed=self.settings["seed"], progress=False)

    def _outputs(self, name: str, models: int) -> ShadowOutputs:
        """The outputs of a recipe's models, from the store or trained now."""
        before = max((n for n in self.models if n < models), default=0)
        stack = min(self.stack, math.ceil((models - before) / _processes(self.settings["workers"])))
        recipe = self.base if name == BASE else self.candidates[name]
        try:
            found = train_shadows(
                recipe,
                self.pool,
                models,
                base=None if name == BASE else self.bases,
                keep_weights=name == BASE,
                stack=stack if stack == 1 or _stackable(recipe) else 1,
                progress=False,
                **self.settings,
            )
        except RuntimeError as error:
            raise RuntimeError(f"the search ends at {name!r}, whose training failed: {error}") from error
        if name == BASE:
            self.bases = found
        self.bar.update(max(0, models - self.trained.get(name, 0)))
        self.trained[name] = max(models, self.trained.get(name, 0))
        return found


def _halves(outputs: ShadowOutputs, seed: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Indices of the pool and of the population for each half; copies of one example are in the same one."""
    _, population = outputs.read_population()
    pool_halves = _split(outputs.digests, seed)
    others = _split(population, seed) if population else (None, None)
    return zip(pool_halves, others, strict=True)


def _split(digests: Sequence[bytes], seed: int) -> tuple[Tensor, Tensor]:
    numbers = {digest: i for i, digest in enumerate(dict.fromkeys(digests))}
    first = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)) < len(numbers) // 2
    chosen = first[torch.tensor([numbers[digest] for digest in digests])]
    return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()


def _processes(workers: int | None) -> int:
    return int(joblib.effective_n_jobs(workers or len(visible_gpus()) or -1))


def _stackable(recipe: ShadowRecipe) -> bool:
    try:
        with isolated_rng():
            check_stackable(recipe, recipe.build())
    except ValueError:
        return False
    return True
