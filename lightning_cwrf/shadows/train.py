"""Training shadow models and keeping their signals."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lightning_cwrf._version import __version__
from lightning_cwrf.checks import check_flag, check_integer
from lightning_cwrf.shadows.identity import identity
from lightning_cwrf.shadows.jobs import OTHER_CODE, Job, Recipe, View, names, told, train
from lightning_cwrf.shadows.pool import PoolData, in_short, membership_of, read_data
from lightning_cwrf.shadows.store import ShadowStore
from lightning_cwrf.shadows.workers import ATTEMPTS, end_workers, run


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
        recipe: what the models were trained by, or None.
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
    recipe: Recipe | None = field(default=None, repr=False)

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

    def differences(self, model: nn.Module) -> list[str]:
        """How ``model`` was visibly not trained as these models were (:meth:`ShadowRecipe.differences`).

        Of a recipe that is a function of one's own nothing can be seen.
        """
        tell = getattr(self.recipe, "differences", None)
        return [] if tell is None else list(tell(model))


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
    version: str | None = None,
) -> ShadowSignals:
    """Train n shadow models by a recipe on balanced halves of a pool, in parallel, and keep their signals on disk.

    A model whose signals are in the store already, under the identity of the data, the recipe with its arguments, and
    the seed, is not trained again: a killed run resumes with the models that were in flight.

    Args:
        recipe: ``recipe(train_subset, seed)`` trains a model the way the audited one was trained, defense included,
            and returns it. A function, a ``functools.partial`` or a dataclass with ``__call__``; its code, its
            arguments and what it reads and calls of the user's own code are part of the identity
            (:func:`~lightning_cwrf.shadows.identity.identity`). Torch, NumPy and Python are seeded with ``seed``
            before the call.
        pool: the examples to audit: the members, and as many non-members. Reading it must give the same content every
            time; random augmentation belongs in the recipe. Copies of one example are IN or OUT together.
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
        version: a part of the identity, for recipes of which some part cannot be told by its content (a lock, an open
            file, compiled code): such parts are taken as told by it. Change it whenever one of them changes.

    Raises:
        ValueError: an odd n; a pool that reads differently each time; a population that overlaps the pool; a ``start``
            of another pool or seed, or without weights; another dtype than float32 or float16; a store that cannot be
            written, or damaged or foreign files in it.
        TypeError: a recipe whose content cannot be told, that cannot train a stack, or that takes no start.
        RuntimeError: some models failed; it names them, and the others are kept.
    """
    _check_arguments(recipe, views, store, start, dtype, seed, workers, stack)
    for name, flag in (("keep_weights", keep_weights), ("progress", progress)):
        check_flag(name, flag)
    data = read_data(pool, population)
    membership = membership_of(n, data.digests, seed)
    if start is not None:
        _check_start(start, data.digests, membership)
    check = getattr(recipe, "check", None)
    if check is not None:
        check(pool, population=population, start=start is not None, stack=stack)
    views = tuple(views)
    training = told(recipe, views, version)
    origin = None if start is None else start.store.key
    content = [in_short(data.digests), data.targets, in_short(data.population), population is not None]
    key = identity([__version__, training, *content, dtype, seed, origin])[:32]
    # Absolute: worker processes are used again, and keep the working directory they began in.
    kept = ShadowStore(Path(store).resolve(), key)
    jobs = [
        Job(
            model=i,
            seed=model_seed(seed, i),
            members=membership[i].nonzero().flatten().tolist(),
            recipe=recipe,
            pool=pool,
            population=population,
            views=views,
            dtype=dtype,
            store=kept,
            start=None if start is None else start.store,
            keep_weights=keep_weights,
            told=training if version is None else None,
            read=in_short(data.digests),
        )
        for i in range(n)
    ]
    _train_missing(jobs, workers, stack, progress)
    signals = _signals(jobs, data)
    return ShadowSignals(
        logits=torch.stack([each["logits"] for each in signals]),
        membership=membership,
        targets=data.targets,
        digests=data.digests,
        population=population,
        population_logits=None if population is None else torch.stack([s["population_logits"] for s in signals]),
        store=kept,
        views=views,
        view_logits=torch.stack([s["view_logits"] for s in signals]) if views else None,
        recipe=recipe,
    )


def model_seed(seed: int, model: int) -> int:
    """The seed of one shadow model; it depends on the run's seed and the model's number alone."""
    return int(np.random.SeedSequence([seed, model, 1]).generate_state(1)[0])


def _check_arguments(
    recipe: Any, views: Any, store: Any, start: Any, dtype: Any, seed: Any, workers: Any, stack: Any
) -> None:
    """What is wrong without a look at the data."""
    if isinstance(recipe, type) or not callable(recipe):
        raise TypeError(
            f"a recipe is called with examples and a seed, and {recipe!r} is not. ShadowRecipe.like(trainer, model) is."
        )
    if not isinstance(store, (str, PathLike)):
        raise TypeError(f"store must be the path of a folder, not {store!r}.")
    if start is not None and not isinstance(start, ShadowSignals):
        raise TypeError(f"start takes the shadow models that train_shadows gave, not a {type(start).__name__}.")
    if callable(views) or not all(callable(view) for view in views):
        raise TypeError("views must be a list of functions of a batch of inputs.")
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"logits are kept as float32 or float16, not {dtype}.")
    check_integer("seed", seed, low=0)
    check_integer("stack", stack, low=1)
    if workers is not None:
        check_integer("workers", workers)
        if workers == 0:
            raise ValueError("workers must not be 0; 1 trains in this process, and None takes one per GPU or core.")
    if stack > 1 and not hasattr(recipe, "train_stack"):
        raise TypeError("this recipe cannot train a stack of models as one; a ShadowRecipe can. Leave stack=1.")
    _check_call(recipe, start is not None)


def _check_call(recipe: Callable[..., Any], with_start: bool) -> None:
    """Raise a TypeError unless the recipe can be called as it will be."""
    try:
        signature = inspect.signature(recipe)
    except (TypeError, ValueError):  # compiled code may not say
        return
    arguments = ("members", "seed", "start") if with_start else ("members", "seed")
    try:
        signature.bind(*arguments)
    except TypeError as error:
        called = f"it is called as recipe({', '.join(arguments)}), and {signature} does not fit ({error})"
        hint = (
            "Give the recipe a third argument, the state dict to start from, or leave start out."
            if with_start
            else "If it goes on from base models, pass them as start=."
        )
        raise TypeError(f"the recipe cannot be called: {called}. {hint}") from error


def _check_start(start: ShadowSignals, digests: list[bytes], membership: Tensor) -> None:
    if start.digests != digests:
        raise ValueError("start was trained on another pool; shadow models go on only from the same pool.")
    if len(start) < len(membership) or not torch.equal(start.membership[: len(membership)], membership):
        raise ValueError("start has too few models or another seed; train it with the same n and seed.")
    for i in range(len(membership)):
        start.weights(i)


def _train_missing(jobs: list[Job], workers: int | None, stack: int, progress: bool) -> None:
    """Train the models that are not in the store.

    Raises:
        RuntimeError: some of them failed.
    """
    kept = jobs[0].store
    for job in jobs:
        if job.done:
            kept.signals(job.model)  # damaged ones are told before any training
    waiting = [job for job in jobs if not job.done]
    if not waiting:
        return
    kept.probe()
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="shadow models", disable=not progress) as bar:

        def on_done() -> None:
            bar.update(sum(kept.signals_path(job.model).is_file() for job in jobs) - bar.n)

        failures = _attempt(waiting, workers, stack, on_done)
        if any(text == OTHER_CODE for _, text in failures):
            end_workers()  # they are used again, and may be older than the change
            failures = _attempt([job for job in waiting if not job.done], workers, stack, on_done)
    if failures:
        missing = sum(not job.done for job in jobs)
        raise RuntimeError(
            f"{missing} of {len(jobs)} shadow models failed; any others are kept in {kept.folder} and are not trained "
            f"again.\n{_once_each(failures)}"
        )


def _attempt(jobs: list[Job], workers: int | None, stack: int, on_done: Callable[[], None]) -> list[tuple[str, str]]:
    """Failures: the names of models, and why."""
    said, lost = run(
        train,
        _stacks(jobs, stack),
        workers,
        undone=lambda stacked: not all(job.done for job in stacked),
        on_done=on_done,
    )
    failures = [failure for group in said for failure in group]
    killed = "the worker process was killed, {} times over.\n{}"
    return failures + [(names(stacked), killed.format(ATTEMPTS, why)) for stacked, why in lost]


def _stacks(jobs: list[Job], size: int) -> list[list[Job]]:
    """Jobs that go together: at most ``size``, and with as many members each, so that their batches are as long."""
    by_length: dict[int, list[Job]] = {}
    for job in jobs:
        by_length.setdefault(len(job.members), []).append(job)
    return [alike[i : i + size] for alike in by_length.values() for i in range(0, len(alike), size)]


def _once_each(failures: list[tuple[str, str]]) -> str:
    """Each failure with the names of all the models that it befell, told apart by their last lines."""
    alike: dict[str, tuple[list[str], str]] = {}
    for who, text in failures:
        alike.setdefault(text.strip().splitlines()[-1], ([], text))[0].append(who)
    return "\n".join(f"{', '.join(each)}:\n{text}" for each, text in alike.values())


def _signals(jobs: list[Job], data: PoolData) -> list[dict[str, Tensor]]:
    """Every model's signals, of the shapes that they must have."""
    signals = [job.store.signals(job.model) for job in jobs]
    classes = signals[0]["logits"].shape[-1]
    wanted = {"logits": (len(data.digests), classes)}
    if jobs[0].population is not None:
        wanted["population_logits"] = (len(data.population), classes)
    for job, each in zip(jobs, signals, strict=True):
        found = {name: tuple(each[name].shape) if name in each else None for name in wanted}
        if found != wanted:
            raise ValueError(
                f"{job.store.signals_path(job.model)} holds {found}, not {wanted}: the models differ in their number "
                "of classes, or the file is another's. Delete it, and this one model is trained again."
            )
    return signals
