"""A whole audit of given outputs by the loss attack, LiRA and RMIA, with every measure: time and peak memory.

The floor is the three attacks without any measure. Data and models are random; nothing depends on what they show.

    python benchmarks/audit_speed.py
"""

from __future__ import annotations

import torch
from common import Row, best_of, extra_memory, in_fresh_process, overhead, run, size
from torch.utils.data import TensorDataset

from lightning_cwrf.auditing import AuditResult, audit_outputs
from lightning_cwrf.auditing.run import attack_scores
from lightning_cwrf.outputs import ModelOutputs
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership

SHADOWS, POPULATION, CLASSES = 64, 5_000, 2
SIZES = (60_000, 200_000)  # members and non-members together


def outputs(examples: int) -> tuple[ModelOutputs, ModelOutputs, ShadowOutputs, ModelOutputs]:
    generator = torch.Generator().manual_seed(0)
    total = examples + POPULATION
    logits = torch.randn(total, CLASSES, generator=generator)
    targets = torch.randint(CLASSES, (total,), generator=generator)
    names = [i.to_bytes(4, "big") for i in range(total)]
    ends = (slice(0, examples // 2), slice(examples // 2, examples), slice(examples, total))
    members, nonmembers, population = (ModelOutputs(logits[end], targets[end], names[end]) for end in ends)
    shadows = ShadowOutputs(
        torch.randn(SHADOWS, examples, CLASSES, generator=generator),
        balanced_membership(SHADOWS, examples, seed=0),
        targets[:examples],
        names[:examples],
        population=TensorDataset(torch.zeros(POPULATION, 1)),
        population_logits=torch.randn(SHADOWS, POPULATION, CLASSES, generator=generator),
        store=None,
    )
    return members, nonmembers, shadows, population


def audited(given: tuple[ModelOutputs, ModelOutputs, ShadowOutputs, ModelOutputs]) -> AuditResult:
    members, nonmembers, shadows, population = given
    return audit_outputs(members, nonmembers, shadows=shadows, population=population)


def memory(examples: int) -> int:
    """Peak memory of one audit beyond its inputs; to be run in a process of its own."""
    given = outputs(examples)
    return extra_memory(lambda: audited(given))


def benchmark() -> list[Row]:
    rows = []
    for examples in SIZES:
        given = outputs(examples)
        members, nonmembers, shadows, population = given
        whole, attacks = best_of(
            1,
            lambda given=given: audited(given),
            lambda m=members, n=nonmembers, s=shadows, p=population: attack_scores(m, n, shadows=s, population=p),
        )
        what = f"audit of {examples:,} × {SHADOWS}"
        rows.append(overhead(what, whole, "its attacks alone", attacks))
        peak = in_fresh_process(memory, examples)
        rows.append(overhead(f"{what}: peak memory", peak, "the shadow signals", shadows.logits.nbytes, show=size))
    return rows


if __name__ == "__main__":
    run(benchmark, __doc__)
