"""LiRA with more shadow models, against RelaxLoss with and without CWRF (Fig. 7, which has 128 shadow models).

Every model is the target once, attacked with few of the others and with all. Control: r = 0, the fine-tuning alone.

    python examples/paper/more_models.py
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from comparing import ACCURACY, AUC, above_frontier, beats, compared, exceeds, on_average
from frontier import CONTROL, CWRF, SCRATCH
from limited import measured_by
from study import BASE, Study, parse, parser
from tables import figure

from lightning_cwrf import RecipeAudit
from lightning_cwrf.attacks import create_attack
from lightning_cwrf.auditing import Estimate
from lightning_cwrf.auditing.recipe_targets import RecipeTargets
from lightning_cwrf.defenses import create_defense
from lightning_cwrf.metrics.functional import CrossedJackknife
from lightning_cwrf.shadows import ShadowOutputs

ALPHAS = {SCRATCH: [0.3, 0.6, 1.0], CONTROL: [0.15, 0.3, 0.45, 0.6], CWRF: [0.3, 0.6]}
PAIRS = (4, 16)
"""Pairs of shadow models of the weaker attacks."""
CLAIMS = (
    "more shadow models are a stronger attack against every way",
    "with all shadow models CWRF leaks less than the training from scratch at equal accuracy",
)
RULE = (
    "reproduced if both claims of the paper are true by more than two standard errors, the second on average over the "
    "strengths; not if none is; else partly"
)
Key = tuple[str, float | None]


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse(parser(__file__, __doc__), words, models=128)
    study = Study(f"more-models-{arguments.data}", "LiRA with more shadow models", arguments)
    few = [m for m in PAIRS if m <= study.task.models // 2 - 2] or [2]
    found: dict[Key, RecipeAudit] = {(BASE, None): study.unprotected()}
    fewer = {(BASE, None): with_few(study, study.base, few)}
    for way, alphas in ALPHAS.items():
        for alpha in alphas[:1] if arguments.quick else alphas:
            label, defense = f"{way}, α = {alpha:g}", create_defense("relaxloss", alpha=alpha)
            if way == SCRATCH:
                shadows = study.train(study.recipe(defense=defense))
            else:
                cwrf = {"rate": 0.03} if way == CWRF else {}
                shadows = study.train(study.tuning(defense, cwrf), base=study.base)
            found[way, alpha] = study.audit(label, shadows)
            fewer[way, alpha] = with_few(study, shadows, few)
    _plot(study, found, fewer)
    return _record(study, found, fewer)


def with_few(study: Study, shadows: ShadowOutputs, few: Sequence[int]) -> dict[int, CrossedJackknife]:
    """LiRA's AUC with so many pairs of shadow models."""
    began = time.perf_counter()
    targets = RecipeTargets.of(shadows, study.arguments.seed)
    made = {m: measured_by(targets, create_attack("lira"), m)["auroc"] for m in few}
    study.took(f"{study.name}-{shadows.store.key}", time.perf_counter() - began)
    return made


def _record(
    study: Study, found: dict[Key, RecipeAudit], fewer: dict[Key, dict[int, CrossedJackknife]]
) -> dict[str, Any]:
    above = {
        way: {
            key: above_frontier(audit, [each for (own, _), each in found.items() if own in (BASE, way)])
            for key, audit in found.items()
            if key[0] == CWRF
        }
        for way in (SCRATCH, CONTROL)
    }
    rows = [
        [
            key[0],
            None if key[1] is None else f"{key[1]:g}",
            audit.estimate(ACCURACY),
            *(Estimate(each.value, each.interval()) for each in fewer[key].values()),
            audit.estimate(AUC),
            above[SCRATCH].get(key),
            above[CONTROL].get(key),
        ]
        for key, audit in found.items()
    ]
    counts = [*(2 * m for m in fewer[BASE, None]), study.task.models - 2]
    head = ["way", "α", "test accuracy", *(f"LiRA AUC, {n} shadow models" for n in counts)]
    head += ["AUC above from scratch at equal accuracy", "above r = 0"]
    gains = {key: audit.jackknives[AUC] - next(iter(fewer[key].values())) for key, audit in found.items()}
    yes = [
        all(map(exceeds, gains.values())),
        beats(on_average(list(above[SCRATCH].values()))),
    ]
    word = "reproduced" if all(yes) else "partly" if any(yes) else "not"
    told = [f"{claim}: {'yes' if each else 'no'}" for claim, each in zip(CLAIMS, yes, strict=True)]
    told[0] += (
        f" (no defense {gains[BASE, None].value:+.3f}, at least {min(each.value for each in gains.values()):+.3f})"
    )
    told[1] += f" ({compared(list(above[SCRATCH].values()))})"
    told.append(f"above r = 0, the control, {compared(list(above[CONTROL].values()))}")
    return study.write(head, rows, {"word": word, "sentence": f"{'; '.join(told)}.", "rule": RULE})


def _plot(study: Study, found: dict[Key, RecipeAudit], fewer: dict[Key, dict[int, CrossedJackknife]]) -> None:
    with figure(study.out / f"{study.name}.png") as (axes,):
        for key, audit in found.items():
            points = [(2 * m, each.value) for m, each in fewer[key].items()]
            points.append((study.task.models - 2, audit.estimate(AUC).value))
            label = key[0] if key[1] is None else f"{key[0]}, α = {key[1]:g}"
            axes.plot(*zip(*points, strict=True), "o-", label=label)
        axes.set(xlabel="shadow models", ylabel="LiRA AUC", xscale="log")
        axes.legend(fontsize=5)


if __name__ == "__main__":
    main()
