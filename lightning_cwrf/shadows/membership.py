"""Which model is trained on which example."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_cwrf.checks import check_integer


def balanced_membership(models: int, examples: int, seed: int = 0) -> Tensor:
    """Membership such that every example is IN for exactly half of the models, and every model has half the examples.

    Models come in pairs: the first of a pair is trained on a random half of the pool, the second on the other half.
    Each pair depends on ``seed`` and its own number alone, so asking for more models later keeps the first ones.

    Args:
        models: an even number of shadow models, k.
        examples: n.
        seed: of the halves.

    Returns:
        bool of shape ``(k, n)``.

    >>> membership = balanced_membership(4, 6)
    >>> membership.sum(0).tolist(), membership.sum(1).tolist()
    ([2, 2, 2, 2, 2, 2], [3, 3, 3, 3])
    """
    check_integer("the number of shadow models", models)
    check_integer("the number of examples", examples)
    check_integer("seed", seed, low=0)
    if models < 2 or models % 2:
        raise ValueError(f"the number of shadow models must be even and at least 2, not {models}: half of them are IN.")
    if examples < 2:
        raise ValueError(f"a pool needs at least 2 examples, not {examples}.")
    rows = []
    for pair in range(models // 2):
        order = np.random.default_rng([seed, pair]).permutation(examples)
        half = torch.zeros(examples, dtype=torch.bool)
        half[torch.from_numpy(order[: examples // 2])] = True
        rows += [half, ~half]
    return torch.stack(rows)
