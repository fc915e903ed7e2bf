"""PAST's paper: Fig. 1b, Fig. 5a, Table 1 and Table 2 (P1), with LiRA, RMIA and the loss attack.

How few weights hold the privacy sensitivity; the adaptive weights against plain ℓ1 and ℓ2; and P1 of PAST alone and on
top of other defenses. Control: the finished and the defended models themselves, tuned as long without PAST.

    python examples/paper/past.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comparing import ACCURACY, AUC, above_frontier, beats, compared, of_models, on_average
from correlation import finished_models
from study import BASE, Study, parse, parser
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_cwrf import RecipeAudit
from lightning_cwrf.auditing import Estimate
from lightning_cwrf.defenses import Defense, create_defense
from lightning_cwrf.report import plot_tradeoff

ATTACKS = ("lira", "rmia", "loss")
P1, ADVANTAGE = "lira/p1", "lira/advantage"
SHARES = (0.01, 0.05, 0.1)
LAMS = [1e-5, 1e-4, 1e-3, 3e-3]
ADAPTIVE, L1, L2, FURTHER = "PAST", "ℓ1", "ℓ2", "tuned further"
OTHERS: dict[str, dict[str, float]] = {
    "relaxloss": {"alpha": 0.3},
    "label_smoothing": {"smoothing": 0.2},
    "confidence_penalty": {"beta": 0.5},
    "hamp": {"gamma": 0.6, "alpha": 0.01},
    "ccl": {"alpha": 0.5},
}
CLAIMS = (
    "most of the sensitivity is in a tenth of the weights",
    "PAST leaks less than ℓ1 at equal accuracy",
    "PAST has a higher P1 than no defense, than tuning further without one, and than every other defense",
    "on every defended model, PAST has a higher P1 than the model, tuned further or not",
)
RULE = (
    "reproduced if all four claims of the paper are true by more than two standard errors with LiRA as the attack, the "
    "third and fourth of PAST at the λ with the highest P1, which favours it; not if none is; else partly"
)


def sensitivity(study: Study) -> dict[float, Estimate]:
    """The part of Σ|∇G| that the most sensitive weights hold, G the gap of the losses, by their share (Fig. 1b)."""
    held: dict[float, list[float]] = {share: [] for share in SHARES}
    for model, _, members in finished_models(study):
        model.eval()
        gap = _loss(model, members) - _loss(model, study.parts.reference)
        gradients = torch.autograd.grad(gap.abs(), list(model.parameters()))
        sizes = torch.cat([each.abs().flatten() for each in gradients]).sort(descending=True).values.double()
        for share, each in held.items():
            each.append(float(sizes[: round(share * len(sizes))].sum() / sizes.sum()))
    return {share: of_models(each) for share, each in held.items()}


def _loss(model: Any, data: Dataset[Any]) -> torch.Tensor:
    inputs, targets = next(iter(DataLoader(data, batch_size=1_000)))
    loss: torch.Tensor = F.cross_entropy(model(inputs), targets)
    return loss


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__file__, __doc__)
    made.add_argument("--lams", type=float, nargs="+", help="λ")
    made.add_argument("--others", nargs="*", choices=list(OTHERS), help="other defenses")
    arguments = parse(made, words)
    arguments.lams = arguments.lams or (LAMS[1:2] if arguments.quick else LAMS)
    if arguments.others is None:
        arguments.others = ["relaxloss"] if arguments.quick else list(OTHERS)
    study = Study(f"past-{arguments.data}", "PAST", arguments, attacks=ATTACKS)
    found = {(BASE, ""): study.unprotected(), (FURTHER, ""): study.tuned(FURTHER, study.tuning(None))}
    for lam in arguments.lams:
        for way, defense in _penalties(study, lam).items():
            found[way, f"λ = {lam:g}"] = study.tuned(f"{way}, λ = {lam:g}", study.tuning(defense))
    for name in arguments.others:
        defense = create_defense(name, **OTHERS[name])
        defended = study.train(study.recipe(defense=defense), keep_weights=True)
        found[name, ""] = study.audit(name, defended)
        found[f"{name}, {FURTHER}", ""] = _on(study, name, defended, defense)
        for lam in arguments.lams:
            on = _past(study, lam, alpha=1.5, on=defense)
            found[f"{name}, then PAST", f"λ = {lam:g}"] = _on(study, f"{name}, then PAST, λ = {lam:g}", defended, on)
    ways = {
        way: {s or "-": a for (own, s), a in found.items() if own == way} for way in dict.fromkeys(w for w, _ in found)
    }
    plot_tradeoff({way: each for way, each in ways.items() if "," not in way}, study.out / f"{study.name}.png")
    held = sensitivity(study)
    advantages = [f"{attack}/advantage" for attack in ATTACKS]
    rows = [
        [way, strength, *(audit.estimate(measure) for measure in (ACCURACY, AUC, P1, *advantages))]
        for (way, strength), audit in found.items()
    ]
    head = ["way", "strength", "test accuracy", "LiRA AUC", "P1 of LiRA"]
    head += ["LiRA advantage", "RMIA advantage", "loss attack's advantage"]
    return study.write(head, rows, _verdict(found, held), sensitivity={f"{s:.0%}": e.value for s, e in held.items()})


def _past(study: Study, lam: float, **settings: Any) -> Defense:
    made: Defense = create_defense("past", nonmembers=study.parts.reference, lam=lam, **settings)
    return made


def _penalties(study: Study, lam: float) -> dict[str, Defense]:
    plain = {L1: {"l1": lam}, L2: {"l2": lam}}
    return {
        ADAPTIVE: _past(study, lam),
        **{way: create_defense("weight_penalty", **each) for way, each in plain.items()},
    }


def _on(study: Study, label: str, defended: Any, defense: Defense) -> RecipeAudit:
    return study.audit(f"{label}, tuned", study.train(study.tuning(defense), base=defended))


def _verdict(found: dict[tuple[str, str], RecipeAudit], held: dict[float, Estimate]) -> dict[str, str]:
    def best(way: str) -> RecipeAudit:
        return max((audit for (own, _), audit in found.items() if own == way), key=lambda a: a.estimate(P1).value)

    controls = [audit for (way, _), audit in found.items() if way in (FURTHER, L1)]  # one curve: λ = 0 and more
    above = [above_frontier(a, controls) for (way, _), a in found.items() if way == ADAPTIVE]
    others = [way for way, _ in found if way in (BASE, FURTHER, *OTHERS)]
    defended = [way for way in others if way in OTHERS]
    yes = [
        held[0.1].interval.low > 0.5,
        beats(on_average(above)),
        all(_more(best(ADAPTIVE), best(way)) for way in others),
        bool(defended)
        and all(
            _more(best(f"{way}, then PAST"), best(f"{way}{more}")) for way in defended for more in ("", f", {FURTHER}")
        ),
    ]
    word = "reproduced" if all(yes) else "partly" if any(yes) else "not"
    told = [f"{claim}: {'yes' if each else 'no'}" for claim, each in zip(CLAIMS, yes, strict=True)]
    told[0] += f" ({held[0.1]})"
    told[1] += f" ({compared(above)})"
    return {"word": word, "sentence": f"{'; '.join(told)}.", "rule": RULE}


def _more(a: RecipeAudit, b: RecipeAudit) -> bool:
    """Whether a has a higher P1 than b by more than two standard errors of the difference."""
    between = b.jackknives[P1] - a.jackknives[P1]
    return beats(between)


if __name__ == "__main__":
    main()
