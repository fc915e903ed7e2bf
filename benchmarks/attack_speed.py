"""Every vectorised attack on 50,000 examples and 256 shadow models: time, and peak memory beyond the signals.

The attacks that train a network are timed on fewer. LiRA is measured from logits too, of many classes and gathered from
a pool: the logits themselves are the floor of its memory. LiRA and RMIA are called again on evidence whose signals are
cached, against a call that computes them, as in every audit of several attacks and in every replicate of a bootstrap.

The floor is one pass over the shadow models' signals that reads each once (their mean per example).

    python benchmarks/attack_speed.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from common import Row, best_of, extra_memory, in_fresh_process, overhead, run, seconds, size, speedup
from torch import Tensor

from lightning_cwrf.attacks import (
    Evidence,
    PerModel,
    attack_r,
    bavaria,
    calibrated,
    create_attack,
    lira,
    neural_attack,
    quantile_regression,
    rmia,
)
from lightning_cwrf.shadows import balanced_membership

EXAMPLES, SHADOWS, POPULATION, CLASSES = 50_000, 256, 10_000, 10


def calls() -> tuple[Tensor, dict[str, Callable[[], Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    membership = balanced_membership(SHADOWS, EXAMPLES, seed=0)
    target, shadows = draw(EXAMPLES), draw(SHADOWS, EXAMPLES)
    p, q = target.sigmoid(), shadows.sigmoid()
    z, zs = draw(POPULATION).sigmoid(), draw(SHADOWS, POPULATION).sigmoid()
    classes = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    return shadows, {
        "lira": lambda: lira(target, shadows, membership),
        "lira, offline": lambda: lira(target, shadows, membership, online=False),
        "bavaria": lambda: bavaria(target, shadows, membership),
        "rmia": lambda: rmia(p, q, membership, z, zs),
        "rmia, offline": lambda: rmia(p, q, membership, z, zs, online=False, offline_a=0.3),
        "rmia, offline, a tuned": lambda: rmia(p, q, membership, z, zs, online=False),
        "attack_r": lambda: attack_r(target.exp(), shadows, membership),
        "calibrated": lambda: calibrated(target, classes, shadows, membership, per_class=False),
        "calibrated per class": lambda: calibrated(target, classes, shadows, membership),
    }


def learned() -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    few, k = 5_000, 64
    logits = torch.randn(1 + k, few, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (few,), generator=generator)
    images = torch.randn(EXAMPLES + POPULATION, 64, generator=generator)
    signal = torch.randn(EXAMPLES + POPULATION, generator=generator)
    ends = (signal[:EXAMPLES], images[:EXAMPLES], signal[EXAMPLES:], images[EXAMPLES:])
    return {
        f"neural: {few:,} × {k}": lambda: neural_attack(logits[0], labels, logits[1:], balanced_membership(k, few)),
        f"quantile_regression: {EXAMPLES:,}, population {POPULATION:,}": lambda: quantile_regression(*ends),
    }


def memory(name: str) -> int:
    """Peak memory of one call beyond its inputs; to be run in a process of its own."""
    return extra_memory({**calls()[1], **learned()}[name])


def by_logits() -> tuple[Tensor, Callable[[], Tensor]]:
    """LiRA on 20,000 examples of a pool, 64 models and 100 classes, as an audit runs it."""
    n, k, classes = 20_000, 64, 100
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(k, n, classes)
    for each in logits:  # no temporaries that the measure would find still free
        each.normal_(generator=generator)
    evidence = Evidence(
        torch.randn(n, classes, generator=generator),
        torch.randint(classes, (n,), generator=generator),
        shadow_logits=PerModel(logits, torch.randperm(n, generator=generator)),
        membership=balanced_membership(k, n, seed=0),
    )
    attack = create_attack("lira")
    return logits, lambda: attack(evidence)


def memory_by_logits() -> int:
    return extra_memory(by_logits()[1])


def repeated() -> list[Row]:
    """A further call of LiRA and RMIA on the same evidence, from the logits of 10 classes."""
    n, k, m = 20_000, 64, 5_000
    generator = torch.Generator().manual_seed(0)
    evidence = Evidence(
        torch.randn(n, CLASSES, generator=generator),
        torch.randint(CLASSES, (n,), generator=generator),
        shadow_logits=torch.randn(k, n, CLASSES, generator=generator),
        membership=balanced_membership(k, n, seed=0),
        population_logits=torch.randn(m, CLASSES, generator=generator),
        population_targets=torch.randint(CLASSES, (m,), generator=generator),
        shadow_population_logits=torch.randn(k, m, CLASSES, generator=generator),
    )
    rows = []
    for name in ("lira", "rmia"):
        attack = create_attack(name)
        again, first = best_of(5, partial(attack, evidence), lambda attack=attack: attack(replace(evidence)))
        rows.append(speedup(f"{name} again, signals cached: {n:,} × {k}", again, "the first call", first, at_least=10))
    return rows


def benchmark() -> list[Row]:
    shadows, attacks = calls()
    *times, floor = best_of(3, *attacks.values(), lambda: shadows.mean(0))
    rows = []
    for name, time in zip(attacks, times, strict=True):
        what = f"{name}: {EXAMPLES:,} × {SHADOWS}"
        peak = in_fresh_process(memory, name)
        rows.append(overhead(what, time, "one pass over the shadow signals", floor))
        rows.append(overhead(f"{what}: peak memory", peak, "the shadow signals", shadows.nbytes, show=size))
    rows += repeated()
    logits, call = by_logits()
    what = "lira from logits: 20,000 × 64 × 100 classes"
    rows.append(Row(what, seconds(best_of(1, call)[0])))
    peak = in_fresh_process(memory_by_logits)
    rows.append(overhead(f"{what}: peak memory", peak, "the logits", logits.nbytes, 0.2, show=size))
    del logits, call
    for name, call in learned().items():
        (time,) = best_of(1, call)
        rows.append(Row(name, seconds(time)))
        rows.append(Row(f"{name}: peak memory", size(in_fresh_process(memory, name))))
    return rows


if __name__ == "__main__":
    run(benchmark, __doc__)
