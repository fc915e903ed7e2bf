"""LiRA: ``lira`` against a Python loop over examples, as common implementations of the attack have it.

The loop takes numpy's mean and standard deviation of an example's IN and OUT signals and SciPy's log density. It is
timed on a tenth of the examples and its time multiplied by ten, since it has no cost that is shared between examples.

    python benchmarks/lira_speed.py
"""

from __future__ import annotations

import numpy as np
import torch
from common import Row, best_of, run, speedup
from numpy.typing import NDArray
from scipy.stats import norm

from lightning_cwrf.attacks import lira
from lightning_cwrf.shadows import balanced_membership

EXAMPLES, SHADOWS = 50_000, 64
SAMPLE = 5_000
ROUNDS = 10


def loop(target: NDArray[np.float64], shadows: NDArray[np.float64], membership: NDArray[np.bool_]) -> list[float]:
    """Scores of the examples one by one; ``shadows`` and ``membership`` are ``(n, k)``, a row per example."""
    scores = []
    for signal, row, inside in zip(target, shadows, membership, strict=True):
        signals_in, signals_out = row[inside], row[~inside]
        # The unbiased deviation, as in the library; ddof=0 would cost the same.
        log_in = norm.logpdf(signal, np.mean(signals_in), np.std(signals_in, ddof=1) + 1e-30)
        log_out = norm.logpdf(signal, np.mean(signals_out), np.std(signals_out, ddof=1) + 1e-30)
        scores.append(log_in - log_out)
    return scores


def benchmark() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    membership = balanced_membership(SHADOWS, EXAMPLES, seed=0)
    # A model that was trained with an example gives it a higher signal.
    shadows = torch.randn(SHADOWS, EXAMPLES, generator=generator, dtype=torch.float64) + membership
    target = torch.randn(EXAMPLES, generator=generator, dtype=torch.float64)
    # Rows of examples, contiguous: the layout that suits the loop.
    rows = [array[:SAMPLE].contiguous().numpy() for array in (target, shadows.T, membership.T)]

    ours, theirs = best_of(
        ROUNDS, lambda: lira(target, shadows, membership, variance="per_example"), lambda: loop(*rows)
    )
    found = lira(target, shadows, membership, variance="per_example")[:SAMPLE]
    # An absolute tolerance too: where both densities are nearly equal, their difference has few digits left.
    torch.testing.assert_close(found, torch.tensor(loop(*rows), dtype=torch.float64), rtol=1e-6, atol=1e-9)
    name = f"lira: {EXAMPLES:,} examples × {SHADOWS} shadow models"
    scale = EXAMPLES // SAMPLE
    against = f"loop over examples ({SAMPLE:,} timed, × {scale})"
    return [speedup(name, ours, against, theirs * scale, at_least=100)]


if __name__ == "__main__":
    run(benchmark, __doc__)
