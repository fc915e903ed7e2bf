"""Choosing the critical weights: ``WeightMask.top`` against ``torch.topk`` (and ``torch.sort``) on 100 million scores.

The scores are |g·θ| of normal g and θ, which spread over many powers of two like real ones. Memory is the peak of a
fresh process with the scores, above its memory just before the call.

    python benchmarks/top_scores.py
"""

from __future__ import annotations

import torch
from common import Row, best_of, extra_memory, in_fresh_process, overhead, run, size, verdict
from torch import Tensor

from lightning_cwrf.weights.masks import WeightMask

COUNT, RATE = 100_000_000, 0.03
K = round(RATE * COUNT)
ROUNDS = 5
MEMORY_LIMIT = 0.5e9


def make_scores() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(COUNT, generator=generator)
    return scores.mul_(torch.randn(COUNT, generator=generator)).abs_()


def top(scores: Tensor) -> Tensor:
    return WeightMask.top({"w": scores}, RATE).masks["w"]


def topk(scores: Tensor) -> Tensor:
    return torch.topk(scores, K, sorted=False).values


def memory(which: str) -> int:
    """Peak memory of one call beyond the scores themselves; to be run in a process of its own."""
    scores = make_scores()
    call = {"top": top, "topk": topk}[which]
    return extra_memory(lambda: call(scores))


def benchmark() -> list[Row]:
    our_memory, their_memory = (in_fresh_process(memory, which) for which in ("top", "topk"))
    scores = make_scores()
    mask = top(scores)
    assert int(mask.sum()) == K
    assert scores[mask].min() == topk(scores).min()
    del mask

    ours, theirs = best_of(ROUNDS, lambda: top(scores), lambda: topk(scores))
    (sort,) = best_of(1, lambda: torch.sort(scores))  # once: it is slow and has no target
    name = f"WeightMask.top, {RATE:.0%} of {COUNT / 1e6:.0f} M scores"
    peak = overhead(
        f"{name}: peak memory beyond the scores", our_memory, "torch.topk, likewise", their_memory, show=size
    )
    limit = {"target": f"ours ≤ {MEMORY_LIMIT / 1e9:.1f} GB", "met": verdict(our_memory <= MEMORY_LIMIT)}
    return [
        overhead(name, ours, "torch.topk(sorted=False)", theirs, at_most=0.3),
        overhead(name, ours, "torch.sort", sort),
        Row(**{**vars(peak), **limit}),
    ]


if __name__ == "__main__":
    run(benchmark, __doc__)
