"""The attacks that the Adversarial Robustness Toolbox has too, on the same outputs: agreement, AUC and time.

Its attacks get the outputs of the shadow models of ``few_shadows.py`` as predictions, so that both sides use the same
signals. Needs ``pip install adversarial-robustness-toolbox``. It has no LiRA and no RMIA.

    python benchmarks/peers.py --store out/few_shadows
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from art.attacks.inference.membership_inference import MembershipInferenceBlackBox, MembershipInferenceBlackBoxRuleBased
from art.estimators.classification import PyTorchClassifier
from few_shadows import TARGETS, shadows
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cwrf.attacks import Evidence, create_attack
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.shadows import ShadowOutputs

BUDGET = 14


def estimator(classes: int) -> PyTorchClassifier:
    """What its attacks ask for, and do not use where they get predictions."""
    return PyTorchClassifier(nn.Identity(), nn.CrossEntropyLoss(), input_shape=(classes,), nb_classes=classes)


def theirs_neural(shadowed: ShadowOutputs, target: int, others: list[int]) -> Tensor:
    """Its network on predictions and labels, trained on the outputs of the shadow models."""
    logits, membership = shadowed.logits[others], shadowed.membership[others]
    predictions = F.softmax(logits, -1)
    classes = logits.shape[-1]
    labels = F.one_hot(shadowed.targets, classes).expand(len(others), -1, -1)
    attack = MembershipInferenceBlackBox(estimator(classes))
    sides = [(predictions[side].numpy(), labels[side].float().numpy()) for side in (membership, ~membership)]
    (inside, y), (outside, test_y) = sides
    attack.fit(x=inside, y=y, test_x=outside, test_y=test_y, pred=inside, test_pred=outside)
    own = F.softmax(shadowed.logits[target], -1).numpy()
    found = attack.infer(x=own, y=labels[0].float().numpy(), pred=own, probabilities=True)
    return torch.from_numpy(np.asarray(found)).flatten()


def theirs_correct(shadowed: ShadowOutputs, target: int, others: list[int]) -> Tensor:
    classes = shadowed.logits.shape[-1]
    own = shadowed.logits[target].numpy()
    attack = MembershipInferenceBlackBoxRuleBased(estimator(classes))
    return torch.from_numpy(attack.infer(own, F.one_hot(shadowed.targets, classes).float().numpy())).flatten()


def ours(name: str) -> Callable[[ShadowOutputs, int, list[int]], Tensor]:
    attack = create_attack(name)

    def scores(shadowed: ShadowOutputs, target: int, others: list[int]) -> Tensor:
        evidence = Evidence(
            logits=shadowed.logits[target],
            targets=shadowed.targets,
            shadow_logits=shadowed.logits[others],
            membership=shadowed.membership[others],
        )
        return attack(evidence)

    return scores


PAIRS = {
    "correctness | rule based": (ours("correctness"), theirs_correct),
    "neural | black box, neural network": (ours("neural"), theirs_neural),
}


def table(store: Path, targets: int) -> str:
    shadowed = shadows(store)
    others = list(range(TARGETS, TARGETS + BUDGET))
    lines = [
        "| ours | theirs | rank correlation | AUC, ours | AUC, theirs | CPU seconds, ours | theirs |",
        "|---" * 7 + "|",
    ]
    for names, pair in PAIRS.items():
        aucs: list[list[float]] = [[], []]
        seconds, alike = [0.0, 0.0], []
        for target in range(targets):
            found = []
            for side, attack in enumerate(pair):
                began = time.process_time()
                found.append(attack(shadowed, target, others).double())
                seconds[side] += time.process_time() - began
                aucs[side].append(float(membership_auroc(found[-1], shadowed.membership[target])))
            alike.append(float(spearmanr(*found).statistic))
        numbers = [f"{np.mean(alike):.3f}", *(f"{np.mean(each):.3f}" for each in aucs)]
        numbers += [f"{each / targets:.3g}" for each in seconds]
        lines.append(f"| {' | '.join([names, *numbers])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("out/few_shadows"))
    parser.add_argument("--targets", type=int, default=TARGETS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(table(arguments.store, arguments.targets))
