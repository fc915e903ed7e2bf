"""The attacks that the Adversarial Robustness Toolbox has too, on the same outputs: agreement, AUC and time.

Its attacks get the outputs of the shadow models of ``few_shadows.py`` as predictions, so that both sides use the same
signals. Needs ``pip install adversarial-robustness-toolbox``. It has no LiRA and no RMIA. HopSkipJump, the engine of
its label-only attack, runs on one of the models, and ours with the number of queries that it used.

    python benchmarks/peers.py --store out/few_shadows
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from art.attacks.evasion import HopSkipJump
from art.attacks.inference.membership_inference import MembershipInferenceBlackBox, MembershipInferenceBlackBoxRuleBased
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier
from few_shadows import MODELS, TARGETS, recipe_and_data, shadows
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_cwrf import train_shadows
from lightning_cwrf.attacks import Evidence, boundary_distance, create_attack
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


def boundary(store: Path, examples: int = 60, iterations: int = 10) -> str:
    """Distances to the boundary: theirs is that of the last point, ours of the nearest that was asked about."""
    recipe, pool, population = recipe_and_data()
    shadowed = train_shadows(recipe, pool, MODELS, population=population, store=store, stack=16, keep_weights=True)
    model = recipe.build().eval()
    model.load_state_dict(shadowed.weights(0))
    images, labels = torch.stack([pool[i][0] for i in range(examples)]), shadowed.targets[:examples]
    asked = 0

    def one_hot(points: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked += len(points)
        with torch.no_grad():
            return F.one_hot(model(torch.from_numpy(points)).argmax(-1), 10).float().numpy()

    classifier = BlackBoxClassifier(one_hot, images.shape[1:], 10, clip_values=(0, 1))
    began = time.process_time()
    np.random.seed(0)  # noqa: NPY002 - it draws from the global state
    attack = HopSkipJump(classifier, max_iter=iterations, init_eval=25, max_eval=1000, verbose=False)
    theirs = torch.from_numpy(attack.generate(images.numpy()) - images.numpy()).flatten(1).norm(dim=1).double()
    middle, queries = time.process_time(), asked // examples
    found = boundary_distance(model, TensorDataset(images, labels), budget=queries, clip=(0, 1))
    ended = time.process_time()
    right = found.scores > 0  # theirs does not look at labels
    alike = float(spearmanr(found.scores[right], theirs[right]).statistic)
    ours, other = float(found.scores[right].mean()), float(theirs[right].mean())
    return (
        f"HopSkipJump, {examples} examples, {queries} queries each: rank correlation {alike:.3f}, mean distance "
        f"{ours:.3f} ours, {other:.3f} theirs; CPU seconds {ended - middle:.2g} ours, {middle - began:.2g} theirs"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("out/few_shadows"))
    parser.add_argument("--targets", type=int, default=TARGETS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(boundary(arguments.store))
    print(boundary(arguments.store, 30, 50))
    print(table(arguments.store, arguments.targets))
