"""PAST's paper: Fig. 6a, the exponent α of its weights, and Fig. 6b, the length of the tuning.

The control of Fig. 6b is the finished model, tuned as long without PAST. Fig. 6c, the time of each defense, is in
benchmarks/defenses.py: a study's record is the same for the same seed, and times are not.

    python examples/paper/past_settings.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comparing import ACCURACY, AUC, beats, combined, difference
from past import ADVANTAGE, FURTHER
from study import BASE, Study, parse, parser

from lightning_cwrf import RecipeAudit
from lightning_cwrf.defenses import create_defense
from lightning_cwrf.report import plot_tradeoff

ALPHA, EPOCHS = "α", "epochs"
PUBLISHED = 2.5
ALPHAS = [0.0, 0.5, 1.0, 1.5, PUBLISHED]
LENGTHS = [5, 10, 20, 30, 50, 75]
NAMED = [20, 50]
"""Of the paper: the epochs after which its advantage stays, and those of the highest accuracy."""
CLAIMS = (
    "a larger α leaves less accuracy",
    "a larger α leaves less advantage",
    "the advantage falls up to {} epochs, and changes less after them",
    "the accuracy grows up to {} epochs",
)
RULE = (
    "reproduced if all four claims of the paper are true by more than two standard errors of the paired difference, "
    "between the smallest and the largest α and the shortest and the named length; not if none is; else partly"
)
Found = dict[tuple[str, float], RecipeAudit]


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__file__, __doc__)
    made.add_argument("--lam", type=float, default=1e-3, help="λ")
    arguments = parse(made, words)
    alphas, lengths = (ALPHAS[1::2], [1, 2, 3]) if arguments.quick else (ALPHAS, LENGTHS)
    study = Study(f"past-settings-{arguments.data}", "PAST's exponent and length", arguments)

    def past(alpha: float) -> Any:
        return create_defense("past", nonmembers=study.parts.reference, lam=arguments.lam, alpha=alpha)

    found: Found = {(BASE, 0): study.unprotected()}
    for alpha in alphas:
        found[ALPHA, alpha] = study.tuned(f"α = {alpha:g}", study.tuning(past(alpha)))
    for length in lengths:
        for way, defense in ((EPOCHS, past(PUBLISHED)), (FURTHER, None)):
            recipe = study.tuning(defense, epochs=length)
            found[way, length] = study.tuned(f"{way}, {length} epochs", recipe)
    ways = {
        way: {f"{setting:g}": audit for (own, setting), audit in found.items() if own == way}
        for way in (ALPHA, EPOCHS, FURTHER)
    }
    plot_tradeoff({BASE: {"-": found[BASE, 0]}, **ways}, study.out / f"{study.name}.png")
    measures = (ACCURACY, AUC, ADVANTAGE)
    rows = [
        [
            way if way in (BASE, FURTHER) else f"PAST, by its {way}",
            None if way == BASE else f"{setting:g}",
            *(audit.estimate(measure) for measure in measures),
        ]
        for (way, setting), audit in found.items()
    ]
    return study.write(
        ["way", "setting", "test accuracy", "LiRA AUC", "LiRA advantage"],
        rows,
        _verdict(found, *(lengths[1:] if arguments.quick else NAMED)),
    )


def _verdict(found: Found, settled: float, best: float) -> dict[str, str]:
    def change(way: str, before: float, after: float, measure: str) -> Any:
        return found[way, after].jackknives[measure] - found[way, before].jackknives[measure]

    alphas, lengths = (sorted(setting for own, setting in found if own == way) for way in (ALPHA, EPOCHS))
    fewer = [change(ALPHA, alphas[0], alphas[-1], measure) for measure in (ACCURACY, ADVANTAGE)]
    falls, stays = change(EPOCHS, lengths[0], settled, ADVANTAGE), change(EPOCHS, settled, lengths[-1], ADVANTAGE)
    grows, shrinks = (change(EPOCHS, *ends, ACCURACY) for ends in ((lengths[0], best), (best, lengths[0])))
    less = beats(falls - stays) and beats(combined([(1.0, falls), (1.0, stays)]))  # whichever way it goes after
    yes = [*map(beats, fewer), beats(falls) and less, beats(shrinks)]
    word = "reproduced" if all(yes) else "partly" if any(yes) else "not"
    shown = [*map(difference, fewer), f"{difference(falls)}, then {difference(stays)}", difference(grows)]
    claims = [*CLAIMS[:2], CLAIMS[2].format(settled), CLAIMS[3].format(best)]
    told = [f"{claim}: {'yes' if ok else 'no'} ({how})" for claim, ok, how in zip(claims, yes, shown, strict=True)]
    return {"word": word, "sentence": f"{'; '.join(told)}.", "rule": RULE}


if __name__ == "__main__":
    main()
