"""Training one shadow model, in this process or in a worker."""

from __future__ import annotations

import random
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from lightning_cwrf.data import isolated_rng
from lightning_cwrf.outputs import collect_outputs, collect_view_logits
from lightning_cwrf.shadows.identity import identity
from lightning_cwrf.shadows.pool import joint_digest
from lightning_cwrf.shadows.store import ShadowStore
from lightning_cwrf.shadows.workers import Share
from lightning_cwrf.weights.vanilla import capture

View: TypeAlias = Callable[[Tensor], Tensor]
Recipe: TypeAlias = Callable[..., nn.Module]
"""``recipe(train_subset, seed)``, or ``recipe(train_subset, seed, base)`` with base models: the trained module."""

OTHER_CODE = (
    "this worker process sees another recipe than the process that started it: a setting, an attribute or a variable "
    "of the environment was changed at run time, or a module was edited since, and the worker has it as imported. "
    "Pass such settings as arguments (functools.partial, a dataclass), train with workers=1, or, if the change does "
    "not matter, pass version=."
)
"""The failure of a job whose recipe differs between the worker and its parent."""

_ONE_AT_A_TIME = threading.RLock()  # a recipe may train shadow models of its own
"""Trainings in threads of one process would share its random state; some backends run threads."""

_verified: set[str] = set()
"""Identities of recipes that were the same in this worker process and its parent."""


@dataclass(frozen=True)
class Run:
    """What all shadow models of one call of ``train_shadows`` share.

    Attributes:
        recipe_identity: of recipe and views in the parent process; None: workers do not compare it with their own.
        pool_digest: of the pool's examples as the parent read them.
    """

    recipe: Recipe
    pool: Dataset[Any]
    population: Dataset[Any] | None
    views: tuple[View, ...]
    dtype: torch.dtype
    store: ShadowStore
    base: ShadowStore | None
    keep_weights: bool
    recipe_identity: str | None
    pool_digest: str


@dataclass(frozen=True)
class Job:
    """One shadow model to train. It is pickled and sent to a worker process."""

    run: Run
    model: int
    seed: int
    members: list[int]

    @property
    def done(self) -> bool:
        return self.run.store.has(self.model, weights=self.run.keep_weights)


def names(jobs: Sequence[Job]) -> str:
    """Jobs as a message names them."""
    return ", ".join(f"shadow model {job.model} (seed {job.seed})" for job in jobs)


def train(jobs: list[Job], share: Share | None) -> list[tuple[str, str]]:
    """Train and store one model, or several as a stack.

    Exceptions are returned as text, with the names of the models, so that one failure does not stop the other models.
    """
    # Another run on this store may have trained them, or a worker that was killed afterwards.
    jobs = [job for job in jobs if not job.done]
    if not jobs:
        return []
    if share is not None:
        share.take()
        if not _same_recipe_here(jobs[0].run):
            return [(names(jobs), OTHER_CODE)]
    failures: list[tuple[str, str]] = []
    with _ONE_AT_A_TIME, isolated_rng(), torch.random.fork_rng():
        try:
            models = _trained(jobs)
        except Exception:  # whatever a recipe raises
            return [(names(jobs), traceback.format_exc())]
        for job, model in zip(jobs, models, strict=True):
            try:
                _store(job, model)
            except Exception:
                failures.append((names([job]), traceback.format_exc()))
    return failures


def recipe_identity(recipe: Recipe, views: tuple[View, ...], version: str | None = None) -> str:
    """Identity of a training and of the views that its models are evaluated on."""
    with isolated_rng():  # modules that are imported on the way may draw random numbers
        return identity([recipe, views, torch.get_default_dtype()], version)  # a recipe builds its model in that dtype


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the user's recipe may draw from the global state
    torch.manual_seed(seed)


def _same_recipe_here(run: Run) -> bool:
    """Whether this process, which imported the user's modules by itself, would train what the key says."""
    if run.recipe_identity is None or run.recipe_identity in _verified:
        return True
    with _ONE_AT_A_TIME:
        same = recipe_identity(run.recipe, run.views) == run.recipe_identity
    if same:
        _verified.add(run.recipe_identity)
    return same


def _trained(jobs: list[Job]) -> list[nn.Module]:
    run, seeds = jobs[0].run, [job.seed for job in jobs]
    seed_all(seeds[0])
    bases = [] if run.base is None else [run.base.weights(job.model) for job in jobs]
    if len(jobs) == 1:
        return [run.recipe(Subset(run.pool, jobs[0].members), seeds[0], *bases)]
    stackable: Any = run.recipe
    models: list[nn.Module] = stackable.train_stack(run.pool, [job.members for job in jobs], seeds, bases)
    return models


def _store(job: Job, model: nn.Module) -> None:
    run = job.run
    if not isinstance(model, nn.Module):
        raise TypeError(f"the recipe returned a {type(model).__name__}; it must return the trained module.")
    found = collect_outputs(model, run.pool, name="pool")
    if joint_digest(found.digests) != run.pool_digest:
        raise ValueError("the pool gave other examples after this training than before: it does not read repeatably.")
    outputs = {"logits": found.logits}
    if run.population is not None:
        outputs["population_logits"] = collect_outputs(model, run.population, name="population").logits
    if run.views:
        outputs["view_logits"] = collect_view_logits(model, run.pool, run.views)
    outputs = {name: values.to(run.dtype) for name, values in outputs.items()}
    for name, values in outputs.items():
        if not values.isfinite().all():
            raise ValueError(
                f"the model's {name} are not all finite as {run.dtype} (float16 ends at 65,504); keep float32."
            )
    run.store.save(job.model, outputs, capture(model) if run.keep_weights else None)
