"""RMIA: ``rmia`` against a Python loop over examples, as common implementations of the attack have it.

The loop is given the ratios Pr(x|θ)/Pr(x) of examples and population, and compares each example with the whole
population: O(n·m). The library sorts the population's ratios once and searches. The target is for that search alone;
the whole call, with its checks and the ratios, stands beside it. Memory is the call's peak in a fresh process, beside
the n × m matrix of ratios that fully vectorised implementations build (its size is computed, not measured).

    python benchmarks/rmia_speed.py
"""

from __future__ import annotations

import numpy as np
import torch
from common import Row, best_of, extra_memory, in_fresh_process, overhead, run, size, speedup
from numpy.typing import NDArray
from torch import Tensor

from lightning_cwrf.attacks import rmia
from lightning_cwrf.shadows import balanced_membership

EXAMPLES, POPULATION, SHADOWS = 50_000, 10_000, 8
GAMMA = 2.0
ROUNDS = 5


def make_signals() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Probabilities of the true class, in the order of rmia's arguments."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(2).sigmoid_()

    membership = balanced_membership(SHADOWS, EXAMPLES, seed=0)
    return draw(EXAMPLES), draw(SHADOWS, EXAMPLES), membership, draw(POPULATION), draw(SHADOWS, POPULATION)


def memory() -> int:
    """Peak memory of one call beyond its inputs; to be run in a process of its own."""
    signals = make_signals()
    return extra_memory(lambda: rmia(*signals, gamma=GAMMA, break_ties=False))


def loop(ratio_x: NDArray[np.float64], ratio_z: NDArray[np.float64]) -> list[np.float64]:
    return [np.mean(ratio_x[i] / ratio_z >= GAMMA) for i in range(len(ratio_x))]


def search(ratio_x: Tensor, ratio_z: Tensor) -> Tensor:
    """The last lines of ``rmia``: what the loop's place is taken by."""
    bounds = (GAMMA * ratio_z).sort().values
    return torch.searchsorted(bounds, ratio_x, right=True).to(torch.float64) / len(bounds)


def benchmark() -> list[Row]:
    peak = in_fresh_process(memory)
    signals = make_signals()
    target, shadows, _, population_target, population_shadows = signals
    ratio_x, ratio_z = target / shadows.mean(0), population_target / population_shadows.mean(0)
    arrays = ratio_x.numpy(), ratio_z.numpy()

    whole, alone, theirs = best_of(
        ROUNDS,
        lambda: rmia(*signals, gamma=GAMMA, break_ties=False),
        lambda: search(ratio_x, ratio_z),
        lambda: loop(*arrays),
    )
    expected = torch.tensor(np.array(loop(*arrays)))
    torch.testing.assert_close(rmia(*signals, gamma=GAMMA, break_ties=False), expected, rtol=0, atol=0)
    torch.testing.assert_close(search(ratio_x, ratio_z), expected, rtol=0, atol=0)
    matrix = EXAMPLES * POPULATION * 8
    name = f"rmia: {EXAMPLES:,} examples × {POPULATION:,} population"
    return [
        speedup(f"{name}: the search alone", alone, "loop over examples", theirs, at_least=100),
        speedup(f"{name}: the whole call, {SHADOWS} shadow models", whole, "the same loop, ratios given", theirs),
        overhead(f"{name}: peak memory beyond the inputs", peak, "n × m float64 matrix (computed)", matrix, show=size),
    ]


if __name__ == "__main__":
    run(benchmark, __doc__)
