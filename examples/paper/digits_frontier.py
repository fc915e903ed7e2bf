"""Does rewinding beat the fine-tuning alone? Recipes on handwritten digits, each audited over many models.

Every recipe goes on from the same base models, with the same pool and membership, so that recipes are compared in
pairs. What matters is the frontier of test accuracy against LiRA's AUC over all strengths of the defense, with r = 0
and a random mask as controls; not one strength.

    python examples/paper/digits_frontier.py --models 32 --out out/digits_frontier
    python examples/paper/digits_frontier.py --levers  # fresh or trained values, and not held

Writes results.json, results.md and frontier.png (levers.json, levers.md, levers.png). A killed run resumes from its
store, which both studies share.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_cwrf import CWRFConfig, RecipeAudit, ShadowRecipe, audit_recipe, train_shadows
from lightning_cwrf.auditing import Estimate
from lightning_cwrf.defenses import create_defense
from lightning_cwrf.report import plot_tradeoff

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits import BATCH, DigitsClassifier, digits, quiet, split

WAYS: dict[str, dict[str, Any]] = {
    "fine-tuned, r = 0": {},
    "CWRF, r = 3%": {"rate": 0.03},
    "random mask, r = 3%": {"rate": 0.03, "kind": "random"},
}
CONTROL, CWRF = "fine-tuned, r = 0", "CWRF, r = 3%"
LEVERS: dict[str, dict[str, Any]] = {
    CONTROL: {},
    CWRF: {"rate": 0.03},
    "fresh values": {"rate": 0.03, "values": "fresh"},
    "trained values, held": {"rate": 0.03, "values": "trained"},
    "rewound, not held": {"rate": 0.03, "hold": False},
}
AUC, ACCURACY = "lira/auroc", "test_accuracy"


def recipe(epochs: int, alpha: float | None = None, cwrf: CWRFConfig | None = None) -> ShadowRecipe:
    return ShadowRecipe(
        functools.partial(DigitsClassifier, epochs),
        {"max_epochs": epochs, "accelerator": "cpu"},
        BATCH,
        defense=None if alpha is None else create_defense("relaxloss", alpha=alpha),
        cwrf=cwrf,
    )


def ways(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    return LEVERS if arguments.levers else WAYS


def candidates(arguments: argparse.Namespace, reference: Dataset[Any]) -> Iterator[tuple[str, float, ShadowRecipe]]:
    """The way, the strength of the defense, and the recipe."""
    for way, settings in ways(arguments).items():
        cwrf = CWRFConfig(nonmembers=reference, **settings) if settings else None
        for alpha in arguments.alphas:
            yield way, alpha, recipe(arguments.tune_epochs, alpha, cwrf)


def main(arguments: argparse.Namespace) -> None:
    quiet()
    torch.set_num_threads(1)
    parts = split(digits(), arguments.seed)

    def audited(name: str, how: ShadowRecipe, **settings: Any) -> tuple[RecipeAudit, Any]:
        began = time.perf_counter()
        shadows = train_shadows(
            how,
            parts.pool,
            arguments.models,
            population=parts.population,
            store=arguments.out / "store",
            seed=arguments.seed,
            stack=arguments.models // 2,
            **settings,
        )
        found = audit_recipe(shadows, attacks=["loss", "lira"], seed=arguments.seed)
        seconds = time.perf_counter() - began
        print(
            f"{name}: {found.model_metrics[ACCURACY]}, {found.estimates['lira']['auroc']}, {seconds:.0f} s", flush=True
        )
        return found, shadows

    first, base = audited("no defense", recipe(arguments.epochs), keep_weights=True)
    results = {
        (way, alpha): audited(f"{way}, α = {alpha:g}", how, base=base)[0]
        for way, alpha, how in candidates(arguments, parts.reference)
    }
    _write(first, results, arguments)


def _write(first: RecipeAudit, results: dict[tuple[str, float], RecipeAudit], arguments: argparse.Namespace) -> None:
    rows = [_row("no defense", None, first)]
    controls = [found for (way, _), found in results.items() if way == CONTROL]
    for (way, alpha), found in results.items():
        against = None if way == CONTROL else _minus(found, _closest(found, controls))
        same = _minus(found, results[CWRF, alpha]) if arguments.levers and way not in (CONTROL, CWRF) else None
        rows.append(_row(way, alpha, found, against, same))
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    name = "levers" if arguments.levers else "results"
    (arguments.out / f"{name}.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    compared = {"against": "r = 0 at the closest accuracy"}
    compared |= {"same_alpha": "CWRF at the same α"} if arguments.levers else {}
    heads = ["way", "α", "test accuracy", "LiRA AUC"]
    heads += [each for what in compared.values() for each in (f"against {what}: accuracy", "LiRA AUC")]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["way"], "" if row["alpha"] is None else f"{row['alpha']:g}"]
        cells += [row["test_accuracy"]["text"], row["lira_auc"]["text"]]
        for each in compared:
            cells += [(row[each] or {}).get(number, "") for number in ("accuracy", "auc")]
        lines.append(f"| {' | '.join(cells)} |")
    (arguments.out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    by_way = {
        way: {f"α = {alpha:g}": found for (each, alpha), found in results.items() if each == way}
        for way in ways(arguments)
    }
    plot_tradeoff(by_way, arguments.out / ("levers.png" if arguments.levers else "frontier.png"))


def _minus(found: RecipeAudit, other: RecipeAudit) -> dict[str, str]:
    return {"accuracy": str(found.minus(other, ACCURACY)), "auc": str(found.minus(other, AUC))}


def _row(
    way: str,
    alpha: float | None,
    found: RecipeAudit,
    against: dict[str, str] | None = None,
    same_alpha: dict[str, str] | None = None,
) -> dict[str, Any]:
    return {
        "way": way,
        "alpha": alpha,
        "test_accuracy": _numbers(found.model_metrics[ACCURACY]),
        "lira_auc": _numbers(found.estimates["lira"]["auroc"]),
        "against": against,
        "same_alpha": same_alpha,
        "values": found.values(),
        "bounds": found.bounds(),
    }


def _numbers(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "interval": list(estimate.interval), "text": str(estimate)}


def _closest(found: RecipeAudit, controls: list[RecipeAudit]) -> RecipeAudit:
    accuracy = found.model_metrics[ACCURACY].value
    return min(controls, key=lambda each: abs(each.model_metrics[ACCURACY].value - accuracy))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levers", action="store_true", help="study what is done to the chosen weights instead")
    parser.add_argument("--quick", action="store_true", help="a few models and epochs, to try the script")
    parser.add_argument("--models", type=int, default=32, help="of each recipe, even, at least 8")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.15, 0.3, 0.6, 0.9], help="strengths of RelaxLoss")
    parser.add_argument("--epochs", type=int, default=60, help="of the first training")
    parser.add_argument("--tune-epochs", type=int, default=40, help="of the fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/digits_frontier"))
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.models, arguments.alphas, arguments.epochs, arguments.tune_epochs = 8, [0.3, 0.6], 2, 2
    if arguments.models < 8 or arguments.models % 2:
        parser.error(f"--models must be even and at least 8, not {arguments.models}.")
    return arguments


if __name__ == "__main__":
    main(parse_arguments())
