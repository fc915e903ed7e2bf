"""Which shadow models still have to be trained, and in which processes."""

from __future__ import annotations

from collections.abc import Callable

from tqdm.auto import tqdm

from lightning_cwrf.shadows.jobs import OTHER_CODE, Job, names, train
from lightning_cwrf.shadows.workers import ATTEMPTS, end_workers, run


def train_missing(jobs: list[Job], workers: int | None, stack: int, progress: bool) -> None:
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
