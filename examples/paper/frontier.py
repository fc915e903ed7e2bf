"""Does rewinding beat the fine-tuning alone? The frontier of test accuracy and LiRA's AUC, with RelaxLoss.

Every recipe goes on from the same finished models, over all strengths of the defense: r = 0 and a random mask are the
controls. At one strength CWRF has more accuracy; what matters is the AUC at equal accuracy.

    python examples/paper/frontier.py                  # the digits, two cores
    python examples/paper/frontier.py --data fashion
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from comparing import ACCURACY, AUC, above_frontier, beats, on_average, told_above
from study import BASE, Study, parse, parser

from lightning_cwrf import RecipeAudit
from lightning_cwrf.defenses import create_defense
from lightning_cwrf.report import plot_tradeoff

SCRATCH, CONTROL, CWRF, RANDOM = "from scratch", "fine-tuned, r = 0", "CWRF, r = 3%", "random mask, r = 3%"
SETTINGS: dict[str, dict[str, Any]] = {
    CONTROL: {},
    CWRF: {"rate": 0.03},
    "CWRF, r = 1%": {"rate": 0.01},
    "CWRF, r = 10%": {"rate": 0.1},
    RANDOM: {"rate": 0.03, "kind": "random"},
}
STRENGTHS = {
    SCRATCH: [0.3, 0.6],
    CONTROL: [0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.9],
    CWRF: [0.15, 0.3, 0.6, 0.9],
    "CWRF, r = 1%": [0.6, 0.9],
    "CWRF, r = 10%": [0.6, 0.9],
    RANDOM: [0.15, 0.3, 0.6, 0.9],
}
SHORT = {SCRATCH: [0.3, 0.6], CONTROL: [0.15, 0.3, 0.6], CWRF: [0.3, 0.6], RANDOM: [0.6]}
"""RelaxLoss' α by way; the short ones are for models that take minutes."""
EARLIER = {
    (BASE, None): (0.959, 0.822),
    (SCRATCH, 0.3): (0.944, 0.669), (SCRATCH, 0.6): (0.929, 0.637),
    (CONTROL, 0.15): (0.942, 0.652), (CONTROL, 0.3): (0.927, 0.617),
    (CONTROL, 0.6): (0.873, 0.575), (CONTROL, 0.9): (0.770, 0.559),
    (CWRF, 0.6): (0.910, 0.614), (CWRF, 0.9): (0.856, 0.587),
    ("CWRF, r = 1%", 0.9): (0.828, 0.585), ("CWRF, r = 10%", 0.9): (0.890, 0.614),
    (RANDOM, 0.6): (0.883, 0.592), (RANDOM, 0.9): (0.783, 0.556),
}  # fmt: skip
"""Test accuracy and LiRA's AUC on the digits by other code on another draw of the pool, with these standard errors:"""
EARLIER_ERRORS = (0.002, 0.005)
RULE = (
    "reproduced if CWRF's AUC is below that of r = 0 at equal accuracy by more than two standard errors, on average "
    "over its strengths; partly if it is at one strength; else not"
)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__file__, __doc__)
    made.add_argument("--alphas", type=float, nargs="+", help="strengths of RelaxLoss, for every way")
    made.add_argument("--short", action="store_true", help="rewind 3 %% alone, at fewer strengths: a third of the time")
    made.add_argument("--no-scratch", action="store_true", help="leave the trainings from scratch out")
    arguments = parse(made, words)
    if arguments.quick and arguments.alphas is None:
        arguments.alphas = [0.3]
    study = Study(f"frontier-{arguments.data}", "RelaxLoss with and without CWRF, as a frontier", arguments)
    found: dict[tuple[str, float | None], RecipeAudit] = {(BASE, None): study.unprotected()}
    strengths = SHORT if arguments.quick or arguments.short else STRENGTHS
    for way, alphas in strengths.items():
        if way == SCRATCH and arguments.no_scratch:
            continue
        for alpha in arguments.alphas or alphas:
            label, defense = f"{way}, α = {alpha:g}", create_defense("relaxloss", alpha=alpha)
            if way == SCRATCH:
                found[way, alpha] = study.from_scratch(label, defense)
            else:
                found[way, alpha] = study.tuned(label, study.tuning(defense, SETTINGS[way]))
    content = record(study, found)
    shown: dict[str, dict[str, RecipeAudit]] = {}
    for (way, alpha), audit in found.items():
        shown.setdefault(way, {})[BASE if alpha is None else f"α = {alpha:g}"] = audit
    plot_tradeoff(shown, study.out / f"{study.name}.png")
    return content


def record(study: Study, found: dict[tuple[str, float | None], RecipeAudit]) -> dict[str, Any]:
    controls = [audit for (way, _), audit in found.items() if way in (BASE, CONTROL)]
    above = {key: above_frontier(audit, controls) for key, audit in found.items() if key[0] not in (BASE, CONTROL)}
    asked = study.arguments
    with_earlier = study.name == "frontier-digits" and not (asked.quick or asked.epochs or asked.tune_epochs)
    rows = []
    for (way, alpha), audit in found.items():
        row = [way, None if alpha is None else f"{alpha:g}", audit.estimate(ACCURACY), audit.estimate(AUC)]
        row.append(above.get((way, alpha)))
        if with_earlier:
            earlier = EARLIER.get((way, alpha))
            row += [None, None] if earlier is None else [f"{each:.3f}" for each in earlier]
        rows.append(row)
    head = ["way", "α", "test accuracy", "LiRA AUC", "AUC above r = 0 at equal accuracy"]
    head += ["earlier accuracy", "earlier AUC"] if with_earlier else []
    of_way = {way: [each for (own, _), each in above.items() if own == way] for way in (CWRF, RANDOM)}
    means = {way: on_average(each) for way, each in of_way.items()}
    more = {
        "above_r0": {way: None if mean is None else vars_of(mean) for way, mean in means.items()},
        "agreement": agreement(found) if with_earlier else None,
    }
    return study.write(head, rows, _verdict(of_way), **more)


def vars_of(mean: Any) -> dict[str, float]:
    return {"value": mean.value, "error": mean.error}


def agreement(found: dict[tuple[str, float | None], RecipeAudit]) -> dict[str, int]:
    """How many of the earlier numbers are within two standard errors of the difference."""
    near = [
        abs(audit.estimate(measure).value - then) <= 2 * math.hypot(audit.jackknives[measure].error, error)
        for key, audit in found.items()
        for measure, then, error in zip((ACCURACY, AUC), EARLIER.get(key, ()), EARLIER_ERRORS, strict=False)
    ]
    return {"numbers": len(near), "within_two_standard_errors": sum(near)}


def _verdict(of_way: dict[str, list[Any]]) -> dict[str, str]:
    each = of_way[CWRF]
    word = "reproduced" if beats(on_average(each)) else "partly" if any(beats(one) for one in each) else "not"
    return {"word": word, "rule": RULE, "sentence": told_above(of_way)}


if __name__ == "__main__":
    main()
