"""An audit of persons: the scores of several examples of one person become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from lightning_cwrf.arrays import labels_of
from lightning_cwrf.auditing.estimates import attack_metrics, estimates_of
from lightning_cwrf.checks import check_choice


def at_user_level(
    groups: Any,
    *,
    scores: Mapping[str, Tensor],
    is_member: Tensor,
    targets: Tensor,
    losses: Tensor,
    accuracy: float,
    confidence: float,
    combine: str | Mapping[str, str],
) -> tuple[dict[str, Any], str]:
    """The fields of an :class:`AuditResult` of persons, and a remark; see :meth:`AuditResult.user_level`."""
    ways = _ways(list(scores), combine)
    labels = labels_of(groups, len(targets), "groups")
    inside, outside = (
        {label for label, m in zip(labels, is_member.tolist(), strict=True) if m is side} for side in (True, False)
    )
    both = [label for label in dict.fromkeys(labels) if label in inside and label in outside]
    if both:
        raise ValueError(
            f"{len(both)} groups have members and non-members ({', '.join(map(repr, both[:5]))}): whether such a "
            "person was trained on has no answer. Audit those of whom all examples are on one side."
        )
    numbers: dict[Any, int] = {}
    places = torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels])
    sizes = places.bincount().double()

    members = torch.zeros(len(sizes), dtype=torch.bool)
    members[places[is_member]] = True
    _check_sizes(sizes, members)

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, places, values.double()) / sizes

    combined = {name: mean(each) * (sizes if ways[name] == "sum" else 1) for name, each in scores.items()}
    undefined = [name for name, each in combined.items() if each.isnan().any()]
    if undefined:
        raise ValueError(f"a person has infinite scores of both signs by {', '.join(undefined)}: there is no mean.")
    lowest, highest = (
        torch.zeros(len(sizes), dtype=torch.long).scatter_reduce_(0, places, targets, how, include_self=False)
        for how in ("amin", "amax")
    )

    def estimates(each: Tensor) -> dict[str, Any]:
        metrics = attack_metrics(accuracy, 0, confidence, accuracy_examples=int((~is_member).sum()))
        return estimates_of(metrics, each, members, confidence)

    fields = {
        "scores": combined,
        "is_member": members,
        "targets": torch.where(lowest == highest, lowest, -1),
        "losses": mean(losses),
        "estimates": {name: estimates(each) for name, each in combined.items()},
        "examples": "",
    }
    few, many = int(sizes.min()), int(sizes.max())
    return fields, (
        f"at the level of users: {len(sizes)} persons with {few} to {many} of the {len(labels)} examples each. The "
        "metrics of the model itself are of examples."
    )


def _check_sizes(sizes: Tensor, members: Tensor) -> None:
    """Raise where members have visibly more, or fewer, examples than non-members: the number alone tells them apart."""
    inside, outside = sizes[members], sizes[~members]
    if len(inside) and len(outside) and stats.ks_2samp(inside.numpy(), outside.numpy()).pvalue < 0.05:
        raise ValueError(
            f"a member has {float(inside.mean()):.3g} examples on average and a non-member "
            f"{float(outside.mean()):.3g}: the spread of a mean, and the size of a sum, tell them apart without any "
            "leak, or hide one. Audit equally many examples of each person."
        )


def _ways(attacks: list[str], combine: str | Mapping[str, str]) -> dict[str, str]:
    """How the scores of each attack are combined."""
    given = combine if isinstance(combine, Mapping) else dict.fromkeys(attacks, combine)
    for attack, way in given.items():
        check_choice("an attack in combine", attack, attacks)
        check_choice("combine", way, ("mean", "sum"))
    return {attack: given.get(attack, "mean") for attack in attacks}
