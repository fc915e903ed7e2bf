"""LiRA and RMIA on 1,000,000 examples and 64 shadow models, whose logits are a file of 1.28 GB (10 classes, float16).

The file is mapped into memory (NumPy), so its pages count in the peak too, which is that of a process of its own.

    python benchmarks/large_pool.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import Row, extra_memory, in_fresh_process, overhead, run, seconds, size

from lightning_cwrf import audit_logits
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership

EXAMPLES, SHADOWS, POPULATION, CLASSES = 1_000_000, 64, 10_000, 10
LIMIT = 4e9


def targets(examples: int) -> np.ndarray:
    return np.random.default_rng(0).integers(CLASSES, size=examples)


def write(folder: Path) -> None:
    """The shadow models' logits on the pool and on the population; members have a larger one of their class."""
    membership = balanced_membership(SHADOWS, EXAMPLES, seed=0).numpy()
    for name, examples in (("pool", EXAMPLES), ("population", POPULATION)):
        shape, labels = (SHADOWS, examples, CLASSES), targets(examples)
        file = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
        for model in range(SHADOWS):
            rows = np.random.default_rng(model).standard_normal((examples, CLASSES), np.float32)
            rows[np.arange(examples), labels] += 2 + (membership[model] if name == "pool" else 0)
            file[model] = rows
        file.flush()


def audit(folder: Path) -> None:
    """One more model of the same kind, trained on the first half."""
    logits, others = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pool", "population"))
    membership = balanced_membership(SHADOWS, EXAMPLES, seed=0)
    known, outside, half = targets(EXAMPLES), targets(POPULATION), EXAMPLES // 2
    shadows = ShadowOutputs.from_arrays(logits, membership, known, population=(others, outside))
    rows = np.random.default_rng(SHADOWS).standard_normal((EXAMPLES + POPULATION, CLASSES), np.float32)
    rows[np.arange(len(rows)), np.concatenate([known, outside])] += 2
    rows[np.arange(half), known[:half]] += 1
    result = audit_logits(
        members=(rows[:half], known[:half]),
        nonmembers=(rows[half:EXAMPLES], known[half:]),
        shadows=shadows,
        population=(rows[EXAMPLES:], outside),
        attacks=["lira", "rmia"],
    )
    assert min(result.values()[f"{name}/auroc"] for name in ("lira", "rmia")) > 0.6


def measure(folder: Path) -> tuple[int, float]:
    torch.set_num_threads(1)
    began = time.perf_counter()
    return extra_memory(lambda: audit(folder)), time.perf_counter() - began


def benchmark() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        peak, took = in_fresh_process(measure, Path(name))
    what = f"lira and rmia: {EXAMPLES:,} × {SHADOWS}, audit_logits, one thread"
    return [Row(what, seconds(took)), overhead(f"{what}: peak memory", peak, "the limit", LIMIT, 1.0, show=size)]


if __name__ == "__main__":
    run(benchmark, __doc__)
