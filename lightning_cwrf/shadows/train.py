"""Training shadow models and keeping their signals."""

from __future__ import annotations

import random
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from lightning_cwrf.classification import split_batch
from lightning_cwrf.data import example_digests, isolated_rng, reads_alike
from lightning_cwrf.outputs import collect_outputs, collect_view_logits
from lightning_cwrf.overlap import is_ambiguous
from lightning_cwrf.shadows.identity import identity
from lightning_cwrf.shadows.membership import balanced_membership
from lightning_cwrf.shadows.store import ShadowStore
from lightning_cwrf.shadows.workers import ATTEMPTS, Share, run
from lightning_cwrf.vanilla import capture

_ONE_AT_A_TIME = threading.Lock()
"""Trainings in threads of one process would share its random state; some backends run threads."""

View: TypeAlias = Callable[[Tensor], Tensor]
Recipe: TypeAlias = Callable[..., nn.Module]
"""``recipe(train_subset, seed)``, or ``recipe(train_subset, seed, start)`` with a start: returns the trained module."""


@dataclass(frozen=True)
class ShadowSignals:
    """What k shadow models say of a pool of n examples, and of m population points that none of them has seen.

    Attributes:
        logits: ``(k, n, K)``, in float32 or as they were kept.
        membership: bool ``(k, n)``, True where the model was trained with the example.
        targets: ``(n,)``.
        digests: one digest of content per example; an audit finds an example's column by it.
        population: the population data set itself, for the audited model's own outputs on it; or None.
        population_logits: ``(k, m, K)``, or None.
        store: where the models' files are, under the key of pool, population, views, recipe and seed.
        views: functions of a batch of inputs, for the audited model's own outputs on them; or empty.
        view_logits: on q augmented views of the pool, ``(k, q, n, K)``, or None.
    """

    logits: Tensor = field(repr=False)
    membership: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    digests: list[bytes] = field(repr=False)
    population: Dataset[Any] | None = field(repr=False)
    population_logits: Tensor | None = field(repr=False)
    store: ShadowStore
    views: tuple[View, ...] = field(default=(), repr=False)
    view_logits: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.logits)

    def __repr__(self) -> str:
        others = 0 if self.population_logits is None else self.population_logits.shape[1]
        return (
            f"ShadowSignals({len(self)} models, pool of {len(self.targets)}, population of {others}, {len(self.views)} "
            f"views, {self.logits.dtype}, {self.store.folder})"
        )

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
    views: tuple[View, ...]
    dtype: torch.dtype
    store: ShadowStore
    start: ShadowStore | None
    keep_weights: bool

    @property
    def done(self) -> bool:
        return self.store.has(self.model, weights=self.keep_weights)


def train_shadows(
    recipe: Recipe,
    pool: Dataset[Any],
    n: int = 8,
    *,
    population: Dataset[Any] | None = None,
    views: Sequence[View] = (),
    store: str | PathLike[str] = "shadow_store",
    start: ShadowSignals | None = None,
    keep_weights: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    workers: int | None = None,
    stack: int = 1,
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
        views: functions of a batch of inputs (rotations, flips), known as recipes are: the models' logits on these
            views of the pool are kept too, for the augmentation attack and for LiRA over several queries.
        store: folder of the store; it is made when missing. Workers on other machines must find it at the same path.
        start: base shadow models that this recipe goes on from, trained on the same pool and seed with
            ``keep_weights=True``. The recipe is then called as ``recipe(train_subset, seed, start)``, with the state
            dict of the base model that was trained on the same half with the same seed.
        keep_weights: keep every model's state dict too.
        dtype: of the logits that are kept; float16 halves the files, with a relative error of 0.05 %.
        seed: of the halves and of each model's own seed.
        workers: processes; None: one per GPU, or per core. With 1 they train in this process. Cores and GPUs of this
            machine are shared out among them. Under ``joblib.parallel_config(backend=...)`` they are Ray's or Dask's.
        stack: how many models to train as one, for a recipe that can (:class:`~lightning_cwrf.ShadowRecipe`).
        progress: show a bar.

    Raises:
        ValueError: an odd n; a pool that reads differently each time; a population that overlaps the pool; a ``start``
            of another pool or seed, or without weights; another dtype than float32 or float16.
        TypeError: a recipe whose content cannot be told, or that cannot train a stack.
        RuntimeError: some models failed; it names them, and the others are kept.
    """
    if isinstance(recipe, type) or not callable(recipe):
        raise TypeError(
            f"a recipe is called with examples and a seed, and {recipe!r} is not. ShadowRecipe.like(trainer, model) is."
        )
    if start is not None and not isinstance(start, ShadowSignals):
        raise TypeError(f"start takes the shadow models that train_shadows gave, not a {type(start).__name__}.")
    digests, targets = _read(pool, "pool")
    population_digests: list[bytes] = [] if population is None else _read(population, "population")[0]
    common = len(set(digests).intersection(population_digests))
    if common and is_ambiguous(digests):
        warnings.warn(
            f"{common} examples of the population have the inputs of examples in the pool. Many examples of the pool "
            "share theirs with one another, so this may be chance: see to it that no shadow model sees the population.",
            stacklevel=2,
        )
    elif common:
        raise ValueError(f"{common} examples of the population are in the pool; no shadow model may see it.")
    membership = balanced_membership(n, len(digests), seed)
    if start is not None:
        _check_start(start, digests, membership)
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"logits are kept as float32 or float16, not {dtype}.")
    if stack > 1 and not hasattr(recipe, "train_stack"):
        raise TypeError("this recipe cannot train a stack of models as one; a ShadowRecipe can. Leave stack=1.")
    check = getattr(recipe, "check", None)
    if check is not None:
        check(pool, start=start is not None, stack=stack, population=population)
    origin = None if start is None else start.store.key
    key = identity([recipe, digests, targets, population_digests, tuple(views), dtype, seed, origin])[:32]
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
            views=tuple(views),
            dtype=dtype,
            store=kept,
            start=None if start is None else start.store,
            keep_weights=keep_weights,
        )
        for i in range(n)
    ]
    waiting = [job for job in jobs if not job.done]
    with tqdm(total=n, initial=n - len(waiting), desc="shadow models", disable=not progress) as bar:
        said, lost = run(
            _train,
            _stacks(waiting, stack),
            workers,
            undone=lambda stacked: not all(job.done for job in stacked),
            on_done=lambda: bar.update(sum(kept.signals_path(i).is_file() for i in range(n)) - bar.n),
        )
    failures = [failure for group in said for failure in group]
    failures += [
        (_names(stacked), f"the worker process was killed, {ATTEMPTS} times over.\n{why}") for stacked, why in lost
    ]
    if failures:
        missing = sum(not job.done for job in jobs)
        raise RuntimeError(
            f"{missing} of {n} shadow models failed; any others are kept in {kept.folder} and are not trained again.\n"
            + _once_each(failures)
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
        views=tuple(views),
        view_logits=torch.stack([s["view_logits"] for s in signals]) if views else None,
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


def _stacks(jobs: list[_Job], size: int) -> list[list[_Job]]:
    """Jobs that go together: at most ``size``, and with as many members each, so that their batches are as long."""
    if size < 1:
        raise ValueError(f"stack must be at least 1, not {size}.")
    by_length: dict[int, list[_Job]] = {}
    for job in jobs:
        by_length.setdefault(len(job.members), []).append(job)
    return [alike[i : i + size] for alike in by_length.values() for i in range(0, len(alike), size)]


def _names(jobs: list[_Job]) -> str:
    return ", ".join(f"shadow model {job.model} (seed {job.seed})" for job in jobs)


def _once_each(failures: list[tuple[str, str]]) -> str:
    """Each failure with the names of all the models that it befell, told apart by their last lines."""
    alike: dict[str, tuple[list[str], str]] = {}
    for names, text in failures:
        alike.setdefault(text.strip().splitlines()[-1], ([], text))[0].append(names)
    return "\n".join(f"{', '.join(names)}:\n{text}" for names, text in alike.values())


def _train(jobs: list[_Job], share: Share | None) -> list[tuple[str, str]]:
    """Train and store one model, or some as one; an exception comes back as text, so that it stops no other model."""
    jobs = [job for job in jobs if not job.done]  # by another run on this store, or by a worker killed afterwards
    if not jobs:
        return []
    if share is not None:
        share.take()
    failures: list[tuple[str, str]] = []
    with _ONE_AT_A_TIME, isolated_rng(), torch.random.fork_rng():
        try:
            models = _trained(jobs)
        except Exception:  # whatever a recipe raises
            return [(_names(jobs), traceback.format_exc())]
        for job, model in zip(jobs, models, strict=True):
            try:
                _store(job, model)
            except Exception:
                failures.append((_names([job]), traceback.format_exc()))
    return failures


def _trained(jobs: list[_Job]) -> list[nn.Module]:
    first = jobs[0]
    seed_all(first.seed)
    starts = [] if first.start is None else [first.start.weights(job.model) for job in jobs]
    if len(jobs) == 1:
        return [first.recipe(Subset(first.pool, first.members), first.seed, *starts)]
    stacked: Any = first.recipe
    seeds = [job.seed for job in jobs]
    models: list[nn.Module] = stacked.train_stack(first.pool, [job.members for job in jobs], seeds, starts)
    return models


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the user's recipe may draw from the global state
    torch.manual_seed(seed)


def _store(job: _Job, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"the recipe returned a {type(model).__name__}; it must return the trained module.")
    logits = {"logits": collect_outputs(model, job.pool, name="pool").logits}
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


def _read(data: Dataset[Any], name: str) -> tuple[list[bytes], Tensor]:
    """Digests and targets of every example."""
    if isinstance(data, DataLoader):
        raise TypeError(f"the {name} must be a data set, not a DataLoader; pass its dataset.")
    loader = DataLoader(data, batch_size=256)
    if not reads_alike(loader):
        raise ValueError(
            f"the {name} reads differently each time; move random augmentation into the recipe, so that an example can "
            "be told by its content."
        )
    digests: list[bytes] = []
    targets = []
    with isolated_rng():
        for batch in loader:
            digests += example_digests(batch)
            targets.append(split_batch(batch)[1])
    if not targets:
        raise ValueError(f"the {name} is empty.")
    return digests, torch.cat(targets)
