"""The victim of the example, trained in a bare loop, and attacks on it, each made once."""

import functools
import sys
from pathlib import Path

from lightning_cwrf.data import isolated_rng
from tests.helpers import load_benchmark

sys.path.append(str(Path(__file__).parents[2] / "examples"))


@functools.cache
def benchmark():
    return load_benchmark("reconstruction")


@functools.cache
def victim(seed=0, steps=4000):
    """Finished; do not change it."""
    with isolated_rng():
        return benchmark().victim(seed, steps, benchmark().sides(seed))


@functools.cache
def pool(seed=0):
    return benchmark().pool(seed)


@functools.cache
def attacked(scale=0.03, seed=0, steps=4000):
    return benchmark().attack(victim(seed, steps), seed, benchmark().sides(seed), scale=scale)
