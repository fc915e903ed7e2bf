"""How often the intervals hold the truth, and how wide they are beside those of somebody who knows more.

Scores are Gaussian: members N(separation, 1), non-members N(0, 1), so every true value is known. A second table is of
``shadow_interval``, over simulated audits with LiRA. ``docs/numbers.md`` has the output.

    python benchmarks/coverage.py [--replicates 4] [--worlds 400] [--table 2]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from lightning_cwrf.attacks import Evidence, create_attack
from lightning_cwrf.auditing.estimates import with_shadow_intervals
from lightning_cwrf.auditing.values import Estimate
from lightning_cwrf.metrics import AttackAdvantage, MembershipAUROC, TPRAtFPR
from lightning_cwrf.metrics.functional import (
    advantage_interval,
    auroc_interval,
    fewest_nonmembers,
    mean_difference_interval,
    mean_interval,
    p1_score,
    proportion_interval,
    tpr_interval,
)
from lightning_cwrf.metrics.functional.roc import ScoreCounts
from lightning_cwrf.shadows import balanced_membership

SEPARATIONS = (0.0, 0.36, 1.2, 2.33, 3.5)
SIZES = {50: 2000, 300: 1000, 1000: 600, 10_000: 200}  # examples per side, and replicates
FPRS = (1e-2, 1e-3)
CONFIDENCE = 0.95
ACCURACY = 0.8
_Z = stats.norm.ppf((1 + CONFIDENCE) / 2)


class Measured(NamedTuple):
    """Intervals of one measure in one cell: the truth, the bounds ``(r,)``, and an oracle's width if there is one."""

    truth: float
    low: Tensor
    high: Tensor
    oracle: float | None = None

    @property
    def held(self) -> Tensor:
        return (self.low <= self.truth) & (self.truth <= self.high)

    @property
    def width(self) -> float:
        return float((self.high - self.low).mean())


def draw(separation: float, n: int, replicates: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores of members and of non-members, each ``(replicates, n)``."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, replicates, n, generator=generator, dtype=torch.float64)
    return scores[0] + separation, scores[1]


def counts_of(members: Tensor, nonmembers: Tensor) -> ScoreCounts:
    """One step per score; there are no ties."""
    scores, order = torch.cat([members, nonmembers], 1).sort(1, descending=True)
    inside = (order < members.shape[1]).double()
    return ScoreCounts(scores, inside, 1 - inside)


def measure(separation: float, n: int, replicates: int, seed: int) -> dict[str, Measured]:
    """Every measure's intervals in one cell. Test accuracy is of the non-members; confident ones are right."""
    members, nonmembers = draw(separation, n, replicates, seed)
    counts = counts_of(members, nonmembers)
    rate = float(special.ndtr(separation / 2))  # TPR, and 1 − FPR, at the best threshold
    advantage = 2 * rate - 1
    error = math.sqrt(2 * rate * (1 - rate) / n)
    low, high = advantage_interval(counts, CONFIDENCE)
    right = (nonmembers > special.ndtri(1 - ACCURACY)).sum(1)
    worst, best = proportion_interval(right, n, CONFIDENCE)
    return {
        **{
            f"TPR at {fpr:g}": Measured(
                float(special.ndtr(separation + special.ndtri(fpr))), *tpr_interval(counts, fpr, CONFIDENCE)
            )
            for fpr in FPRS
        },
        "AUC": Measured(
            float(special.ndtr(separation / math.sqrt(2))),
            *auroc_interval(counts, CONFIDENCE),
            2 * _Z * _auc_error(separation, n),
        ),
        "advantage": Measured(advantage, low, high, 2 * _Z * error),
        "balanced accuracy": Measured(rate, (1 + low) / 2, (1 + high) / 2, _Z * error),
        "P1": Measured(
            float(p1_score(ACCURACY, advantage)),
            p1_score(worst, high),
            p1_score(best, low),
            2 * _Z * _p1_error(separation, n),
        ),
        "loss gap": Measured(
            separation, *mean_difference_interval(members, nonmembers, CONFIDENCE), 2 * _Z * math.sqrt(2 / n)
        ),
        "loss": Measured(0.0, *mean_interval(nonmembers, CONFIDENCE), 2 * _Z / math.sqrt(n)),
        "accuracy": Measured(ACCURACY, worst, best),
    }


def _auc_error(separation: float, n: int) -> float:
    """The standard deviation of the AUC of n Gaussian scores on each side."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    pair = float((weights * special.ndtr(nodes + separation) ** 2).sum() / weights.sum())  # above two non-members
    auc = float(special.ndtr(separation / math.sqrt(2)))
    return math.sqrt((auc * (1 - auc) + 2 * (n - 1) * (pair - auc**2)) / n**2)


def _p1_error(separation: float, n: int) -> float:
    """The standard deviation of P1, linearised, at a known threshold; accuracy and FPR are of the same examples."""
    rate = float(special.ndtr(separation / 2))
    kept, cut = 2 - 2 * rate, special.ndtri(1 - ACCURACY)
    both = special.ndtr(-max(cut, separation / 2)) - ACCURACY * (1 - rate)  # covariance of right and falsely accused
    along, across = 2 * kept**2 / (ACCURACY + kept) ** 2, -2 * ACCURACY**2 / (ACCURACY + kept) ** 2
    variance = along**2 * ACCURACY * (1 - ACCURACY) + across**2 * 2 * rate * (1 - rate) - 2 * along * across * both
    return math.sqrt(variance / n)


def tpr_oracle(separation: float, n: int, fpr: float, draws: int = 40) -> float:
    """The mean width of the exact interval of somebody who knows that scores are Gaussian, but not how far apart.

    It sees how many members lie above one non-member, the one whose rank fits the FPR, and inverts the distribution of
    that count: binomial, at a TPR that follows from the Beta-distributed FPR of the threshold.
    """
    rng = np.random.default_rng(0)
    rank, tail, at = round(n * fpr) + 1, (1 - CONFIDENCE) / 2, special.ndtri(fpr)
    levels = special.ndtri(stats.beta.ppf((np.arange(400) + 0.5) / 400, rank, n + 1 - rank))
    tprs = special.ndtr(separation + special.ndtri(rng.beta(rank, n + 1 - rank, draws)))

    def solve(found: int, upper: bool) -> float:
        low, high = -12.0, 14.0
        for _ in range(40):
            middle = (low + high) / 2
            tpr = special.ndtr(middle + levels)
            if upper:
                below = special.bdtr(found, n, tpr).mean() > tail
            else:
                below = special.bdtrc(found - 1, n, tpr).mean() < tail
            low, high = (middle, high) if below else (low, middle)
        return float(special.ndtr((low + high) / 2 + at))

    widths = [
        (1.0 if found == n else solve(found, True)) - (0.0 if found == 0 else solve(found, False))
        for found in rng.binomial(n, tprs)
    ]
    return float(np.mean(widths))


def shadow_world(
    seed: int, models: int = 8, examples: int = 200, common: float = 0.0, population: int | None = None
) -> tuple[Evidence, Tensor]:
    """An audit of Gaussian signals; each shadow model moves all its signals by one error, of deviation ``common``.

    The signal is the first of two logits, the other is 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    level, gain = 2 * normal(examples), 2 * torch.rand(examples, generator=generator, dtype=torch.float64)
    is_member = torch.arange(examples) < examples // 2
    membership = balanced_membership(models, examples, seed)
    own = level + gain * is_member + normal(examples)
    strength = 1 + 0.3 * common * normal(models, 1)
    shadows = level + strength * gain * membership + common * normal(models, 1) + normal(models, examples)

    def logits(signal: Tensor) -> Tensor:
        return torch.stack([signal, torch.zeros_like(signal)], -1)

    evidence = Evidence(logits(own), torch.zeros(examples).long(), shadow_logits=logits(shadows), membership=membership)
    if population is not None:
        evidence = replace(
            evidence,
            population_logits=normal(population, 2),
            shadow_population_logits=normal(models, population, 2),
            population_targets=torch.zeros(population).long(),
        )
    return evidence, is_member


def shadow_metrics() -> dict[str, MembershipAUROC | TPRAtFPR | AttackAdvantage]:
    return {"AUC": MembershipAUROC(), "TPR at 0.02": TPRAtFPR(0.02), "advantage": AttackAdvantage()}


def shadow_coverage(
    models: int, common: float, worlds: int, *, examples: int = 800, resamples: int = 40
) -> dict[str, tuple[float, float]]:
    """The share of worlds whose interval over examples, and over shadow models too, holds the mean over worlds."""
    attack, held = create_attack("lira"), {name: [0, 0] for name in shadow_metrics()}
    truth = dict.fromkeys(held, 0.0)
    many = max(40, worlds // 4)
    for seed in range(many):  # large ones: the measures' own bias fades with the number of examples
        evidence, is_member = shadow_world(1_000_000 + seed, models, 8000, common)
        for name, value in _values(attack(evidence), is_member).items():
            truth[name] += value.value / many
    for seed in range(worlds):
        evidence, is_member = shadow_world(seed, models, examples, common)
        found = _values(attack(evidence), is_member)
        found = with_shadow_intervals(
            found, attack, evidence, is_member, {**shadow_metrics()}, CONFIDENCE, resamples, seed
        )
        for name, e in found.items():
            assert e.shadow_interval is not None
            for i, (low, high) in enumerate((e.interval, e.shadow_interval)):
                held[name][i] += low <= truth[name] <= high
    return {name: (alone / worlds, wide / worlds) for name, (alone, wide) in held.items()}


def _values(scores: Tensor, is_member: Tensor) -> dict[str, Estimate]:
    found = {}
    for name, metric in shadow_metrics().items():
        metric.update(scores, is_member)
        found[name] = Estimate(float(metric.compute()), metric.interval(CONFIDENCE))
    return found


def _rows(replicates: int) -> Iterator[str]:
    names = None
    for n, few in SIZES.items():
        for separation in SEPARATIONS:
            cell = measure(separation, n, replicates * few, seed=n + round(100 * separation))
            if names is None:
                names = list(cell)
                yield f"| n | separation | {' | '.join(names)} |"
                yield f"|{'---|' * (len(names) + 2)}"
            shown = []
            for name, measured in cell.items():
                oracle = measured.oracle
                if name.startswith("TPR"):
                    oracle = tpr_oracle(separation, n, float(name.split()[-1]))
                text = f"{float(measured.held.double().mean()):.3f}"
                text += "" if oracle is None else f", {measured.width / oracle:.2f}×"
                if name.startswith("TPR") and n < fewest_nonmembers(float(name.split()[-1]), CONFIDENCE):
                    text += " (upper)"
                shown.append(text)
            yield f"| {n:,} | {separation:g} | {' | '.join(shown)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--replicates", type=int, default=4, help=f"times {tuple(SIZES.values())}")
    parser.add_argument("--worlds", type=int, default=400, help="simulated audits per row of the second table")
    parser.add_argument("--table", type=int, choices=(1, 2), help="only this one")
    arguments = parser.parse_args()
    if arguments.table != 2:
        print_examples(arguments.replicates)
    if arguments.table != 1:
        print_shadows(arguments.worlds)


def print_examples(replicates: int) -> None:
    print("Coverage, and mean width over the oracle's; (upper): no lower bound can be shown there.\n")
    for row in _rows(replicates):
        print(row, flush=True)


def print_shadows(worlds: int) -> None:
    print(
        "\n| shadow models | shared error | measure | over examples | over shadow models too |\n|---|---|---|---|---|"
    )
    for models in (8, 32):
        for common in (0.0, 0.5, 1.5):
            for name, (alone, wide) in shadow_coverage(models, common, worlds).items():
                print(f"| {models} | {common:g} | {name} | {alone:.3f} | {wide:.3f} |", flush=True)


if __name__ == "__main__":
    main()
