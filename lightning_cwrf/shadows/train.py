"""Training shadow models and storing their outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lightning_cwrf._deprecated import renamed, renamed_names
from lightning_cwrf._version import __version__
from lightning_cwrf.arrays import labels_of
from lightning_cwrf.checks import check_flag, check_integer
from lightning_cwrf.shadows.identity import identity
from lightning_cwrf.shadows.jobs import OTHER_CODE, Job, Recipe, Run, View, names, recipe_identity, train
from lightning_cwrf.shadows.outputs import ShadowOutputs
from lightning_cwrf.shadows.pool import PoolData, batched, joint_digest, membership_of, read_data
from lightning_cwrf.shadows.store import ShadowStore
from lightning_cwrf.shadows.workers import ATTEMPTS, end_workers, run

if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, ShadowSignals="ShadowOutputs")


@renamed(start="base")
def train_shadows(
    recipe: Recipe,
    pool: Dataset[Any],
    n: int = 8,
    *,
    population: Dataset[Any] | None = None,
    groups: Any = None,
    views: Sequence[View] = (),
    store: str | PathLike[str] = "shadow_store",
    base: ShadowOutputs | None = None,
    keep_weights: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    workers: int | None = None,
    stack: int = 1,
    progress: bool = True,
    version: str | None = None,
) -> ShadowOutputs:
    """Train n shadow models by a recipe on balanced halves of a pool, in parallel, and store their outputs on disk.

    A model that is in the store already, under the identity of the data, the recipe with its arguments and the seed, is
    not trained again. A killed run loses the models in flight only: call it again to resume.

    Args:
        recipe: ``recipe(train_subset, seed)`` trains a model as the audited one was trained, defense included, and
            returns it. A function, a ``functools.partial`` or a dataclass with ``__call__``; its identity includes its
            code, its arguments, and what it reads and calls of the user's own code
            (:func:`~lightning_cwrf.shadows.identity.identity`). Torch, NumPy and Python are seeded with ``seed``
            before the call.
        pool: the examples to audit: the members, and as many non-members. It must read the same every time; random
            augmentation belongs in the recipe. Copies of one example are IN or OUT together.
        n: an even number of models; every example is IN for half of them.
        population: examples that no model is trained on, for RMIA.
        groups: a value for each example of the pool, in its order, such as the person whose data it is. All examples of
            a group are IN or OUT together, as for :meth:`AuditResult.user_level
            <lightning_cwrf.AuditResult.user_level>`; the halves have equally many groups rather than examples.
        views: functions of a batch of inputs (rotations, flips), identified as recipes are. The models' logits on these
            views of the pool are stored too, for the augmentation attack and for LiRA with several queries.
        store: folder of the store; created if missing. Workers on other machines must find it at the same path.
        base: base shadow models to fine-tune, trained on the same pool and seed with ``keep_weights=True``. The recipe
            is then called as ``recipe(train_subset, seed, base)``, with the state dict of the base model that was
            trained on the same half with the same seed.
        keep_weights: store every model's state dict too.
        dtype: of the stored logits; float16 halves the files, with a relative error of 0.05 %.
        seed: of the halves and of each model's own seed.
        workers: processes; None: one per GPU, or per core. With 1 the models train in this process. Cores and GPUs of
            this machine are divided among them. Under ``joblib.parallel_config(backend=...)`` they are Ray's or Dask's.
        stack: how many models to train as one, if the recipe can (:class:`~lightning_cwrf.ShadowRecipe`).
        progress: show a progress bar.
        version: a part of the identity, for recipes with parts that have no content to compare (a lock, an open file,
            compiled code): such parts are ignored. Change it whenever one of them changes.

    Raises:
        ValueError: an odd n; a pool that reads differently each time; a population that overlaps the pool; groups that
            are not one for each example; a ``base`` of another pool, seed or groups, or without weights; a dtype other
            than float32 or float16; a store that cannot be written, or damaged or foreign files in it.
        TypeError: a recipe without an identity, one that cannot train a stack, or one that takes no base model.
        RuntimeError: some models failed; it names them. The others are stored.
    """
    _check_arguments(recipe, views, store, base, dtype, seed, workers, stack)
    for name, flag in (("keep_weights", keep_weights), ("progress", progress)):
        check_flag(name, flag)
    pool, population = batched(pool, recipe), batched(population, recipe)
    data = read_data(pool, population)
    if groups is not None:
        groups = _numbered(labels_of(groups, len(data.digests), "groups", of="examples of the pool, in its order"))
    membership = membership_of(n, data.digests, seed, groups)
    if base is not None:
        _check_base(base, data.digests, membership)
    check = getattr(recipe, "check", None)
    if check is not None:
        check(pool, population=population, base=base is not None, stack=stack)
    views = tuple(views)
    training, read = recipe_identity(recipe, views, version), joint_digest(data.digests)
    content: list[Any] = [read, data.targets, joint_digest(data.population), population is not None]
    content += [] if groups is None else [groups]
    base_store = None if base is None else base.store
    key = identity([__version__, training, *content, dtype, seed, None if base_store is None else base_store.key])[:32]
    shared = Run(
        recipe=recipe,
        pool=pool,
        population=population,
        views=views,
        dtype=dtype,
        # Absolute, because worker processes are reused and keep the working directory that they started in.
        store=ShadowStore(Path(store).resolve(), key),
        base=base_store,
        keep_weights=keep_weights,
        recipe_identity=training if version is None else None,
        pool_digest=read,
    )
    jobs = [Job(shared, i, model_seed(seed, i), row.nonzero().flatten().tolist()) for i, row in enumerate(membership)]
    _train_missing(jobs, workers, stack, progress)
    return _load(jobs, data, membership)


def _numbered(labels: list[Any]) -> Tensor:
    """The same for the same groups, whatever they are called."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels])


def model_seed(seed: int, model: int) -> int:
    """The seed of one shadow model: a function of the run's seed and the model's number alone."""
    return int(np.random.SeedSequence([seed, model, 1]).generate_state(1)[0])


def _check_arguments(
    recipe: Any, views: Any, store: Any, base: Any, dtype: Any, seed: Any, workers: Any, stack: Any
) -> None:
    """Raise for what is wrong whatever the data are."""
    if isinstance(recipe, type) or not callable(recipe):
        raise TypeError(
            f"a recipe is called with examples and a seed, and {recipe!r} cannot be. ShadowRecipe.like(trainer, model) "
            "can."
        )
    if not isinstance(store, (str, PathLike)):
        raise TypeError(f"store must be the path of a folder, not {store!r}.")
    if base is not None and not isinstance(base, ShadowOutputs):
        raise TypeError(f"base must be what train_shadows returns, not a {type(base).__name__}.")
    if callable(views) or not all(callable(view) for view in views):
        raise TypeError("views must be a list of functions of a batch of inputs.")
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"logits are stored as float32 or float16, not {dtype}.")
    check_integer("seed", seed, low=0)
    check_integer("stack", stack, low=1)
    if workers is not None:
        check_integer("workers", workers)
        if workers == 0:
            raise ValueError("workers must not be 0; 1 trains in this process, and None takes one per GPU or core.")
    if stack > 1 and not hasattr(recipe, "train_stack"):
        raise TypeError("this recipe cannot train a stack of models as one; a ShadowRecipe can. Leave stack=1.")
    _check_call(recipe, with_base=base is not None)


def _check_call(recipe: Callable[..., Any], *, with_base: bool) -> None:
    """Raise a TypeError unless the recipe can be called as it will be."""
    try:
        signature = inspect.signature(recipe)
    except (TypeError, ValueError):  # compiled code may have none
        return
    arguments = ("members", "seed", "base") if with_base else ("members", "seed")
    try:
        signature.bind(*arguments)
    except TypeError as error:
        hint = (
            "Give the recipe a third argument, the state dict of its base model, or leave base out."
            if with_base
            else "If it fine-tunes base models, pass them as base=."
        )
        raise TypeError(
            f"the recipe cannot be called: it is called as recipe({', '.join(arguments)}), and {signature} does not "
            f"fit ({error}). {hint}"
        ) from error


def _check_base(base: ShadowOutputs, digests: list[bytes], membership: Tensor) -> None:
    base.check_inputs()
    if base.digests != digests:
        raise ValueError("base was trained on another pool; shadow models can only be fine-tuned on the same pool.")
    if len(base) < len(membership) or not torch.equal(base.membership[: len(membership)], membership):
        raise ValueError(
            "base has too few models or another seed, or other groups; train it with the same n, seed and groups."
        )
    for i in range(len(membership)):
        base.weights(i)


def _train_missing(jobs: list[Job], workers: int | None, stack: int, progress: bool) -> None:
    """Train the models that are not in the store yet; a RuntimeError names those that failed."""
    store = jobs[0].run.store
    for job in jobs:
        if job.done:
            store.outputs(job.model)  # a damaged file is an error before any training
    waiting = [job for job in jobs if not job.done]
    if not waiting:
        return
    store.probe()
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="shadow models", disable=not progress) as bar:

        def on_done() -> None:
            bar.update(sum(store.outputs_path(job.model).is_file() for job in jobs) - bar.n)

        failures = _attempt(waiting, workers, stack, on_done)
        if any(text == OTHER_CODE for _, text in failures):
            end_workers()  # joblib reuses them, so they may have started before the change
            failures = _attempt([job for job in waiting if not job.done], workers, stack, on_done)
    if failures:
        missing = sum(not job.done for job in jobs)
        raise RuntimeError(
            f"{missing} of {len(jobs)} shadow models failed; any others are kept in {store.folder} and are not trained "
            f"again.\n{_grouped(failures)}"
        )


def _attempt(jobs: list[Job], workers: int | None, stack: int, on_done: Callable[[], None]) -> list[tuple[str, str]]:
    """Failures: the names of models, and why."""
    returned, lost = run(
        train,
        _stacks(jobs, stack),
        workers,
        undone=lambda stacked: not all(job.done for job in stacked),
        on_done=on_done,
    )
    failures = [failure for group in returned for failure in group]
    killed = "the worker process was killed {} times.\n{}"
    return failures + [(names(stacked), killed.format(ATTEMPTS, why)) for stacked, why in lost]


def _stacks(jobs: list[Job], size: int) -> list[list[Job]]:
    """Groups of at most ``size`` jobs with equally many members, so that their batches have the same length."""
    by_length: dict[int, list[Job]] = {}
    for job in jobs:
        by_length.setdefault(len(job.members), []).append(job)
    return [alike[i : i + size] for alike in by_length.values() for i in range(0, len(alike), size)]


def _grouped(failures: list[tuple[str, str]]) -> str:
    """Each kind of failure once, by the last line of its traceback, with all models that it hit."""
    kinds: dict[str, tuple[list[str], str]] = {}
    for who, text in failures:
        kinds.setdefault(text.strip().splitlines()[-1], ([], text))[0].append(who)
    return "\n".join(f"{', '.join(each)}:\n{text}" for each, text in kinds.values())


def _load(jobs: list[Job], data: PoolData, membership: Tensor) -> ShadowOutputs:
    """Read every model's outputs from the store, and check their shapes."""
    shared = jobs[0].run
    outputs = [shared.store.outputs(job.model) for job in jobs]
    classes = outputs[0]["logits"].shape[-1]
    wanted = {"logits": (len(data.digests), classes)}
    if shared.population is not None:
        wanted["population_logits"] = (len(data.population), classes)
    for job, each in zip(jobs, outputs, strict=True):
        found = {name: tuple(each[name].shape) if name in each else None for name in wanted}
        if found != wanted:
            raise ValueError(
                f"{shared.store.outputs_path(job.model)} holds {found}, not {wanted}: the models differ in their "
                "number of classes, or the file is foreign. Delete it, and this one model is trained again."
            )

    def stacked(name: str) -> Tensor:
        return torch.stack([each[name] for each in outputs])

    return ShadowOutputs(
        logits=stacked("logits"),
        membership=membership,
        targets=data.targets,
        digests=data.digests,
        population=shared.population,
        population_logits=None if shared.population is None else stacked("population_logits"),
        population_read=(data.population_targets, data.population),
        store=shared.store,
        views=shared.views,
        view_logits=stacked("view_logits") if shared.views else None,
        recipe=shared.recipe,
    )
