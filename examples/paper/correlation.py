"""Fig. 3 and Table 1: are privacy vulnerability and learnability scores correlated, by kind of weight?

Three controls. Eq. 4 contains the members' loss, so its scores resemble learnability by construction: λ = 1 leaves that
loss out. Both scores are products with |θ|: the magnitude alone against learnability. And learnability scored twice, on
other batches, is the most that a correlation can be.

    python examples/paper/correlation.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from comparing import of_models
from lightning.pytorch import LightningModule
from study import Study, parse, parser
from tables import figure
from torch import Tensor
from torch.utils.data import Subset

from lightning_cwrf.auditing import Estimate
from lightning_cwrf.shadows.jobs import seed_all
from lightning_cwrf.shadows.train import model_seed
from lightning_cwrf.weights import (
    capture,
    learnability_scores,
    privacy_vulnerability_scores,
    score_correlation,
    weight_kinds,
)

ALL, CONTROLS = "privacy and learnability", ("privacy with λ = 1", "magnitude", "learnability, other batches")
PAPER = {
    "resnet18": {"all": 0.8329, "conv": 0.9410, "linear": 0.8096, "norm": 0.6776},
    "vit": {"all": 0.7667, "attention+MLP": 0.9068, "linear": 0.8642, "norm": 0.7336},
}
"""Of the paper's networks; a smaller one is set beside the one of its kind."""
BESIDE = {"digits": "resnet18", "mlp": None, "resnet8": "resnet18", "resnet18": "resnet18", "vit": "vit"}
RULE = (
    "reproduced if the correlation over all weights is above 0.5 with λ = 1 too, by more than two standard errors; "
    "partly if it is with the published λ alone; else not"
)


def finished_models(study: Study) -> Iterator[tuple[LightningModule, dict[str, Tensor], Subset[Any]]]:
    """Each finished model with its initial weights and its members."""
    for i, inside in enumerate(study.base.membership):
        seed_all(model_seed(study.arguments.seed, i))
        model = study.recipe().build()
        initial = capture(model)
        model.load_state_dict(study.base.weights(i))
        yield model, initial, Subset(study.parts.pool, inside.nonzero().flatten().tolist())


def scores_of(
    study: Study, model: LightningModule, initial: Mapping[str, Tensor], members: Subset[Any], seed: int
) -> dict[str, dict[str, Tensor]]:
    """Learnability scores, those that are compared with them, and the vulnerability scores."""
    found, steps = {}, study.task.steps
    for name, lam in ((ALL, study.task.lam), (CONTROLS[0], 1.0)):
        torch.manual_seed(seed)  # of the batches
        found[name] = privacy_vulnerability_scores(
            model, dict(initial), members, study.parts.reference, lam=lam, steps=steps
        )
    for name, of_batches in (("learnability", seed), (CONTROLS[2], seed + 1)):
        torch.manual_seed(of_batches)
        found[name] = learnability_scores(model, members, steps=steps)
    found[CONTROLS[1]] = {name: model.get_parameter(name).detach().abs() for name in found["learnability"]}
    return found


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse(parser(__file__, __doc__), words)
    study = Study(f"correlation-{arguments.data}", "Correlation of the two scores", arguments)
    of_scores = f"{study.base.store.key}-{study.task.lam:g}-{study.task.steps}"
    path = study.out / f"{study.name}-{of_scores}.scores.json"
    known: list[dict[str, dict[str, float]]] = json.loads(path.read_text()) if path.is_file() else []
    began, last = time.perf_counter(), None
    for i, (model, initial, members) in enumerate(finished_models(study)):
        last = model, initial, members
        if i < len(known):
            continue
        scores = scores_of(study, *last, seed=i)
        one = scores["learnability"]
        known.append({what: score_correlation(scores[what], one, model) for what in (ALL, *CONTROLS)})
        path.write_text(json.dumps(known, indent=1))
    study.took(study.name, time.perf_counter() - began)
    assert last is not None
    scores = scores_of(study, *last, seed=study.task.models - 1)
    _plot(study, last[0], scores[ALL], scores["learnability"])
    return _record(study, last[0], known[: study.task.models])


def _record(study: Study, model: LightningModule, known: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    kinds, sizes = weight_kinds(model), {}
    for name, kind in kinds.items():
        for each in (kind, "all"):
            sizes[each] = sizes.get(each, 0) + model.get_parameter(name).numel()
    beside = PAPER.get(BESIDE[study.task.network] or "", {})
    means: dict[str, dict[str, Estimate]] = {
        what: {kind: of_models([each[what][kind] for each in known]) for kind in known[0][ALL]}
        for what in (ALL, *CONTROLS)
    }
    rows = [
        [kind, f"{sizes[kind] / sizes['all']:.2%}", *(means[what][kind] for what in means), beside.get(kind)]
        for kind in sorted(known[0][ALL], key=lambda kind: -sizes[kind])
    ]
    alone, plain = means[CONTROLS[0]]["all"], means[ALL]["all"]
    word = "reproduced" if alone.interval.low > 0.5 else "partly" if plain.interval.low > 0.5 else "not"
    sentence = (
        f"Over all weights the two scores correlate by {plain}; without the members' loss in Eq. 4 (λ = 1) by {alone}, "
        f"where the weights' magnitude and learnability do by {means[CONTROLS[1]]['all']}."
    )
    head = ["kind of weight", "share", ALL, *CONTROLS, "the paper's, " + (BESIDE[study.task.network] or "none")]
    return study.write(head, rows, {"word": word, "sentence": sentence, "rule": RULE})


def _plot(study: Study, model: LightningModule, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    kinds = weight_kinds(model)
    with figure(study.out / f"{study.name}.png", len(set(kinds.values()))) as panels:
        for axes, kind in zip(panels, dict.fromkeys(kinds.values()), strict=True):
            x, y = (torch.cat([scores[n].flatten() for n in a if kinds[n] == kind]) for scores in (a, b))
            axes.plot(x, y, ".", markersize=2)
            axes.set(title=kind, xlabel="privacy vulnerability", ylabel="learnability")


if __name__ == "__main__":
    main()
