"""The published order of attacks: does each attack beat those that its paper says it beats?

    python examples/paper/attack_order.py

Every model is the target once, attacked with m pairs of the others, so that each example has m OUT models (and m IN
models, which offline attacks do not use). A comparison is the mean difference over all targets on the same examples
with the same shadow models; its interval is that of ``audit_recipe``, over models and examples.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from limited import FPR, measured_by, over_targets
from study import Study, parse, parser
from tables import figure
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_cwrf.attacks import Attack, boundary_distance, create_attack
from lightning_cwrf.auditing import Estimate
from lightning_cwrf.auditing.recipe_targets import RecipeTargets
from lightning_cwrf.metrics.functional import CrossedJackknife

MANY = 0
"""Stands for as many pairs as there are: all but the target's own, and one that the jackknife leaves out."""
ATTACKS: dict[str, Attack] = {
    "loss": create_attack("loss"),
    "correctness": create_attack("correctness"),
    "attack P": create_attack("attack_p"),
    "attack R": create_attack("attack_r"),
    "LiRA offline": create_attack("lira", online=False, variance="reference_code"),
    "RMIA offline": create_attack("rmia", online=False, temperature=1.0, offline_a=0.3),
    "RMIA offline, tuned": create_attack("rmia", online=False),
    "LiRA online": create_attack("lira", variance="reference_code"),
    "LiRA online, variance per example": create_attack("lira", variance="per_example"),
    "RMIA online": create_attack("rmia"),
    "BaVarIA online": create_attack("bavaria"),
    "BaVarIA offline": create_attack("bavaria", online=False),
    "LiRA offline, variance per example": create_attack("lira", online=False, variance="per_example"),
}
ALONE = ("loss", "correctness", "attack P")
"""Attacks that use no shadow models."""
BOUNDARY = "boundary distance"
TUNED_FROM = 2
"""Pairs of shadow models that tuning needs."""


class Claim(NamedTuple):
    """That one attack beats another, with m pairs of shadow models each; ``measure`` is auroc or tpr."""

    source: str
    better: str
    worse: str
    m: int
    measure: str = "auroc"


RMIA, LIRA, YE = "Zarifzadeh et al. 2024", "Carlini et al. 2022", "Ye et al. 2022"
BAVARIA, LABELS = "Brännvall 2026", "Choquette-Choo et al. 2021"
CLAIMS = (
    *(Claim(RMIA, "RMIA offline", "LiRA offline", m) for m in (1, 2, 4)),
    *(Claim(RMIA, "RMIA offline", "attack R", m) for m in (1, 2, 4)),
    Claim(RMIA, "RMIA online", "LiRA online, variance per example", MANY),
    Claim(RMIA, "RMIA online", "LiRA online, variance per example", MANY, "tpr"),
    Claim(LIRA, "LiRA online, variance per example", "loss", MANY),
    Claim(LIRA, "LiRA online, variance per example", "loss", MANY, "tpr"),
    Claim(LIRA, "LiRA online, variance per example", "attack R", MANY, "tpr"),
    Claim(LIRA, "LiRA online, variance per example", "LiRA offline, variance per example", MANY),
    Claim(YE, "attack R", "attack P", MANY),
    *(Claim(BAVARIA, "BaVarIA online", "LiRA online, variance per example", m) for m in (2, 4)),
    *(Claim(BAVARIA, "BaVarIA online", "RMIA online", m) for m in (2, 4)),
    *(Claim(BAVARIA, "BaVarIA offline", "LiRA offline, variance per example", m) for m in (2, 4)),
    Claim(LABELS, BOUNDARY, "correctness", MANY),
)
"""The order alone: these papers' numbers are of other data and networks."""
RULE = (
    "reproduced if every difference is above 0 by more than two standard errors; not if none is; else partly. With "
    "this many comparisons, one in forty of those without any difference is contradicted by luck"
)

Found = dict[tuple[str, int], dict[str, CrossedJackknife]]


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__file__, __doc__)
    made.add_argument("--queries", type=int, default=300, help="of the boundary distance attack, for each example")
    arguments = parse(made, words, data={"paper": "cifar10-wide"})
    study = Study(f"attack-order-{arguments.data}", "The published order of attacks", arguments)
    shadows = study.base
    began = time.perf_counter()
    targets = RecipeTargets.of(shadows, arguments.seed)
    pairs = len(targets) // 2
    sizes = {claim.m for claim in CLAIMS if claim.m <= pairs - 2}
    names = {name for claim in CLAIMS for name in (claim.better, claim.worse)} | {"RMIA offline, tuned"}
    found: Found = {
        (name, m): measured_by(targets, attack, m or pairs - 2)
        for name, attack in ATTACKS.items()
        for m in sorted(sizes if name not in ALONE else {MANY})
        if name in names and (m or pairs) >= _least(name)
    }
    left_out = {}
    try:
        found[BOUNDARY, MANY] = over_targets(targets, boundary_scores(study, targets))
    except ValueError as error:  # a model that gives one label to everything
        left_out = {"left_out": {BOUNDARY: str(error)}}
    study.took(study.name, time.perf_counter() - began)
    _plot(study, found, pairs)
    return _record(study, found, pairs, left_out)


def _least(name: str) -> int:
    """Pairs that an attack needs."""
    return TUNED_FROM if "tuned" in name or "per example" in name or "BaVarIA" in name else 1


def boundary_scores(study: Study, targets: RecipeTargets) -> list[Tensor]:
    """The boundary distances of the pool under each model, kept beside the audits."""
    budget = study.arguments.queries
    path = study.out / "audits" / f"{study.base.store.key}-{len(targets)}-boundary-{budget}.json"
    known: list[list[float]] = json.loads(path.read_text()) if path.is_file() else []
    images = torch.stack([image for image, _ in study.parts.pool])
    model = study.recipe().build()
    for i in range(len(known), len(targets)):
        model.load_state_dict(study.base.weights(i))
        data = TensorDataset(images, targets.targets)
        known.append(boundary_distance(model, data, budget=budget).scores.tolist())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known))
    return [torch.tensor(scores, dtype=torch.float64) for scores in known]


def _record(study: Study, found: Found, pairs: int, left_out: dict[str, Any]) -> dict[str, Any]:
    rows, words = [], []
    for claim in CLAIMS:
        better, worse = (
            found.get((name, MANY if name in (*ALONE, BOUNDARY) else claim.m)) for name in (claim.better, claim.worse)
        )
        if better is None or worse is None:
            continue
        between = better[claim.measure] - worse[claim.measure]
        reach = 2 * between.error
        words.append("yes" if between.value > reach else "no" if between.value < -reach else "undecided")
        models = "" if claim.better == BOUNDARY else str(claim.m or pairs - 2)
        names = (claim.better, claim.worse)
        measure = "AUC" if claim.measure == "auroc" else f"TPR at {FPR:.0%}"
        values = [_estimate(each[claim.measure]) for each in (better, worse)]
        rows.append([claim.source, f"{names[0]} > {names[1]}", models, measure, *values, between, words[-1]])
    for (name, m), each in found.items():
        if name == "RMIA offline, tuned":
            rows.append(["(ours)", name, str(m or pairs - 2), "AUC", _estimate(each["auroc"]), None, None, ""])
    head = ["paper", "published order", "OUT models", "measure", "first", "second", "difference", "holds here"]
    counts = {word: words.count(word) for word in ("yes", "no", "undecided")}
    word = "reproduced" if counts["yes"] == len(words) else "partly" if counts["yes"] else "not"
    sentence = (
        f"Of {len(words)} published comparisons {counts['yes']} hold by more than two standard errors, {counts['no']} "
        f"are reversed by more than two, {counts['undecided']} are undecided."
    )
    sentence += "".join(f" Left out: {name}: {why}" for each in left_out.values() for name, why in each.items())
    every = {f"{name}, {m or pairs - 2}": {k: v.value for k, v in each.items()} for (name, m), each in found.items()}
    return study.write(head, rows, {"word": word, "sentence": sentence, "rule": RULE}, attacks=every, **left_out)


def _estimate(jackknife: CrossedJackknife) -> Estimate:
    return Estimate(jackknife.value, jackknife.interval())


def _plot(study: Study, found: Found, pairs: int) -> None:
    """AUC of every attack by the number of OUT models, with the paired intervals' width left to the table."""
    with figure(study.out / f"{study.name}.png") as (axes,):
        for name in dict.fromkeys(name for name, _ in found):
            points = sorted((m or pairs - 2, each["auroc"].value) for (own, m), each in found.items() if own == name)
            if name in (*ALONE, BOUNDARY):
                axes.axhline(points[0][1], linestyle=":", label=name)
            else:
                axes.plot(*zip(*points, strict=True), "o-", label=name)
        axes.set(xlabel="OUT models of each example", ylabel="AUC", xscale="log")
        axes.legend(fontsize=5)


if __name__ == "__main__":
    main()
