"""Fig. 5 and Table 2: what is done to the most vulnerable weights, and which weights are tuned.

A1 sets them to zero and tunes the rest, A2 rewinds them and tunes only them, A3 (CWRF) rewinds them and tunes the rest.
Controls: r = 0, and A2 and A3 with random weights.

    python examples/paper/ablation.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comparing import ACCURACY, AUC
from study import BASE, Study, parse, parser
from tables import figure

from lightning_cwrf import RecipeAudit
from lightning_cwrf.defenses import create_defense

A1, A2, A3 = "A1: zero, tune the rest", "A2: rewind, tune only them", "A3 (CWRF): rewind, tune the rest"
WAYS: dict[str, dict[str, Any]] = {
    A1: {"values": "zero"},
    A2: {"tune": "masked"},
    A3: {},
}
CONTROLS: dict[str, dict[str, Any]] = {
    "random, as A2": {"tune": "masked", "kind": "random"},
    "random, as A3": {"kind": "random"},
}
RATES = [0.001, 0.01, 0.03, 0.05]
PAPER = {
    A2: [(1.2268, 1.3797), (0.8570, 1.2728), (0.4326, 0.9288), (0.4619, 0.9610)],
    A3: [(0.1502, 0.7720), (0.3376, 0.7433), (0.4473, 0.8044), (0.4815, 0.8330)],
}
"""Cross-entropy on the training and the test data, a ResNet18 on CIFAR-10 or CIFAR-100 (Table 2 does not say)."""
PAPER_SCRATCH = (0.8087, 1.5398)
CLAIMS = (
    "A1 has less test accuracy than A3 at every r",
    "A3 has a smaller loss gap than A2 at 3 % and 5 %",
    "A3 has a smaller loss gap than the training from scratch at 3 % and 5 %",
)
RULE = (
    "reproduced if all three claims of the paper are true by more than two standard errors of the paired difference; "
    "not if none is; else partly"
)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__file__, __doc__)
    made.add_argument("--alpha", type=float, default=0.6, help="strength of RelaxLoss")
    made.add_argument("--rates", type=float, nargs="+", help="r")
    made.add_argument("--control-rates", type=float, nargs="+", default=[0.03], help="r of the random weights")
    arguments = parse(made, words)
    arguments.rates = arguments.rates or (RATES[2:3] if arguments.quick else RATES)
    study = Study(f"ablation-{arguments.data}", "Zero, tune only the rewound, or CWRF", arguments)
    defense = create_defense("relaxloss", alpha=arguments.alpha)
    base = study.unprotected()
    scratch = study.from_scratch("from scratch", defense)
    control = study.tuned("fine-tuned, r = 0", study.tuning(defense))
    found = {
        (way, rate): study.tuned(f"{way}, r = {rate:.1%}", study.tuning(defense, {"rate": rate, **settings}))
        for ways, rates in ((WAYS, arguments.rates), (CONTROLS, arguments.control_rates))
        for way, settings in ways.items()
        for rate in rates
    }
    _plot(study, found, scratch, control)
    rows = [_row(BASE, None, base), _row("from scratch", None, scratch, PAPER_SCRATCH), _row("r = 0", None, control)]
    for (way, rate), audit in found.items():
        paper = PAPER[way][RATES.index(rate)] if way in PAPER and rate in RATES else None
        rows.append(_row(way, rate, audit, paper))
    head = ["way", "r", "train loss", "test loss", "loss gap", "test accuracy", "LiRA AUC"]
    head += ["the paper's train loss", "test loss"]
    return study.write(head, rows, _verdict(found, scratch, control))


def _row(way: str, rate: float | None, audit: RecipeAudit, paper: Any = None) -> list[Any]:
    measures = ("train_loss", "test_loss", "loss_gap", ACCURACY, AUC)
    ours = [audit.estimate(measure) for measure in measures]
    return [way, None if rate is None else f"{rate:.1%}", *ours, *(paper or (None, None))]


def _verdict(found: dict[tuple[str, float], RecipeAudit], scratch: RecipeAudit, control: RecipeAudit) -> dict[str, str]:
    rates = sorted({rate for way, rate in found if way == A3})
    high = [rate for rate in rates if rate in RATES[2:]]
    held = [
        all(_less(found[A1, rate], found[A3, rate], ACCURACY) for rate in rates),
        bool(high) and all(_less(found[A3, rate], found[A2, rate], "loss_gap") for rate in high),
        bool(high) and all(_less(found[A3, rate], scratch, "loss_gap") for rate in high),
    ]
    word = "reproduced" if all(held) else "partly" if any(held) else "not"
    told = "; ".join(f"{claim}: {'yes' if yes else 'no'}" for claim, yes in zip(CLAIMS, held, strict=True))
    middle = found[A3, rates[len(rates) // 2]].minus(control, "loss_gap")
    told += f". The loss gap of A3 at r = {rates[len(rates) // 2]:.1%} minus that of r = 0, the control: {middle}"
    return {"word": word, "sentence": f"{told}.", "rule": RULE}


def _less(a: RecipeAudit, b: RecipeAudit, measure: str) -> bool:
    """Whether a has less than b by more than two standard errors of the difference."""
    between = a.jackknives[measure] - b.jackknives[measure]
    return between.value + 2 * between.error < 0


def _plot(
    study: Study, found: dict[tuple[str, float], RecipeAudit], scratch: RecipeAudit, control: RecipeAudit
) -> None:
    measures = (ACCURACY, "loss_gap", AUC)
    with figure(study.out / f"{study.name}.png", len(measures)) as panels:
        for axes, measure in zip(panels, measures, strict=True):
            for way in (*WAYS, *CONTROLS):
                points = [(rate, audit.estimate(measure)) for (own, rate), audit in found.items() if own == way]
                reach = [[e.value - e.interval.low for _, e in points], [e.interval.high - e.value for _, e in points]]
                axes.errorbar([100 * r for r, _ in points], [e.value for _, e in points], reach, fmt="o-", label=way)
            for name, audit, style in (("from scratch", scratch, ":"), ("r = 0", control, "--")):
                axes.axhline(audit.estimate(measure).value, linestyle=style, color="gray", label=name)
            axes.set(xlabel="r (%)", title=measure.replace("_", " "))
        panels[0].legend(fontsize="small")


if __name__ == "__main__":
    main()
