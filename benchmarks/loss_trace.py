"""How well the losses of one training find LiRA's own most exposed members, on the digits.

The unprotected classifier of ``examples/harden_digits.py`` is trained on eight balanced halves of 600 digits, 300 each,
with ``LossTraceCallback``. LiRA attacks each of them with 26 shadow models, and the k members with its highest scores
are the most exposed. Precision at k is the share of these among the k members that another score ranks highest; at
random it is k / 300. LiRA with four further shadow models is there for comparison. The table shows the mean over the
eight models and its standard error; below, Loss-TNR against the true positive rate of LiRA at the same rate, the AUC of
BMIA with one reference model, trained on 300 further digits, and the time that recording adds to a training.

    python benchmarks/loss_trace.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from few_shadows import MODELS, shadows
from lightning import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Subset

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from digits import BATCH, DigitsClassifier, digits, quiet, split

from lightning_cwrf import LossTraceCallback
from lightning_cwrf.attacks import LossTraces, bmia, laplace_outputs, lira, logit_signal
from lightning_cwrf.metrics.functional import membership_auroc, tpr_at_fpr
from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.shadows import ShadowOutputs

TARGETS, EPOCHS, FEW = 8, 60, 4
SHARES = (0.05, 0.1, 0.2)
RATES = (0.01, 0.05)
SCORES: dict[str, Callable[[LossTraces], Tensor]] = {
    "LT-IQR": LossTraces.lt_iqr,
    "mean loss over the training": lambda traces: traces.losses.double().mean(0),
    "final loss, highest first": lambda traces: traces.losses[-1].double(),
    "final loss, lowest first": lambda traces: -traces.losses[-1].double(),
}


def fit(members: Subset, callbacks: list[LossTraceCallback], seed: int) -> tuple[DigitsClassifier, float]:
    """A trained classifier, and how many seconds its training took."""
    seed_everything(seed, verbose=False)
    model = DigitsClassifier(EPOCHS)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=EPOCHS, callbacks=callbacks, enable_model_summary=False, **silent)
    began = time.perf_counter()
    trainer.fit(model, DataLoader(members, batch_size=BATCH, shuffle=True))
    return model, time.perf_counter() - began


def precision(score: Tensor, truth: Tensor, k: int) -> float:
    return len(set(score.topk(k).indices.tolist()) & set(truth.topk(k).indices.tolist())) / k


def measured(shadowed: ShadowOutputs, pool: Subset, sampled: Tensor, target: int) -> dict[tuple[str, float], float]:
    """Precision of each score at each share, and the rates, of one model."""
    inside = shadowed.membership[target]
    places = [side.nonzero().flatten() for side in (inside, ~inside)]
    members, others = (Subset(pool, side.tolist()) for side in places)
    callback = LossTraceCallback(nonmembers=others)
    model, with_traces = fit(members, [callback], 1000 + target)
    _, without = fit(members, [], 1000 + target)
    own = logit_signal(collect_outputs(model, pool).logits, shadowed.targets)
    every = logit_signal(shadowed.logits, shadowed.targets)
    rows = [row for row in range(MODELS) if row // 2 != target // 2]  # not those of this half, nor of its complement
    few, many = rows[:FEW], rows[FEW:]
    score = lira(own, every[many], shadowed.membership[many])
    light = lira(own, every[few], shadowed.membership[few])[places[0]]
    truth, traces = score[places[0]], callback.result
    found = {("time", 0.0): with_traces / without}
    for name, scores in (("LiRA, 26 shadow models", score), ("BMIA, one reference model", bmia(own, sampled)),
                         ("signal alone", own)):  # fmt: skip
        found[name, 0.5] = float(membership_auroc(scores, inside))
    for share in SHARES:
        k = round(share * len(truth))
        for name, function in SCORES.items():
            found[name, share] = precision(function(traces), truth, k)
        found[f"LiRA with {FEW} shadow models", share] = precision(light, truth, k)
    for rate in RATES:
        found["Loss-TNR", rate] = traces.loss_tnr(rate)
        found["LiRA's TPR", rate] = float(tpr_at_fpr(score, inside, rate))
    return found


def table(store: Path) -> str:
    shadowed, parts = shadows(store), split(digits(), seed=0)
    pool, others = parts.pool, Subset(parts.population, range(300))
    reference, _ = fit(others, [], 999)
    sampled = logit_signal(laplace_outputs(reference, others, pool), shadowed.targets)
    every = [measured(shadowed, pool, sampled, target) for target in range(0, 2 * TARGETS, 2)]

    def cell(name: str, at: float) -> str:
        values = torch.tensor([found[name, at] for found in every])
        return f"{values.mean():.2f} ± {values.std() / len(values) ** 0.5:.2f}"

    lines = [
        "| score | " + " | ".join(f"the {share:.0%} most exposed" for share in SHARES) + " |",
        "|---|" + "---|" * len(SHARES),
    ]
    lines += [
        f"| {name} | " + " | ".join(cell(name, share) for share in SHARES) + " |"
        for name in (*SCORES, f"LiRA with {FEW} shadow models")
    ]
    lines.append("| at random | " + " | ".join(f"{share:.2f}" for share in SHARES) + " |")
    lines += ["", "| | " + " | ".join(f"at {rate:.0%}" for rate in RATES) + " |", "|---|" + "---|" * len(RATES)]
    lines += [f"| {name} | " + " | ".join(cell(name, r) for r in RATES) + " |" for name in ("Loss-TNR", "LiRA's TPR")]
    lines += ["", "| attack | AUC |", "|---|---|"]
    lines += [f"| {name} | {cell(name, 0.5)} |" for name, at in every[0] if at == 0.5]
    return "\n".join([*lines, "", f"time of a training with the traces, of one without: {cell('time', 0.0)}"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    quiet()
    print(table(Path(sys.argv[1] if len(sys.argv) > 1 else "out/few_shadows")))
