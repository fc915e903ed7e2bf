"""The evidence of an audit: outputs of the audited model and of the shadow models on the same examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_cwrf.attacks import Evidence, PerModel
from lightning_cwrf.auditing.sides import Sides
from lightning_cwrf.shadows import ShadowOutputs


def evidence_of(sides: Sides, shadows: ShadowOutputs | None, extra: dict[str, Tensor] | None) -> Evidence:
    """The evidence on the members, followed by the non-members; ``extra`` fields are of the data before any drop."""
    members, nonmembers, population = sides.members, sides.nonmembers, sides.population
    _check_classes(sides, shadows)
    logits = torch.cat([members.logits, nonmembers.logits])
    targets = torch.cat([members.targets, nonmembers.targets])
    fields = _without_dropped(extra or {}, sides)
    if shadows is not None:
        columns = columns_of(members.digests + nonmembers.digests, targets, shadows)
        population_logits = shadows.population_logits
        if population_logits is not None and "population" in sides.kept:
            population_logits = population_logits[:, sides.kept["population"]]
        fields |= {
            "shadow_logits": PerModel(shadows.logits, columns),
            "membership": shadows.membership[:, columns],
            "shadow_population_logits": population_logits,
        }
        if shadows.view_logits is not None:
            fields["shadow_view_logits"] = PerModel(shadows.view_logits, columns)
    if population is not None:
        fields |= {"population_logits": population.logits, "population_targets": population.targets}
    return Evidence(logits, targets, **fields)


def _without_dropped(extra: dict[str, Tensor], sides: Sides) -> dict[str, Any]:
    """The extra fields without the examples that were dropped."""
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
            raise ValueError(f"the model has {own} classes on the members and {logits.shape[1]} on {name}.")
    if shadows is not None and shadows.logits.shape[-1] != own:
        raise ValueError(
            f"the audited model has {own} classes, the shadow models {shadows.logits.shape[-1]}. Train the shadow "
            "models as the audited model was trained."
        )


def columns_of(digests: list[bytes], targets: Tensor, shadows: ShadowOutputs) -> Tensor:
    """The column of each audited example in the shadow models' pool; the i-th copy of an example is the i-th there."""
    places: dict[tuple[bytes, int], list[int]] = {}
    for column, known in enumerate(zip(shadows.digests, shadows.targets.tolist(), strict=True)):
        places.setdefault(known, []).append(column)
    columns: list[int] = []
    missing: list[int] = []
    for place, known in enumerate(zip(digests, targets.tolist(), strict=True)):
        found = places.get(known)
        columns.append(found.pop(0) if found else -1)
        missing += [] if columns[-1] >= 0 else [place]
    if not missing:
        return torch.tensor(columns)
    labels: dict[bytes, set[int]] = {}
    for digest, label in places:
        labels.setdefault(digest, set()).add(label)
    flipped = [i for i in missing if digests[i] in labels and int(targets[i]) not in labels[digests[i]]]
    if flipped:
        first = flipped[0]
        raise ValueError(
            f"{len(flipped)} of the {len(columns)} audited examples have another label in the shadow models' pool "
            f"(the first, number {first} of members and non-members together, {min(labels[digests[first]])} instead "
            f"of {int(targets[first])}): attacks compare models on the same example with the same label. Use the same "
            "labels in both."
        )
    raise ValueError(
        f"{len(missing)} of the {len(columns)} audited examples are not in the pool of {len(shadows.digests)} that the "
        "shadow models were trained on (by content), or more often than there; train them on the members and the "
        "non-members, without augmentation."
    )
