"""Audit a random forest of scikit-learn, from its outputs alone.

    python examples/audit_forest.py

A forest memorises its training data: its trees say of nearly every member what its label is. Shadow forests are trained
on random halves of the pool of members and non-members; LiRA and RMIA compare the audited forest with them. Any other
engine that returns probabilities can take the place of the forest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from digits import digits, split
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor

from lightning_cwrf import audit_logits, probabilities_to_logits
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership


def main(arguments: argparse.Namespace) -> None:
    data = digits()
    parts = split(data, arguments.seed)
    images, labels = data.tensors[0].flatten(1).numpy(), data.tensors[1].numpy()
    inside, outside, population = (np.array(p.indices) for p in (parts.members, parts.nonmembers, parts.population))
    pool = np.concatenate([inside, outside])

    def forest(places: Any, seed: int) -> RandomForestClassifier:
        made = RandomForestClassifier(arguments.trees, min_samples_leaf=arguments.leaf, n_jobs=1, random_state=seed)
        return made.fit(images[places], labels[places])

    def logits(model: RandomForestClassifier, places: Any) -> Tensor:
        """Columns are the forest's classes, which here are 0 to 9; a vote of T trees has a resolution of 1 / T."""
        assert model.classes_.tolist() == list(range(10))
        return probabilities_to_logits(
            model.predict_proba(images[places]), floor=arguments.floor or 1 / (2 * arguments.trees)
        )

    membership = balanced_membership(arguments.shadows, len(pool), seed=arguments.seed)
    shadow_forests = [forest(pool[members.numpy()], 1 + i) for i, members in enumerate(membership)]
    shadows = ShadowOutputs.from_arrays(
        np.stack([logits(model, pool) for model in shadow_forests]),
        membership,
        labels[pool],
        population=(np.stack([logits(model, population) for model in shadow_forests]), labels[population]),
    )
    target = forest(inside, 0)
    result = audit_logits(
        members=(logits(target, inside), labels[inside]),
        nonmembers=(logits(target, outside), labels[outside]),
        population=(logits(target, population), labels[population]),
        shadows=shadows,
        attacks=["loss", "lira", "rmia"],
    )
    print(result)
    print(f"saved: {result.save(arguments.out / 'forest.json')}")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shadows", type=int, default=16, help="shadow forests, an even number")
    parser.add_argument("--trees", type=int, default=100, help="of each forest")
    parser.add_argument("--leaf", type=int, default=1, help="the fewest examples in a leaf; more leak less")
    parser.add_argument("--floor", type=float, help="what a probability of 0 counts as; by default 1 / (2 trees)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/audit_forest"))
    parser.add_argument("--quick", action="store_true", help="8 shadow forests of 20 trees: seconds, and weaker")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.shadows, arguments.trees = 8, 20
    return arguments


if __name__ == "__main__":
    main(parse_arguments())
