"""What an audit says of single examples, where the truth is known; and what a finite pool does to LiRA.

Four simulations:

- Members listed with a false discovery rate: the share of false ones, and of those at risk that are found. Members at
  risk score N(3.5, 1), the others N(0, 1) as the non-members do.
- The risk of each example over models: how often its interval holds the truth, and how often p is at most 5 %. The
  signal is N(separation, 1) with the example, N(0, 1) without it, and the two models of a pair are correlated.

- The spread that comes from the other examples. A "model" is the mean of about n = 100 training examples from N(0, I),
  its signal of x the inner product with x. Twenty audited examples are in by the toss of a coin, the others are drawn
  without replacement from a pool of F · n. The variance of the signal is then 1 − 1/F of that with fresh ones: the
  finite population correction. Shadow models on halves of a pool are the case F = 2.
- The models that attack. Signals that know nothing of membership: each model is attacked with all others (one left
  out), or with those of the other pairs (the pair left out), as audit_recipe does. The AUC over the examples of one
  target, and that over the targets for one example; and the latter of the signals themselves, as in example_risk.

``docs/numbers.md`` has the output.

    python benchmarks/single_examples.py [--runs 40] [--pairs]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy import special
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lightning_cwrf import example_risk, probabilities_to_logits
from lightning_cwrf.attacks import lira, logit_signal
from lightning_cwrf.metrics.functional import benjamini_hochberg, conformal_p_values, membership_auroc, tpr_at_fpr
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership

SIZE, AUDITED, DIMENSION, SHADOWS, FPR = 100, 20, 100, 64, 0.01
OTHERS = SIZE - AUDITED // 2


def draw(factor: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signals ``(SHADOWS + 1, AUDITED)`` of as many models, and their membership; None: the others are fresh."""

    def examples(count: int) -> Tensor:
        return torch.randn(count, DIMENSION, generator=generator)

    audited, pool = examples(AUDITED), examples((factor or 1) * OTHERS)
    signals, flags = [], []
    for _ in range(SHADOWS + 1):
        inside = torch.rand(AUDITED, generator=generator) < 0.5
        chosen = torch.randperm(len(pool), generator=generator)[:OTHERS]
        others = pool[chosen] if factor else examples(OTHERS)
        signals.append(audited @ (audited[inside].sum(0) + others.sum(0)) / SIZE)
        flags.append(inside)
    return torch.stack(signals).double(), torch.stack(flags)


def of_discoveries(runs: int) -> Iterator[str]:
    yield "| examples per side | at risk | `fdr` | false of the listed | its standard error | found at risk |"
    yield "|---|---|---|---|---|---|"
    for size in (200, 1000):
        for share in (0.0, 0.05, 0.3):
            for fdr in (0.05, 0.2):
                found = torch.tensor([discovered(run, size, share, fdr) for run in range(runs)], dtype=torch.float64)
                false, error = float(found[:, 0].mean()), float(found[:, 0].std()) / math.sqrt(runs)
                power = f"{float(found[:, 1].mean()):.2f}" if share else ""
                yield f"| {size} | {share:.0%} | {fdr} | {false:.3f} | {error:.3f} | {power} |"


def discovered(run: int, size: int, share: float, fdr: float) -> tuple[float, float]:
    """The share of false ones among the members that are listed, and the share of those at risk that are."""
    generator = torch.Generator().manual_seed(run)
    at_risk = torch.arange(size) < share * size
    members, others = torch.randn(2, size, generator=generator, dtype=torch.float64)
    chosen = benjamini_hochberg(conformal_p_values(members + 3.5 * at_risk, others)) <= fdr
    false = int((chosen & ~at_risk).sum()) / max(1, int(chosen.sum()))
    return false, int((chosen & at_risk).sum()) / max(1, int(at_risk.sum()))


def of_examples() -> Iterator[str]:
    yield "| models | correlation | AUC | interval holds | width | TPR interval holds | p ≤ 0.05 | listed at 5 % |"
    yield "|---|---|---|---|---|---|---|---|"
    for k in (8, 16, 32, 64):
        for correlation in (0.0, -0.85):
            for separation in (0.0, 1.0, 2.0):
                membership = balanced_membership(k, 3000, 0)
                first, own = torch.randn(2, k // 2, 3000, generator=torch.Generator().manual_seed(k))
                second = correlation * first + math.sqrt(1 - correlation**2) * own
                signals = torch.stack([first, second], 1).reshape(k, 3000) + separation * membership
                targets = torch.ones(3000, dtype=torch.long)
                found = example_risk(ShadowOutputs.from_arrays(signals, membership, targets))
                auc, tpr = special.ndtr(separation / math.sqrt(2)), special.ndtr(separation + special.ndtri(0.1))
                held = float(((found.auroc_low <= auc) & (auc <= found.auroc_high)).double().mean())
                tpr_held = float(((found.tpr_low <= tpr) & (tpr <= found.tpr_high)).double().mean())
                width = float((found.auroc_high - found.auroc_low).mean())
                low = float((found.p_values <= 0.05).double().mean())
                cells = (auc, held, width, tpr_held, low, len(found.at_risk()) / 3000)
                yield f"| {k} | {correlation:g} | {' | '.join(f'{cell:.3f}' for cell in cells)} |"


def of_pools(runs: int) -> Iterator[str]:
    yield "| the other examples are drawn from | LiRA's AUC | if it knew each distribution | TPR at 1 % FPR |"
    yield "|---|---|---|---|"
    for factor in (2, 4, 16, None):
        scores, flags = [], []
        for run in range(runs):
            signals, membership = draw(factor, torch.Generator().manual_seed(run))
            scores.append(lira(signals[0], signals[1:], membership[1:], variance="per_example"))
            flags.append(membership[0])
        both = torch.cat(scores), torch.cat(flags)
        correction = 1 - 1 / factor if factor else 1.0
        # The other audited examples are fresh coins in every case.
        variance = DIMENSION * (OTHERS * correction + (AUDITED - 1) / 4) / SIZE**2
        known = special.ndtr(DIMENSION / SIZE / math.sqrt(variance) / math.sqrt(2))
        name = f"a pool of {factor} n" if factor else "the distribution, anew for each model"
        yield f"| {name} | {membership_auroc(*both):.3f} | {known:.3f} | {tpr_at_fpr(*both, FPR):.3f} |"


def of_attackers(runs: int) -> Iterator[str]:
    yield "| models | attacked with | AUC over examples | AUC over models, of one example | of the signals themselves |"
    yield "|---|---|---|---|---|"
    for k in (8, 16, 64):
        for left_out in ("one left out", "the pair left out"):
            found = torch.tensor([attacked(k, left_out, seed) for seed in range(runs)]).mean(0).tolist()
            yield f"| {k} | {left_out} | {found[0]:.3f} | {found[1]:.3f} | {found[2]:.3f} |"


def attacked(k: int, left_out: str, seed: int, n: int = 200) -> tuple[float, float, float]:
    """Mean AUC over targets, mean AUC over examples, and the latter of the signals."""
    membership = balanced_membership(k, n, seed)
    signals = torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = []
    for i in range(k):
        others = torch.tensor([j for j in range(k) if (j != i if left_out.startswith("one") else j // 2 != i // 2)])
        scores.append(lira(signals[i], signals[others], membership[others], variance="pooled"))
    found = torch.stack(scores)
    of_targets = torch.stack([membership_auroc(s, m) for s, m in zip(found, membership, strict=True)]).mean()
    per_example = [_over_models(each, membership) for each in (found, signals)]
    return float(of_targets), *per_example


def _over_models(scores: Tensor, membership: Tensor) -> float:
    targets = torch.ones(scores.shape[1], dtype=torch.long)
    return float(example_risk(ShadowOutputs.from_arrays(scores, membership, targets)).auroc.mean())


def of_pairs() -> Iterator[str]:
    """Mean correlation of the signals of an example by the two models of a pair, and by those of different pairs."""
    data = load_digits()
    pool = np.random.default_rng(0).permutation(len(data.target))[:600]
    x, y = data.data[pool] / 16, data.target[pool]
    membership = balanced_membership(64, 600, 0)
    kinds = {
        "random forests": (lambda seed: RandomForestClassifier(30, random_state=seed, n_jobs=1), 1 / 60),
        "logistic regression": (lambda seed: LogisticRegression(max_iter=300), 1e-6),
    }
    yield "| models | in a pair | in different pairs |"
    yield "|---|---|---|"
    for name, (make, floor) in kinds.items():
        fitted = [make(i).fit(x[half], y[half]) for i, half in enumerate(membership.numpy())]
        logits = torch.stack([probabilities_to_logits(each.predict_proba(x), floor=floor) for each in fitted])
        signals = logit_signal(logits, torch.from_numpy(y))
        means = [(signals * flags).sum(0) / flags.sum(0) for flags in (membership, ~membership)]
        rest = signals - torch.where(membership, *means)
        pair, other = (float((rest[::2] * rest[1::2].roll(r, 0)).mean() / rest.square().mean()) for r in (0, 1))
        yield f"| {name} | {pair:.2f} | {other:.2f} |"


def simulations(runs: int) -> tuple[Iterator[str], ...]:
    return of_discoveries(20 * runs), of_examples(), of_pools(10 * runs), of_attackers(runs)


def main(arguments: argparse.Namespace) -> None:
    runs = arguments.runs
    tables = (of_pairs(),) if arguments.pairs else simulations(runs)
    for table in tables:
        for line in table:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument(
        "--pairs", action="store_true", help="the correlation of the two models of a pair, on the digits"
    )
    main(parser.parse_args())
