"""Work in parallel processes, of this machine or of a cluster, with its cores and GPUs divided among them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import joblib
import torch
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError
from joblib.parallel import get_active_backend

T = TypeVar("T")

ATTEMPTS = 3
"""How often work is tried if its worker process is lost."""

_EVERY = 1.0
"""Seconds between two checks that the parent is alive."""

_CLUSTERS = ("ray", "distributed")  # their exceptions are about workers: those of the work are returned as text


@dataclass(frozen=True)
class Share:
    """The part of this machine that one worker process may use.

    Attributes:
        threads: of torch; None: unchanged.
        gpus: of all worker processes of this machine; each takes one of them.
        parent: the process that the worker must not outlive; None: the cluster ends its workers.
    """

    threads: int | None = None
    gpus: tuple[str, ...] = ()
    parent: int | None = None

    def take(self) -> None:
        """Called in the worker process, before its first work touches a GPU."""
        if self.parent is not None:
            _end_with(self.parent)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it shares the terminal with the others
        _keep_freed_memory()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.gpus and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu_of(multiprocessing.current_process().name)

    def gpu_of(self, process: str) -> str:
        """The GPU of a worker process by its name, which ends in a number that counts up.

        >>> [Share(gpus=("0", "3")).gpu_of(f"LokyProcess-{i}") for i in (1, 2, 3)]
        ['0', '3', '0']
        """
        number = process.rpartition("-")[2]
        return self.gpus[(int(number) - 1) % len(self.gpus) if number.isdigit() else 0]


def run(
    work: Callable[[T, Share | None], Any],
    items: Sequence[T],
    workers: int | None,
    *,
    undone: Callable[[T], bool],
    on_done: Callable[[], Any],
) -> tuple[list[Any], list[tuple[T, str]]]:
    """Do ``work(item, share)`` for every item, on joblib's active backend; what is lost with a worker is repeated.

    ``work`` must return its errors instead of raising them; ``share`` is None in this process. ``workers`` are
    processes; None: as ``joblib.parallel_config`` says, else one per GPU, or per core.

    Returns:
        What ``work`` returned, in any order; and the items whose workers were lost every time, with the error.
    """
    backend, configured = get_active_backend()
    here = isinstance(backend, joblib.parallel.BACKENDS["loky"])  # joblib's default: processes of this machine
    cores, gpus = os.cpu_count() or 1, visible_gpus()
    workers = workers or configured or ((len(gpus) or cores) if here else -1)
    if here:
        workers = min(joblib.effective_n_jobs(workers), len(items))
        if workers <= 1:
            outcomes = []
            for item in items:
                outcomes.append(work(item, None))
                on_done()
            return outcomes, []
    share = Share(max(1, cores // workers), gpus, os.getpid()) if here else Share()
    for attempt in range(1, ATTEMPTS + 1):
        parallel = _Parallel(n_jobs=workers, batch_size=1)
        parallel.on_done = on_done
        try:
            return list(parallel(joblib.delayed(work)(item, share) for item in items)), []
        except Exception as error:
            if not (isinstance(error, TerminatedWorkerError) or type(error).__module__.split(".")[0] in _CLUSTERS):
                raise
            items, why = [item for item in items if undone(item)], str(error)
            on_done()
            if not items:
                break
            if attempt < ATTEMPTS:
                warnings.warn(
                    f"a worker process was killed; {len(items)} trainings are repeated. If memory ran out, pass fewer "
                    "workers.",
                    stacklevel=3,
                )
    return [], [(item, why) for item in items]


class _Parallel(joblib.Parallel):  # type: ignore[misc]
    on_done: Callable[[], Any]

    def print_progress(self) -> None:
        """Called by joblib after every item, on every backend."""
        self.on_done()


def end_workers() -> None:
    """End the worker processes of this machine, which joblib would reuse; the next work starts new ones."""
    get_reusable_executor().shutdown(wait=True)


@functools.cache
def _end_with(parent: int) -> None:
    """End this process when its parent is gone, even if that was killed.

    A thread polls, which works on every system but Windows, where a process keeps its parent's number. Linux' own
    signal (PR_SET_PDEATHSIG) would come when the thread of the parent that started this process ends.
    """
    if sys.platform == "win32":
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="ends with its parent").start()


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them, without initialising CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return tuple(named.split(",")[:count] if named else map(str, range(count)))


def _keep_freed_memory() -> None:
    """Keep freed memory: glibc would return the pages of large gradients to the system in every step.

    This is a worker process of ours, and ends with the run.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the largest it takes
