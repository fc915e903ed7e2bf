"""The safest hardening of a digits model that loses at most two points of test accuracy.

    python examples/search_digits.py --out out/search_digits

Tries RelaxLoss and HAMP at several strengths, alone and after rewinding 1 %, 3 % or 10 % of the weights, and
prints the best with its figures on examples that took no part in the choice. A killed run goes on from its store.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

from digits import BATCH, DigitsClassifier, digits, quiet, split

from lightning_cwrf import ShadowRecipe, default_candidates, search_recipes


def recipe(epochs: int) -> ShadowRecipe:
    arguments = {"max_epochs": epochs, "accelerator": "cpu"}
    return ShadowRecipe(functools.partial(DigitsClassifier, epochs), arguments, BATCH)


def main(arguments: argparse.Namespace) -> None:
    quiet()
    parts = split(digits(), arguments.seed)
    candidates = default_candidates(
        recipe(arguments.tune_epochs), parts.reference, defenses=arguments.defenses, rates=arguments.rates
    )
    began = time.perf_counter()
    found = search_recipes(
        recipe(arguments.epochs),
        candidates,
        parts.pool,
        population=parts.population,
        floor=arguments.floor,
        models=arguments.models,
        store=arguments.out / "store",
        seed=arguments.seed,
        workers=arguments.workers,
        stack=16,
    )
    print(f"{found}\n\n{(time.perf_counter() - began) / 60:.1f} minutes")
    found.save(arguments.out / "search.json")
    found.plot(arguments.out / "search.png")
    (arguments.out / "search.md").write_text(found.to_markdown(), encoding="utf-8")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--defenses", nargs="+", default=["relaxloss", "hamp"])
    parser.add_argument("--rates", type=float, nargs="+", default=[0, 0.01, 0.03, 0.1], help="r; 0 must be among them")
    parser.add_argument("--floor", type=float, default=0.02, help="the test accuracy that may be lost")
    parser.add_argument("--models", type=int, nargs="+", default=[8, 16, 32], help="of each candidate in each round")
    parser.add_argument("--epochs", type=int, default=60, help="of the first training")
    parser.add_argument("--tune-epochs", type=int, default=40, help="of the fine-tuning")
    parser.add_argument("--workers", type=int, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/search_digits"))
    return parser.parse_args(words)


if __name__ == "__main__":
    main(parse_arguments())
