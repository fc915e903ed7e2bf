"""One choice of CWRF at a time: does any setting beat the fine-tuning alone (r = 0) at equal test accuracy?

    python examples/paper/levers.py --lever values

Whole units are channels and neurons; the lever heads is for networks with attention (--data news --rate 0.1:
a head is more than a percent of the weights there, and at 3 % none is chosen).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from comparing import ACCURACY, AUC, above_frontier, difference, on_average, told_above
from study import BASE, Study, parse, parser

from lightning_cwrf import RecipeAudit
from lightning_cwrf.defenses import create_defense
from lightning_cwrf.report import plot_tradeoff

CONTROL = "r = 0"
ALPHAS = [0.3, 0.6, 0.9]
DENSE = [0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.9]
"""Of r = 0: a line between distant strengths would lie far above its curve, and favour every option."""
LEVERS: dict[str, dict[str, dict[str, Any]]] = {
    "values": {
        "initial values, held": {},
        "fresh values, held": {"values": "fresh"},
        "trained values, held": {"values": "trained"},
        "zero, held": {"values": "zero"},
        "initial values, not held": {"hold": False},
    },
    "rate": {f"r = {rate:.1%}": {"rate": rate} for rate in (0.003, 0.01, 0.03, 0.1, 0.3)},
    "choice": {kind: {"kind": kind} for kind in ("privacy", "learnability", "random")},
    "eta": {f"η_e = {lr:g}": {"lr": lr} for lr in (1e-4, 1e-3, 1e-2, 1e-1)},
    "steps": {f"T = {steps}": {"steps": steps} for steps in (1, 10, 30, 100)},
    "lambda": {f"λ = {lam:g}": {"lam": lam} for lam in (0.0, 0.3, 0.7, 0.9, 1.0)},
    "batchnorm": {f"statistics: {mode}": {"batchnorm": mode} for mode in ("keep", "reset", "estimate")},
    "layers": {"of all weights": {}, "of each layer": {"per_layer": True}},
    "units": {"single weights": {}, "whole units": {"structured": True}},
    "heads": {"single weights": {}, "whole units": {"structured": True}, "whole heads": {"structured": "heads"}},
    "mode": {f"scored in {mode} mode": {"mode": mode} for mode in ("eval", "train")},
}
"""Settings of CWRF that one lever changes, by the name of the option."""
TUNINGS: dict[str, dict[str, dict[str, Any]]] = {
    "epochs": {f"{epochs} epochs": {"epochs": epochs} for epochs in (10, 20, 40, 80)},
    "lr": {f"learning rate {lr:g}": {"lr": lr} for lr in (3e-4, 1e-3, 3e-3)},
    "warmup": {f"{epochs} epochs of warm-up": {"warmup": epochs} for epochs in (0, 5, 10)},
}
"""Settings of the fine-tuning, which the control has too."""

LEVEL = 0.05
RULE = (
    "better if an option's LiRA AUC is below that of r = 0 at equal accuracy, on average over the strengths, with a "
    f"p-value of at most {LEVEL:g} over the number of options (Bonferroni); else no better"
)


Found = dict[tuple[str, float], RecipeAudit]


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__file__, __doc__)
    made.add_argument("--lever", choices=[*LEVERS, *TUNINGS, "rounds"], required=True, help="which")
    made.add_argument("--alphas", type=float, nargs="+", help="strengths of RelaxLoss")
    made.add_argument("--rate", type=float, default=0.03, help="r")
    arguments = parse(made, words)
    arguments.alphas = arguments.alphas or (ALPHAS[:1] if arguments.quick else ALPHAS)
    study = Study(f"lever-{arguments.lever}-{arguments.data}", f"The lever {arguments.lever}", arguments)
    base = study.unprotected()
    found: Found = {}
    controls: dict[str, list[RecipeAudit]] = {}
    cwrf = {"rate": arguments.rate}
    tunings = _options(study) if arguments.lever in TUNINGS else {"": {}}
    dense = arguments.alphas if arguments.quick else sorted({*arguments.alphas, *DENSE})
    for option, tuning in tunings.items():
        name = f"{CONTROL}, {option}".strip(", ")
        own = {(name, alpha): _tuned(study, name, alpha, {}, tuning) for alpha in dense}
        found |= own
        controls[option] = [base, *own.values()]
    options: dict[str, list[RecipeAudit]] = {}
    for option, settings in _options(study).items():
        for alpha in arguments.alphas:
            if arguments.lever == "rounds":
                found[option, alpha] = _in_rounds(study, option, alpha, cwrf, settings["rounds"])
            elif arguments.lever in TUNINGS:
                found[option, alpha] = _tuned(study, option, alpha, cwrf, settings)
            else:
                found[option, alpha] = _tuned(study, option, alpha, {**cwrf, **settings}, {})
        options[option] = controls.get(option, controls.get("", []))
    return _record(study, base, found, options)


def _options(study: Study) -> dict[str, dict[str, Any]]:
    lever = study.arguments.lever
    if lever == "rounds":
        options = {f"{n} x {max(1, study.task.tune_epochs // n)} epochs": {"rounds": n} for n in (1, 2, 4)}
    else:
        options = {**LEVERS, **TUNINGS}[lever]
    return dict(list(options.items())[:2]) if study.arguments.quick else options


def _tuned(study: Study, label: str, alpha: float, cwrf: dict[str, Any], tuning: dict[str, Any]) -> RecipeAudit:
    recipe = study.tuning(create_defense("relaxloss", alpha=alpha), cwrf, **tuning)
    return study.tuned(f"{label}, α = {alpha:g}", recipe)


def _in_rounds(study: Study, label: str, alpha: float, cwrf: dict[str, Any], rounds: int) -> RecipeAudit:
    """Several hardenings in a row, each with its own scoring; what an earlier one held is free in the next."""
    epochs = max(1, study.task.tune_epochs // rounds)
    recipe = study.tuning(create_defense("relaxloss", alpha=alpha), cwrf, epochs=epochs)
    shadows = study.base
    for left in range(rounds - 1, -1, -1):
        shadows = study.train(recipe, base=shadows, keep_weights=left > 0)
    return study.audit(f"{label}, α = {alpha:g}", shadows)


def _record(study: Study, base: RecipeAudit, found: Found, options: dict[str, list[RecipeAudit]]) -> dict[str, Any]:
    """``options`` has the controls of each option."""
    above = {key: above_frontier(audit, options[key[0]]) for key, audit in found.items() if key[0] in options}
    of_option = {option: [each for (own, _), each in above.items() if own == option] for option in options}
    usual = _default(study, options)
    of_tuning: dict[str, list[Any]] = {}
    for (name, alpha), audit in found.items():
        if usual is not None and name not in (*options, f"{CONTROL}, {usual}"):
            above[name, alpha] = above_frontier(audit, options[usual])
            of_tuning.setdefault(name, []).append(above[name, alpha])
    rows = [[BASE, None, base.estimate(ACCURACY), base.estimate(AUC), None]]
    rows += [
        [option, f"{alpha:g}", audit.estimate(ACCURACY), audit.estimate(AUC), above.get((option, alpha))]
        for (option, alpha), audit in found.items()
    ]
    ways = {
        option: {f"α = {alpha:g}": audit for (own, alpha), audit in found.items() if own == option}
        for option in dict.fromkeys(option for option, _ in found)
    }
    plot_tradeoff(ways, study.out / f"{study.name}.png")
    head = [study.arguments.lever, "α", "test accuracy", "LiRA AUC", "AUC above r = 0 at equal accuracy"]
    verdict = _verdict(of_option)
    if of_tuning:
        verdict["sentence"] += f" The fine-tuning alone: {told_above(of_tuning, f'{CONTROL}, {usual}')}"
    return study.write(head, rows, verdict)


def _default(study: Study, options: Iterable[str]) -> str | None:
    """Of a lever of the fine-tuning, the option that every other study has: its r = 0 is the others' control."""
    lever, task = study.arguments.lever, study.task
    usual = {"epochs": task.tune_epochs, "lr": task.lr, "warmup": 0}
    return next((each for each in options if lever in usual and TUNINGS[lever][each][lever] == usual[lever]), None)


def _verdict(of_option: dict[str, list[Any]]) -> dict[str, str]:
    means = [difference(mean) for each in of_option.values() if (mean := on_average(each)) is not None]
    better = any(each.value < 0 and each.p_value <= LEVEL / len(of_option) for each in means)
    return {"word": "better" if better else "no better", "rule": RULE, "sentence": told_above(of_option)}


if __name__ == "__main__":
    main()
