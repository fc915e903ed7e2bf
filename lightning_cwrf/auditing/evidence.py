"""What an attacker sees of the two sides, with the shadow models' outputs on the very same examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_cwrf.attacks import Evidence, PerModel
from lightning_cwrf.auditing.sides import Sides
from lightning_cwrf.shadows import ShadowOutputs


def evidence_of(sides: Sides, shadows: ShadowOutputs | None, extra: dict[str, Tensor] | None) -> Evidence:
    """The evidence on the members and then the non-members.

    Args:
        sides: outputs of the audited model.
        shadows: signals of shadow models whose pool holds every member and non-member.
        extra: further fields of :class:`~lightning_cwrf.attacks.Evidence` on the data as they were given.

    Raises:
        ValueError: other classes than the shadow models', an example that is not in their pool, or one whose label
            there is another.
    """
    members, nonmembers, population = sides.members, sides.nonmembers, sides.population
    _check_classes(sides, shadows)
    logits = torch.cat([members.logits, nonmembers.logits])
    targets = torch.cat([members.targets, nonmembers.targets])
    given = _kept(extra or {}, sides)
    if shadows is not None:
        columns = columns_of(members.digests + nonmembers.digests, targets, shadows)
        others = shadows.population_logits
        if others is not None and "population" in sides.kept:
            others = others[:, sides.kept["population"]]
        given |= {
            "shadow_logits": PerModel(shadows.logits, columns),
            "membership": shadows.membership[:, columns],
            "shadow_population_logits": others,
        }
        if shadows.view_logits is not None:
            given["shadow_view_logits"] = PerModel(shadows.view_logits, columns)
    if population is not None:
        given |= {"population_logits": population.logits, "population_targets": population.targets}
    return Evidence(logits, targets, **given)


def _kept(extra: dict[str, Tensor], sides: Sides) -> dict[str, Any]:
    """Further fields without the examples that were dropped."""
    fields: dict[str, Any] = dict(extra)
    places = sides.kept.get("nonmembers")
    if places is not None:
        chosen = [*range(len(sides.members)), *(len(sides.members) + i for i in places)]
        fields |= {name: fields[name][chosen] for name in ("inputs",) if name in fields}
        fields |= {name: fields[name][:, chosen] for name in ("view_logits",) if name in fields}
    if "population" in sides.kept and "population_inputs" in fields:
        fields["population_inputs"] = fields["population_inputs"][sides.kept["population"]]
    return fields


def _check_classes(sides: Sides, shadows: ShadowOutputs | None) -> None:
    own = sides.members.logits.shape[1]
    others = {"the non-members": sides.nonmembers.logits}
    if sides.population is not None:
        others["the population"] = sides.population.logits
    for name, logits in others.items():
        if logits.shape[1] != own:
            raise ValueError(f"the model gives {own} classes on the members and {logits.shape[1]} on {name}.")
    if shadows is not None and shadows.logits.shape[-1] != own:
        raise ValueError(
            f"the audited model has {own} classes, the shadow models {shadows.logits.shape[-1]}: they are another kind "
            "of model. Train shadow models as the audited one was."
        )


def columns_of(digests: list[bytes], targets: Tensor, shadows: ShadowOutputs) -> Tensor:
    """Where in the shadow models' pool each audited example is; the i-th copy of an example is the i-th in the pool.

    Raises:
        ValueError: some are not there, or stand there with another label.
    """
    places: dict[tuple[bytes, int], list[int]] = {}
    for column, known in enumerate(zip(shadows.digests, shadows.targets.tolist(), strict=True)):
        places.setdefault(known, []).append(column)
    columns: list[int] = []
    lost: list[int] = []
    for place, known in enumerate(zip(digests, targets.tolist(), strict=True)):
        found = places.get(known)
        columns.append(found.pop(0) if found else -1)
        lost += [] if columns[-1] >= 0 else [place]
    if not lost:
        return torch.tensor(columns)
    labels: dict[bytes, set[int]] = {}
    for digest, label in places:
        labels.setdefault(digest, set()).add(label)
    flipped = [i for i in lost if digests[i] in labels and int(targets[i]) not in labels[digests[i]]]
    if flipped:
        first = flipped[0]
        raise ValueError(
            f"{len(flipped)} of the {len(columns)} audited examples stand in the shadow models' pool with another "
            f"label (the first, at place {first} of members and non-members together, with "
            f"{min(labels[digests[first]])} instead of {int(targets[first])}): attacks compare models on the same "
            "example with the same label. Give both the same labels."
        )
    raise ValueError(
        f"{len(lost)} of the {len(columns)} audited examples are not in the pool of {len(shadows.digests)} that the "
        "shadow models were trained on (by content), or more often than there; train them on the members and the "
        "non-members, read without augmentation."
    )
