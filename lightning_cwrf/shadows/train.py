"""Training shadow models and keeping their signals."""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import joblib
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from lightning_cwrf.classification import split_batch
from lightning_cwrf.data import example_digests, isolated_rng
from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.shadows.identity import identity
from lightning_cwrf.shadows.membership import balanced_membership
from lightning_cwrf.vanilla import capture

Recipe: TypeAlias = Callable[..., nn.Module]
"""``recipe(train_subset, seed)``, or ``recipe(train_subset, seed, start)`` with a start: returns the trained module."""

_FORMAT = "lightning_cwrf.shadow/1"


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
        key: identity of pool, population, recipe and seed.
        folder: where the models' files are.
    """

    logits: Tensor
    membership: Tensor
    targets: Tensor
    digests: list[bytes]
    population: Dataset[Any] | None
    population_logits: Tensor | None
    key: str
    folder: Path = field(repr=False)

    def __len__(self) -> int:
        return len(self.logits)

    def weights(self, model: int) -> dict[str, Tensor]:
        """The state dict of one shadow model; :func:`train_shadows` must have run with ``keep_weights=True``."""
        path = _weights_path(self.folder, model)
        if not path.is_file():
            raise FileNotFoundError(f"no weights of shadow model {model} in {self.folder}; use keep_weights=True.")
        return load_file(path)


@dataclass(frozen=True)
class _Job:
    """One shadow model to train; it goes to a worker process."""

    model: int
    recipe: Recipe
    pool: Dataset[Any]
    population: Dataset[Any] | None
    members: list[int]
    seed: int
    key: str
    folder: Path
    start: Path | None
    keep_weights: bool
    threads: int | None


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
        raise ValueError(
            f"{common} examples of the population are in the pool; no shadow model may see the population."
        )
    if start is not None and start.digests != digests:
        raise ValueError("start was trained on another pool; shadow models go on only from the same pool.")
    membership = balanced_membership(n, len(digests), seed)
    if start is not None and (len(start) < n or not torch.equal(start.membership[:n], membership)):
        raise ValueError("start has too few models or another seed; train it with the same n and seed.")
    key = identity(
        [_FORMAT, recipe, digests, targets, population_digests, seed, start.key if start is not None else None]
    )[:32]
    folder = Path(store) / key
    folder.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(n) if not _is_stored(folder, i, key, keep_weights)]
    if missing and start is not None:
        for i in missing:
            start.weights(i)
    workers = min(workers or os.cpu_count() or 1, max(len(missing), 1))
    jobs = [
        _Job(
            model=i,
            recipe=recipe,
            pool=pool,
            population=population,
            members=membership[i].nonzero().flatten().tolist(),
            seed=model_seed(seed, i),
            key=key,
            folder=folder,
            start=_weights_path(start.folder, i) if start is not None else None,
            keep_weights=keep_weights,
            threads=max(1, (os.cpu_count() or 1) // workers) if workers > 1 else None,
        )
        for i in missing
    ]
    with tqdm(total=n, initial=n - len(jobs), desc="shadow models", disable=not progress) as bar:
        failures = []
        for failure in _run(jobs, workers):
            bar.update()
            if failure is not None:
                failures.append(failure)
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {n} shadow models failed; the others are kept in {folder} and are not trained again.\n"
            + "\n".join(failures)
        )
    return _load(folder, key, n, membership, targets, digests, population)


def model_seed(seed: int, model: int) -> int:
    """The seed of one shadow model; it depends on the run's seed and the model's number alone."""
    return int(np.random.SeedSequence([seed, model, 1]).generate_state(1)[0])


def _run(jobs: list[_Job], workers: int) -> Iterator[str | None]:
    if workers == 1:
        yield from map(_train_one, jobs)
    elif jobs:
        yield from joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)(
            joblib.delayed(_train_one)(job) for job in jobs
        )


def _train_one(job: _Job) -> str | None:
    """Train and store one model; an exception comes back as text, so that it stops no other model."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    try:
        with isolated_rng(), torch.random.fork_rng():
            random.seed(job.seed)
            np.random.seed(job.seed)  # noqa: NPY002 - the user's recipe may draw from the global state
            torch.manual_seed(job.seed)
            subset = Subset(job.pool, job.members)
            start = () if job.start is None else (load_file(job.start),)
            model = job.recipe(subset, job.seed, *start)
            if not isinstance(model, nn.Module):
                raise TypeError(f"the recipe returned a {type(model).__name__}; it must return the trained module.")
            _store(job, model)
    except Exception:
        return f"shadow model {job.model} (seed {job.seed}):\n{traceback.format_exc()}"
    return None


def _store(job: _Job, model: nn.Module) -> None:
    tensors = {"logits": collect_outputs(model, job.pool, name="pool").logits}
    if job.population is not None:
        tensors["population_logits"] = collect_outputs(model, job.population, name="population").logits
    if job.keep_weights:  # first, so that signals never stand there without the weights that were asked for
        _save(capture(model), _weights_path(job.folder, job.model), {})
    _save(tensors, _signals_path(job.folder, job.model), {"format": _FORMAT, "key": job.key})


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file({name: value.clone() for name, value in tensors.items()}, part, metadata=metadata)
    part.replace(path)


def _signals_path(folder: Path, model: int) -> Path:
    return folder / f"model-{model:04d}.safetensors"


def _weights_path(folder: Path, model: int) -> Path:
    return folder / f"model-{model:04d}.weights.safetensors"


def _is_stored(folder: Path, model: int, key: str, keep_weights: bool) -> bool:
    path = _signals_path(folder, model)
    if not path.is_file() or (keep_weights and not _weights_path(folder, model).is_file()):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and this one model is trained again.") from error
    if metadata.get("key") != key:
        raise ValueError(f"{path} belongs to another run; delete it, or choose another store.")
    return True


def _load(
    folder: Path,
    key: str,
    n: int,
    membership: Tensor,
    targets: Tensor,
    digests: list[bytes],
    population: Dataset[Any] | None,
) -> ShadowSignals:
    stored = [load_file(_signals_path(folder, i)) for i in range(n)]
    return ShadowSignals(
        logits=torch.stack([tensors["logits"] for tensors in stored]),
        membership=membership,
        targets=targets,
        digests=digests,
        population=population,
        population_logits=(
            torch.stack([tensors["population_logits"] for tensors in stored]) if population is not None else None
        ),
        key=key,
        folder=folder,
    )


def _read(data: Dataset[Any], name: str) -> tuple[list[bytes], Tensor]:
    """Digests and targets of every example; the first batch is read twice to see that the content stays."""
    loader = DataLoader(data, batch_size=256)
    first = next(iter(loader), None)
    if first is None:
        raise ValueError(f"the {name} is empty.")
    digests: list[bytes] = []
    targets = []
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
