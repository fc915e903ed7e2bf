"""Training shadow models and keeping their signals."""

from __future__ import annotations

import logging
import os
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import joblib
import numpy as np
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from lightning_cwrf.classification import split_batch
from lightning_cwrf.data import example_digests, isolated_rng
from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.shadows.identity import identity
from lightning_cwrf.shadows.membership import balanced_membership
from lightning_cwrf.shadows.store import ShadowStore
from lightning_cwrf.vanilla import capture

_ATTEMPTS = 3
"""How often models are tried whose worker process is killed."""

Recipe: TypeAlias = Callable[..., nn.Module]
"""``recipe(train_subset, seed)``, or ``recipe(train_subset, seed, start)`` with a start: returns the trained module."""


@dataclass(frozen=True)
class ShadowSignals:
    """What k shadow models say of a pool of n examples, and of m population points that none of them has seen.

    Attributes:
        logits: float32 ``(k, n, K)``.
        membership: bool ``(k, n)``, True where the model was trained with the example.
        targets: ``(n,)``.
        digests: one digest of content per example; an audit finds an example's column by it.
        population: the population data set itself, for the audited model's own outputs on it; or None.
        population_logits: float32 ``(k, m, K)``, or None.
        store: where the models' files are, under the key of pool, population, recipe and seed.
    """

    logits: Tensor = field(repr=False)
    membership: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    digests: list[bytes] = field(repr=False)
    population: Dataset[Any] | None = field(repr=False)
    population_logits: Tensor | None = field(repr=False)
    store: ShadowStore

    def __len__(self) -> int:
        return len(self.logits)

    def weights(self, model: int) -> dict[str, Tensor]:
        """The state dict of one shadow model; :func:`train_shadows` must have run with ``keep_weights=True``."""
        return self.store.weights(model)


@dataclass(frozen=True)
class _Job:
    """One shadow model to train; it goes to a worker process."""

    model: int
    seed: int
    members: list[int]
    recipe: Recipe
    pool: Dataset[Any]
    population: Dataset[Any] | None
    store: ShadowStore
    start: ShadowStore | None
    keep_weights: bool


def train_shadows(
    recipe: Recipe,
    pool: Dataset[Any],
    n: int = 8,
    *,
    population: Dataset[Any] | None = None,
    store: str | PathLike[str] = "shadow_store",
    start: ShadowSignals | None = None,
    keep_weights: bool = False,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> ShadowSignals:
    """Train n shadow models by a recipe on balanced halves of a pool, in parallel, and keep their signals on disk.

    A model whose signals are in the store already, under the identity of the data, the recipe with its arguments, and
    the seed, is not trained again: a killed run resumes with the models that were in flight.

    Args:
        recipe: ``recipe(train_subset, seed)`` trains a model the way the audited one was trained, defense included,
            and returns it. A function, a ``functools.partial`` or a dataclass with ``__call__``; its name, source and
            arguments are part of the identity, the code that it calls is not. Torch, NumPy and Python are seeded with
            ``seed`` before the call.
        pool: the examples to audit: the members, and as many non-members. Reading it must give the same content every
            time; random augmentation belongs in the recipe.
        n: an even number of models; half of them are IN for every example.
        population: examples that no model sees, for RMIA.
        store: folder of the store; it is made when missing.
        start: base shadow models that this recipe goes on from, trained on the same pool and seed with
            ``keep_weights=True``. The recipe is then called as ``recipe(train_subset, seed, start)``, with the state
            dict of the base model that was trained on the same half with the same seed.
        keep_weights: keep every model's state dict too.
        seed: of the halves and of each model's own seed.
        workers: processes; None: one per core, at most n. With 1 they train in this process.
        progress: show a bar.

    Raises:
        ValueError: an odd n; a pool that reads differently each time; a population that overlaps the pool; a ``start``
            of another pool or seed, or without weights.
        TypeError: a recipe whose content cannot be told.
        RuntimeError: some models failed; it names them, and the others are kept.
    """
    digests, targets = _read(pool, "pool")
    population_digests: list[bytes] = [] if population is None else _read(population, "population")[0]
    common = len(set(digests).intersection(population_digests))
    if common:
        raise ValueError(f"{common} examples of the population are in the pool; no shadow model may see it.")
    membership = balanced_membership(n, len(digests), seed)
    if start is not None:
        _check_start(start, digests, membership)
    origin = None if start is None else start.store.key
    key = identity([recipe, digests, targets, population_digests, seed, origin])[:32]
    # Absolute: worker processes are used again, and keep the working directory they began in.
    kept = ShadowStore(Path(store).resolve(), key)
    jobs = [
        _Job(
            model=i,
            seed=model_seed(seed, i),
            members=membership[i].nonzero().flatten().tolist(),
            recipe=recipe,
            pool=pool,
            population=population,
            store=kept,
            start=None if start is None else start.store,
            keep_weights=keep_weights,
        )
        for i in range(n)
        if not kept.has(i, weights=keep_weights)
    ]
    with tqdm(total=n, initial=n - len(jobs), desc="shadow models", disable=not progress) as bar:
        failures = []
        for _, failure in _run(jobs, workers):
            bar.update()
            failures += [failure] if failure is not None else []
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {n} shadow models failed; any others are kept in {kept.folder} and are not trained "
            "again.\n" + "\n".join(failures)
        )
    signals = [kept.signals(i) for i in range(n)]
    return ShadowSignals(
        logits=torch.stack([each["logits"] for each in signals]),
        membership=membership,
        targets=targets,
        digests=digests,
        population=population,
        population_logits=None if population is None else torch.stack([s["population_logits"] for s in signals]),
        store=kept,
    )


def model_seed(seed: int, model: int) -> int:
    """The seed of one shadow model; it depends on the run's seed and the model's number alone."""
    return int(np.random.SeedSequence([seed, model, 1]).generate_state(1)[0])


def _check_start(start: ShadowSignals, digests: list[bytes], membership: Tensor) -> None:
    if start.digests != digests:
        raise ValueError("start was trained on another pool; shadow models go on only from the same pool.")
    if len(start) < len(membership) or not torch.equal(start.membership[: len(membership)], membership):
        raise ValueError("start has too few models or another seed; train it with the same n and seed.")
    for i in range(len(membership)):
        start.weights(i)


def _run(jobs: list[_Job], workers: int | None) -> Iterator[tuple[int, str | None]]:
    """Each model's number and, where it failed, why, as they are done."""
    cores = os.cpu_count() or 1
    workers = min(workers or cores, len(jobs))
    if workers <= 1:
        yield from (_train_one(job) for job in jobs)
        return
    waiting = {job.model: job for job in jobs}
    for attempt in range(_ATTEMPTS):
        parallel = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)
        try:
            for model, failure in parallel(
                joblib.delayed(_train_one)(job, max(1, cores // workers)) for job in list(waiting.values())
            ):
                waiting.pop(model)
                yield model, failure
            return
        except TerminatedWorkerError as error:  # killed from outside, most often for its memory
            lost = str(error)
            if attempt + 1 < _ATTEMPTS:
                warnings.warn(
                    f"a worker process was killed; {len(waiting)} shadow models are tried again. If it was for memory, "
                    "pass fewer workers.",
                    stacklevel=3,
                )
    yield from ((model, f"shadow model {model}: its worker process was killed, {_ATTEMPTS} times over.\n{lost}")
                for model in waiting)  # fmt: skip


def _train_one(job: _Job, threads: int | None = None) -> tuple[int, str | None]:
    """Train and store one model; an exception comes back as text, so that it stops no other model."""
    if job.store.has(job.model, weights=job.keep_weights):  # another run on this store, or a worker killed afterwards
        return job.model, None
    if threads is not None:  # in a worker process, which shares the cores and the terminal with the others
        torch.set_num_threads(threads)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        with isolated_rng(), torch.random.fork_rng():
            random.seed(job.seed)
            np.random.seed(job.seed)  # noqa: NPY002 - the user's recipe may draw from the global state
            torch.manual_seed(job.seed)
            start = () if job.start is None else (job.start.weights(job.model),)
            model = job.recipe(Subset(job.pool, job.members), job.seed, *start)
            if not isinstance(model, nn.Module):
                raise TypeError(f"the recipe returned a {type(model).__name__}; it must return the trained module.")
            _store(job, model)
    except Exception:  # whatever a recipe raises
        return job.model, f"shadow model {job.model} (seed {job.seed}):\n{traceback.format_exc()}"
    return job.model, None


def _store(job: _Job, model: nn.Module) -> None:
    signals = {"logits": collect_outputs(model, job.pool, name="pool").logits}
    if job.population is not None:
        signals["population_logits"] = collect_outputs(model, job.population, name="population").logits
    job.store.save(job.model, signals, capture(model) if job.keep_weights else None)


def _read(data: Dataset[Any], name: str) -> tuple[list[bytes], Tensor]:
    """Digests and targets of every example; the first batch is read twice to see that the content stays."""
    digests: list[bytes] = []
    targets = []
    with isolated_rng():  # a loader draws a seed for its workers
        loader = DataLoader(data, batch_size=256)
        first = next(iter(loader), None)
        if first is None:
            raise ValueError(f"the {name} is empty.")
        for batch in loader:
            digests += example_digests(batch)
            targets.append(split_batch(batch)[1])
    again = example_digests(first)
    if again != digests[: len(again)]:
        raise ValueError(
            f"the {name} reads differently each time; move random augmentation into the recipe, so that an example can "
            "be told by its content."
        )
    return digests, torch.cat(targets)
