"""One shadow model's training, in whichever process it happens."""

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
from lightning_cwrf.shadows.pool import in_short
from lightning_cwrf.shadows.store import ShadowStore
from lightning_cwrf.shadows.workers import Share
from lightning_cwrf.weights.vanilla import capture

View: TypeAlias = Callable[[Tensor], Tensor]
Recipe: TypeAlias = Callable[..., nn.Module]
"""``recipe(train_subset, seed)``, or ``recipe(train_subset, seed, start)`` with a start: returns the trained module."""

OTHER_CODE = (
    "this worker process sees another recipe than the process that started it: a setting, an attribute or a variable "
    "of the environment was changed at run time, or a module was edited since, and the worker has it as imported. "
    "Pass such settings as arguments (functools.partial, a dataclass), train with workers=1, or, if the change does "
    "not matter, pass version=."
)
"""The failure of a job whose recipe is not in the worker what it is in the parent."""

_ONE_AT_A_TIME = threading.Lock()
"""Trainings in threads of one process would share its random state; some backends run threads."""

_checked: set[str] = set()
"""Recipes that this worker process was found to see as its parent does."""


@dataclass(frozen=True)
class Job:
    """One shadow model to train; it goes to a worker process.

    Attributes:
        told: identity of recipe and views in the parent; None: a worker need not compare it with its own.
        read: a digest of the pool's examples as the parent read them.
    """

    model: int
    seed: int
    members: list[int]
    recipe: Recipe
    pool: Dataset[Any]
    population: Dataset[Any] | None
    views: tuple[View, ...]
    dtype: torch.dtype
    store: ShadowStore
    start: ShadowStore | None
    keep_weights: bool
    told: str | None
    read: str

    @property
    def done(self) -> bool:
        return self.store.has(self.model, weights=self.keep_weights)


def names(jobs: Sequence[Job]) -> str:
    """What to call jobs in a message."""
    return ", ".join(f"shadow model {job.model} (seed {job.seed})" for job in jobs)


def train(jobs: list[Job], share: Share | None) -> list[tuple[str, str]]:
    """Train and store one model, or some as one; an exception comes back as text, so that it stops no other model."""
    jobs = [job for job in jobs if not job.done]  # by another run on this store, or by a worker killed afterwards
    if not jobs:
        return []
    if share is not None:
        share.take()
        if not _sees_the_same(jobs[0]):
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


def told(recipe: Recipe, views: tuple[View, ...], version: str | None = None) -> str:
    """Identity of what is trained and how it is looked at; modules that it imports may draw random numbers.

    Torch's default dtype, in which a recipe builds its model, is the process's own.
    """
    with isolated_rng():
        return identity([recipe, views, torch.get_default_dtype()], version)


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the user's recipe may draw from the global state
    torch.manual_seed(seed)


def _sees_the_same(job: Job) -> bool:
    """Whether this process, which imported the user's modules by itself, would train what the key says."""
    if job.told is None or job.told in _checked:
        return True
    with _ONE_AT_A_TIME:
        same = told(job.recipe, job.views) == job.told
    if same:
        _checked.add(job.told)
    return same


def _trained(jobs: list[Job]) -> list[nn.Module]:
    first = jobs[0]
    seed_all(first.seed)
    starts = [] if first.start is None else [first.start.weights(job.model) for job in jobs]
    if len(jobs) == 1:
        return [first.recipe(Subset(first.pool, first.members), first.seed, *starts)]
    stacked: Any = first.recipe
    seeds = [job.seed for job in jobs]
    models: list[nn.Module] = stacked.train_stack(first.pool, [job.members for job in jobs], seeds, starts)
    return models


def _store(job: Job, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"the recipe returned a {type(model).__name__}; it must return the trained module.")
    outputs = collect_outputs(model, job.pool, name="pool")
    if in_short(outputs.digests) != job.read:
        raise ValueError("the pool gave other examples after this training than before: its reading is not repeatable.")
    logits = {"logits": outputs.logits}
    if job.population is not None:
        logits["population_logits"] = collect_outputs(model, job.population, name="population").logits
    if job.views:
        logits["view_logits"] = collect_view_logits(model, job.pool, job.views)
    signals = {name: values.to(job.dtype) for name, values in logits.items()}
    for name, values in signals.items():
        if not values.isfinite().all():
            raise ValueError(
                f"the model's {name} are not all finite as {job.dtype} (float16 ends at 65,504); keep float32."
            )
    job.store.save(job.model, signals, capture(model) if job.keep_weights else None)
