"""Table 3 and Fig. 6: every defense from scratch, in a fine-tuning (r = 0), with CWRF, and with a random mask.

Each over its own strengths, which its class names, against LiRA and RMIA: ways are compared at equal test accuracy, not
at one setting. The two controls, from scratch and r = 0, have strengths half-way between these too.
Fig. 7 is the same with ``--models 128``, Fig. 8 with ``--data news`` (``--scale paper --data dbpedia14``), Fig. 9 is
its plot. DP-SGD needs a network without BatchNorm, DMP and SELENA need other models; they are left out.

    python examples/paper/defenses.py --defenses relaxloss hamp ccl
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from comparing import ACCURACY, AUC, above_frontier, beats, on_average, told_above
from study import BASE, Study, parse, parser

from lightning_cwrf import RecipeAudit
from lightning_cwrf.defenses import Defense, available_defenses, create_defense, defense_class
from lightning_cwrf.report import plot_tradeoff

RMIA, TPR = "rmia/auroc", "lira/tpr_at_fpr_0.001"
SCRATCH, CONTROL, CWRF, RANDOM = "from scratch", "r = 0", "CWRF, r = 3%", "random mask, r = 3%"
WAYS: dict[str, dict[str, Any]] = {CONTROL: {}, CWRF: {"rate": 0.03}, RANDOM: {"rate": 0.03, "kind": "random"}}
PAPER = {
    "none": [("from scratch", 0.7944, 0.8500, 0.0218, 0.7476)],
    "relaxloss": [("from scratch", 0.7710, 0.7051, 0.0138, 0.6660), ("CWRF", 0.7686, 0.6831, 0.0003, 0.6818)],
    "hamp": [("from scratch", 0.7779, 0.7971, 0.0333, 0.8007), ("CWRF", 0.8143, 0.7796, 0.0053, 0.8026)],
    "ccl": [("from scratch", 0.7956, 0.8395, 0.0150, 0.7604), ("CWRF", 0.7777, 0.6482, 0.0022, 0.7425)],
}
"""Table 3, a ResNet18 on CIFAR-10: test accuracy, LiRA's AUC and TPR at an FPR of 0.1 %, RMIA's AUC."""
STRENGTHS: dict[str, list[dict[str, float]]] = {
    "weight_penalty": [{"l1": 1e-5}, {"l1": 1e-4}, {"l1": 1e-3}],
    "adversarial_regularization": [{"lam": 0.3}, {"lam": 1.0}, {"lam": 3.0}],
    "mixup_mmd": [{"lam": 1.0}, {"lam": 3.0}, {"lam": 10.0}],
}
"""Of defenses whose classes name none."""
RULE = (
    "for each defense, at equal accuracy and on average over its strengths, is CWRF's LiRA AUC lower by more than two "
    "standard errors than that of the defense from scratch, which is the paper's claim, and than that of r = 0, its "
    "control? Reproduced: both for every defense; partly: the paper's claim for at least one; else not. Strengths "
    "without a control of that accuracy are left out"
)
Found = dict[tuple[str, str, str], RecipeAudit]


def strengths_of(name: str, reference: Any, *, between: bool = False) -> dict[str, Defense]:
    """The defense at each of its strengths, by what it says; or at those half-way ``between`` neighbours."""
    cls = defense_class(name)
    data = dict.fromkeys(cls.data_names(), reference)
    strengths: Sequence[Mapping[str, float]] = cls.strengths or STRENGTHS[name]
    if between:
        pairs = itertools.pairwise(strengths)
        strengths = [{key: math.sqrt(a[key] * b[key]) for key in a} for a, b in pairs]
    return {
        " ".join(f"{key} = {value:.3g}" for key, value in strength.items()): create_defense(name, **strength, **data)
        for strength in strengths
    }


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    known = [name for name in available_defenses() if defense_class(name).strengths]
    made = parser(__file__, __doc__)
    made.add_argument("--defenses", nargs="+", choices=[*known, *STRENGTHS], default=known, help="which")
    arguments = parse(made, words)
    study = Study(f"defenses-{arguments.data}", "Every defense, four ways", arguments, attacks=("lira", "rmia"))
    base = study.unprotected()
    found: Found = {}
    for name in arguments.defenses:
        published = strengths_of(name, study.parts.reference)
        denser = {**published, **strengths_of(name, study.parts.reference, between=True)}
        for way in (SCRATCH, *WAYS):
            chosen = denser if way in (SCRATCH, CONTROL) else published
            for strength, defense in list(chosen.items())[: 1 if arguments.quick else None]:
                label = f"{name} {strength}, {way}"
                found[name, strength, way] = (
                    study.from_scratch(label, defense)
                    if way == SCRATCH
                    else study.tuned(label, study.tuning(defense, WAYS[way]))
                )
    ways = {
        way: {f"{name} {strength}": audit for (name, strength, own), audit in found.items() if own == way}
        for way in (SCRATCH, *WAYS)
    }
    plot_tradeoff(ways, study.out / f"{study.name}.png")
    return _record(study, base, found)


def _record(study: Study, base: RecipeAudit, found: Found) -> dict[str, Any]:
    rows = [[BASE, None, SCRATCH, *_numbers(base), None, None]]
    rows += [_paper("none", *PAPER["none"][0])]
    found_above: dict[str, dict[str, list[Any]]] = {SCRATCH: {}, CONTROL: {}}
    for name in dict.fromkeys(name for name, _, _ in found):
        own = {(strength, way): audit for (each, strength, way), audit in found.items() if each == name}
        controls = {w: [base, *(a for (_, way), a in own.items() if way == w)] for w in (SCRATCH, CONTROL)}
        above = {
            (key, w): None if key[1] == w else above_frontier(audit, controls[w])
            for key, audit in own.items()
            for w in controls
        }
        for (strength, way), audit in own.items():
            more = [above[(strength, way), w] for w in (CONTROL, SCRATCH)]
            rows.append([name, strength, way, *_numbers(audit), *more])
        rows += [_paper(name, *each) for each in PAPER.get(name, [])]
        for w in controls:
            found_above[w][name] = [each for (key, v), each in above.items() if key[1] == CWRF and v == w]
    head = ["defense", "strength", "way", "test accuracy", "LiRA AUC", "LiRA TPR at 0.1% FPR", "RMIA AUC"]
    head += ["LiRA AUC above r = 0 at equal accuracy", "above from scratch"]
    return study.write(head, rows, _verdict(found_above))


def _numbers(audit: RecipeAudit) -> list[Any]:
    return [audit.estimate(measure) for measure in (ACCURACY, AUC, TPR, RMIA)]


def _paper(name: str, way: str, *numbers: float) -> list[Any]:
    return [name, "the paper's", way, *(f"{each:.4f}" for each in numbers), None, None]


def _verdict(above: dict[str, dict[str, list[Any]]]) -> dict[str, str]:
    """``above``: how much CWRF is above a control, by the control, the defense and the strength."""
    better = {w: [name for name, each in of.items() if beats(on_average(each))] for w, of in above.items()}
    both = [name for name in better[SCRATCH] if name in better[CONTROL]]
    word = "reproduced" if len(both) == len(above[CONTROL]) else "partly" if better[SCRATCH] else "not"
    told = "At equal accuracy, CWRF leaks less than the defense from scratch with {} of {} defenses{}"
    told += ", and less than r = 0 with {}{}."
    names = [f" ({', '.join(each)})" if each else "" for each in better.values()]
    counts = [len(each) for each in better.values()]
    told = told.format(counts[0], len(above[CONTROL]), names[0], counts[1], names[1])
    of_controls = {SCRATCH: "the defense from scratch", CONTROL: "r = 0"}
    told = " ".join([told, *(told_above(above[w], said) for w, said in of_controls.items())])
    return {"word": word, "rule": RULE, "sentence": told}


if __name__ == "__main__":
    main()
