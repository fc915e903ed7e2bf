"""How often bounds on ε and μ are above the truth, how near they come, and the false positive rates of quantile
regression beside those that it promises.

Three simulations, of which every truth is known:

- Gaussian scores: members N(μ, 1), non-members N(0, 1), so the mechanism is exactly μ-GDP, and its ε at δ = 1e-5 is
  known. Randomised response at ε = 1: scores are 0 or 1, nearly all are ties, and the bound can be reached.
- One-run audits of canaries with the same scores.
- Quantile regression of signals whose spread depends on the input, with 19 inputs of 20 that mean nothing.

``docs/numbers.md`` has the output.

    python benchmarks/bounds.py [--runs 100]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_cwrf.attacks import quantile_regression
from lightning_cwrf.metrics.functional import (
    epsilon_lower_bound,
    gaussian_epsilon,
    mu_lower_bound,
    one_run_epsilon,
    one_run_mu,
)

DELTA = 1e-5


def draw(run: int, flags: Tensor, mu: float | None) -> Tensor:
    """Gaussian scores; or, without μ, randomised response at ε = 1."""
    generator = torch.Generator().manual_seed(run)
    if mu is not None:
        return torch.randn(len(flags), generator=generator, dtype=torch.float64) + mu * flags
    keep = torch.rand(len(flags), generator=generator) < math.e / (1 + math.e)
    return torch.where(keep, flags, ~flags).double()


def share_above(bounds: list[float], truth: float) -> str:
    return f"{sum(bound > truth for bound in bounds) / len(bounds):.3f}"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def bounds_of_examples(runs: int) -> Iterator[str]:
    yield "| examples per side | scores | ε at δ = 1e-5 | mean bound | above ε | μ | mean bound | above μ |"
    yield "|---|---|---|---|---|---|---|---|"
    for n, count in ((300, 4 * runs), (2000, runs)):
        flags = torch.arange(2 * n) < n
        for mu in (0.0, 0.5, 1.0, 2.0, None):
            delta = DELTA if mu is not None else 0.0
            scores = [draw(run, flags, mu) for run in range(count)]
            epsilons = [float(epsilon_lower_bound(s, flags, delta=delta, seed=run)) for run, s in enumerate(scores)]
            if mu is None:
                cells = ["randomised response", "1 (δ = 0)", f"{mean(epsilons):.2f}", share_above(epsilons, 1.0)]
                yield f"| {n:,} | " + " | ".join([*cells, "", "", ""]) + " |"
                continue
            truth = gaussian_epsilon(mu, delta)
            mus = [float(mu_lower_bound(s, flags, seed=run)) for run, s in enumerate(scores)]
            cells = [f"N({mu:g}, 1)", f"{truth:.2f}", f"{mean(epsilons):.2f}", share_above(epsilons, truth)]
            yield f"| {n:,} | " + " | ".join([*cells, f"{mu:g}", f"{mean(mus):.2f}", share_above(mus, mu)]) + " |"


def bounds_of_canaries(runs: int) -> Iterator[str]:
    yield "| canaries | μ, ε at δ = 1e-5 | guesses | mean bound on ε | above ε | mean bound on μ | its ε | above μ |"
    yield "|---|---|---|---|---|---|---|---|"
    for m, mu in ((240, 2.0), (1000, 1.0), (1000, 2.0)):
        truth = gaussian_epsilon(mu, DELTA)
        audits = []
        for run in range(runs):
            coins = torch.rand(m, generator=torch.Generator().manual_seed(10_000 + run)) < 0.5
            audits.append((draw(run, coins, mu), coins))
        for guesses in (None, m, m // 4, m // 10):
            epsilons = [float(one_run_epsilon(*each, guesses=guesses, delta=DELTA)) for each in audits]
            mus = [float(one_run_mu(*each, guesses=guesses)) for each in audits]
            yield (
                f"| {m:,} | {mu:g}, {truth:.2f} | {guesses or 'not given'} | {mean(epsilons):.2f} | "
                f"{share_above(epsilons, truth)} | {mean(mus):.2f} | {gaussian_epsilon(mean(mus), DELTA):.2f} | "
                f"{share_above(mus, mu)} |"
            )


def promised_rates(runs: int, fresh: int = 1000) -> Iterator[str]:
    yield "| population | of which calibrate | promised FPR | mean actual FPR | its standard error | spread |"
    yield "|---|---|---|---|---|---|"
    for m in (396, 1996):
        scores = torch.stack([quantile_scores(run, m, fresh) for run in range(runs)])
        for f in (0.01, 0.05, 0.2):
            rates = (scores >= 1 - f).double().mean(1)
            spread = float(rates.std())
            cells = f"{float(rates.mean()):.4f} | {spread / math.sqrt(runs):.4f} | {spread:.3f}"
            yield f"| {m:,} | {m // 4} | {f:g} | {cells} |"


def quantile_scores(run: int, m: int, fresh: int) -> Tensor:
    generator = torch.Generator().manual_seed(run)
    x = torch.rand(m + fresh, 20, generator=generator)
    y = 3 * x[:, 0] + (0.2 + 2 * x[:, 0]) * torch.randn(m + fresh, generator=generator) ** 3
    return quantile_regression(y[m:], x[m:], y[:m], x[:m], epochs=30, seed=run)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--runs", type=int, default=100, help="simulated audits per row, four times as many with 300 examples per side"
    )
    runs = parser.parse_args().runs
    for table in (bounds_of_examples, bounds_of_canaries, promised_rates):
        print("\n".join(table(runs)), end="\n\n", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
