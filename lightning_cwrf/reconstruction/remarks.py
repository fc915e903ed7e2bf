"""What makes a reconstruction audit weaker than it looks, or its comparison doubtful."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster import hierarchy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

LARGEST = 1000
"""Members times other classes: beyond it no published attack of this kind has succeeded."""
CONVERGED = 0.25
"""A rule of thumb: an attack whose residual is above this share of the truth's gains from more steps.

In ``benchmarks/reconstruction.py``, after 4,000 steps of training, shares up to 0.18 came with 14 to 20 hits of 20, one
of 0.3 with 5, and shares above 0.5 with at most one.
"""
HOLDS = 0.5
"""A rule of thumb: the equation does not hold where the members themselves leave more of the weights unexplained.

In ``benchmarks/reconstruction.py`` the members leave 0.05 after 150 steps of training, and 0.998 before the first.
"""
NEAR = 0.05
"""Examples are near copies if their distance is below this share of the usual one (:func:`near_copies`)."""
LEVEL = 0.01
"""Of the test of the labels: so often the labels of sides that are drawn at random are a remark."""
_DRAWS = 999


def of_size(members: int, classes: int) -> list[str]:
    """More members and classes than this attack was ever seen to succeed with."""
    if members * (classes - 1) <= LARGEST:
        return []
    return [
        f"{members} members and {classes} classes: this attack was never seen to succeed at this size (members × other "
        f"classes above {LARGEST}); that it finds nothing shows nothing."
    ]


def of_layers(model: nn.Module) -> list[str]:
    """Layers that compute otherwise in training than in evaluation: the equation of the latter does not hold."""
    found = [
        f"{name or 'the model'} ({type(layer).__name__})"
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        or (isinstance(layer, _InstanceNorm) and layer.track_running_stats)
        or (isinstance(layer, _DropoutNd) and layer.p > 0)
    ]
    if not found:
        return []
    listed = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return [
        f"the network has layers that compute otherwise in training than in evaluation: {listed}. The attack's "
        "equation is that of the network in evaluation, and holds only if these layers were in eval mode throughout "
        "the training. Otherwise, that the attack finds nothing shows nothing."
    ]


def of_labels(members: Tensor, nonmembers: Tensor) -> list[str]:
    """Labels in other proportions on the two sides than a draw of the members from one pool gives."""
    p_value = labels_p_value(members, nonmembers)
    if p_value > LEVEL:
        return []
    classes = int(torch.cat([members, nonmembers]).max()) + 1
    here, there = (side.bincount(minlength=classes) / len(side) for side in (members, nonmembers))
    most = int((here - there).abs().argmax())
    return [
        f"the labels of members and non-members are in different proportions (p = {p_value:.2g}; of class {most} are "
        f"{here[most]:.0%} of the members and {there[most]:.0%} of the non-members). The p-values and the "
        "finding suppose that the members are a random draw of one pool: where the classes differ, members can be told "
        "apart without any training on them. Draw members and non-members from one pool, class by class or at random."
    ]


def labels_p_value(members: Tensor, nonmembers: Tensor) -> float:
    """How often a random draw of members from the pool has labels so far from the pool's proportions.

    Pearson's statistic against 999 draws from the multivariate hypergeometric distribution, with the observed one among
    them: a valid p-value for counts of any size, at least 0.001. The draws are the same in each call.

    >>> labels_p_value(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 0, 1, 2]))
    1.0
    >>> labels_p_value(torch.zeros(20, dtype=torch.long), torch.ones(20, dtype=torch.long))
    0.001
    """
    both = torch.cat([members, nonmembers])
    own, total = (side.bincount(minlength=int(both.max()) + 1).numpy() for side in (members, both))
    own, total = own[total > 0], total[total > 0]
    expected = total * (len(members) / total.sum())
    draws = np.random.default_rng(0).multivariate_hypergeometric(total, len(members), size=_DRAWS)
    observed, drawn = (((each - expected) ** 2 / expected).sum(-1) for each in (own, draws))
    return float(1 + (drawn >= observed - 1e-9).sum()) / (1 + _DRAWS)


def of_near_copies(inputs: Tensor, members: int) -> list[str]:
    """Examples that have a near copy, if they are one in twenty of a side."""
    near = near_copies(inputs)
    sizes = members, len(inputs) - members
    counts = int(near[:members].sum()), int(near[members:].sum())
    if all(count < 0.05 * size for count, size in zip(counts, sizes, strict=True)):
        return []
    return [
        f"{counts[0]} of the {sizes[0]} members and {counts[1]} of the {sizes[1]} non-members have a near copy: "
        f"another example at less than {NEAR:.0%} of the usual distance between neighbours. A reconstruction claims "
        "one of them only if it is much more exact than that. So their claims are undercounted, and the finding may "
        "miss members that are reconstructed, or the level of chance. Keep one example of each such group."
    ]


def near_copies(inputs: Tensor) -> Tensor:
    """Bool ``(p,)``: which examples have another nearer than 5 % of the usual distance between neighbours.

    The usual one is the upper quartile of the edges of the pool's minimum spanning tree, so that it stays what it is
    where every example has a copy or two. In pools of 60 digits, irises, wines or tumours (scaled) no example is one.

    >>> near_copies(torch.tensor([[0.0], [1.0], [1.001], [2.0], [3.0]])).tolist()
    [False, True, True, False, False]
    """
    points = inputs.detach().cpu().double().flatten(1).numpy()
    merged = hierarchy.linkage(points, "single")  # its heights are the tree's edges, in order
    nearest = np.zeros(len(points))
    for place in merged[:, :2].T.astype(int):
        own = place < len(points)  # an example's first merge is that with its nearest neighbour
        nearest[place[own]] = merged[own, 2]
    return torch.from_numpy(nearest < NEAR * np.quantile(merged[:, 2], 0.75))


def of_attack(residual: float, truth: float, least_margin: float) -> list[str]:
    """A training that is not that of the equation, and a search that is too short."""
    found = []
    if least_margin <= 0:
        found.append(
            "the model does not give every member its label (the least margin is not positive). Without weight decay "
            "the equation supposes a training that does."
        )
    if truth > HOLDS:
        found.append(
            f"the attack's equation does not hold for the members themselves (they leave {truth:.4f} of the weights "
            "unexplained, where 1 is all): the training was too short, or not that of the equation, by SGD on "
            "cross-entropy with the weight decay given, of all these weights, and of the network as it is in "
            "evaluation. That the attack finds nothing shows nothing, and more steps= do not help."
        )
    elif residual > CONVERGED * truth:
        found.append(
            f"the attack's residual, {residual:.4f}, is not far below that of the members themselves, "
            f"{truth:.4f}: a longer search with the same prior may find members. Pass more steps=."
        )
    return found
