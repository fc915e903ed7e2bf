"""The sides of an audit: members, non-members and a population, apart from one another and from what was trained on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lightning_cwrf.auditing.result import Estimate
from lightning_cwrf.checks import check_choice
from lightning_cwrf.data.examples import ExampleId
from lightning_cwrf.data.overlap import OVERLAPS, REMEDY, Overlap, is_ambiguous, places_among, told
from lightning_cwrf.data.seen import is_seen
from lightning_cwrf.outputs import ModelOutputs


@dataclass(frozen=True)
class Sides:
    """Outputs on each side, after what stood on two was dealt with.

    Attributes:
        kept: of ``"nonmembers"`` and ``"population"``, the places that are left where some were dropped.
        overlap: of the same, the places of examples that stand on another side too.
    """

    members: ModelOutputs
    nonmembers: ModelOutputs
    population: ModelOutputs | None
    kept: dict[str, list[int]] = field(default_factory=dict)
    overlap: dict[str, list[int]] = field(default_factory=dict)


def apart(
    members: ModelOutputs,
    nonmembers: ModelOutputs,
    population: ModelOutputs | None,
    *,
    seen: Mapping[str, Collection[ExampleId]],
    overlap: Overlap,
) -> Sides:
    """Find the examples that stand on two sides, and do with them as ``overlap`` says.

    Args:
        members: the audited model's outputs on its training examples.
        nonmembers: on examples it never saw.
        population: on further examples it never saw.
        seen: what the model has seen besides its members, by its kind.
        overlap: ``"error"``, ``"drop"`` or ``"allow"``.

    Raises:
        ValueError: examples stand on two sides, and ``overlap`` is ``"error"``; or none is left.
    """
    check_choice("overlap", overlap, OVERLAPS)
    inside = set(members.ids)
    said: list[str] = []
    places: dict[str, list[int]] = {}
    for name, outputs in (("nonmembers", nonmembers), ("population", population)):
        if outputs is None:
            continue
        others = {"members": places_among(outputs.ids, inside), **_seen(outputs, seen)}
        if name == "population":
            others["non-members too"] = places_among(outputs.ids, set(nonmembers.ids))
        by = "the same inputs and label" if outputs.keys is None else "the same key"
        said += [told(found, len(outputs), name, what, by) for what, found in others.items() if found]
        places[name] = sorted({place for found in others.values() for place in found})
    if said and overlap == "error":
        raise ValueError(f"{'; '.join(said)}: the sets must be disjoint. {REMEDY}")
    places = {name: found for name, found in places.items() if found}
    if overlap != "drop":
        return Sides(members, nonmembers, population, overlap=places)
    kept = {
        name: _but(len(outputs), places[name])
        for name, outputs in (("nonmembers", nonmembers), ("population", population))
        if outputs is not None and name in places
    }
    for name, left in kept.items():
        if not left:
            raise ValueError(f"every example of {name} stands on another side too: {'; '.join(said)}; none is left.")
    if "nonmembers" in kept:
        nonmembers = nonmembers.at(kept["nonmembers"])
    if population is not None and "population" in kept:
        population = population.at(kept["population"])
    return Sides(members, nonmembers, population, kept, places)


def _but(total: int, places: Collection[int]) -> list[int]:
    """All places below ``total`` but these."""
    left_out = set(places)
    return [place for place in range(total) if place not in left_out]


def _seen(outputs: ModelOutputs, seen: Mapping[str, Collection[ExampleId]]) -> dict[str, list[int]]:
    """Places of what the model has seen, by its kind; where content tells examples apart at all."""
    ids = list(zip(outputs.digests, outputs.targets.tolist(), strict=True))
    if outputs.keys is not None and is_ambiguous(ids):
        return {}
    return {what: [i for i, known in enumerate(ids) if is_seen(known, found)] for what, found in seen.items()}


def suspicions(sides: Sides, model: Mapping[str, Estimate], overlap: Overlap) -> list[str]:
    """What looks like a mistake, and may be none: sides on other scales, sides swapped, copies, random outputs.

    Args:
        sides: of the audit.
        model: train_accuracy, test_accuracy, train_loss, test_loss, loss_gap.
        overlap: of the audit; ``"allow"`` says that different examples share their content.
    """
    said = [
        f"{len(outputs) - len(set(outputs.ids))} of the {len(outputs)} {name} are copies of others. Intervals and "
        "p-values count each as an independent example; if copies are not meant, take them out."
        for name, outputs in (("members", sides.members), ("non-members", sides.nonmembers))
        if overlap != "allow" and is_ambiguous(outputs.ids)
    ]
    if overlap == "drop" and sides.members.keys is None and is_ambiguous(sides.members.ids):
        said += [
            f"{len(places)} of the {len(places) + len(sides.kept[name])} {name} were left out, and many members share "
            "their content with one another (categorical data?). Then those that are left differ from the members by "
            'construction, and attacks look stronger than they are: pass key=, or overlap="allow".'
            for name, places in sides.overlap.items()
        ]
    if sides.members.random:
        said.append(
            "the model gives other outputs each time for the same inputs, in eval mode too: attacks look weaker than "
            "those of somebody who asks it several times. Is there a dropout without training=self.training?"
        )
    for name, outputs in (("non-members", sides.nonmembers), ("population", sides.population)):
        here, there = sides.members.scale, None if outputs is None else outputs.scale
        if here is not None and there is not None and _differ(here, there):
            said.append(
                f"the inputs of the members have mean {here[0]:.3g} and standard deviation {here[1]:.3g}, those of the "
                f"{name} {there[0]:.3g} and {there[1]:.3g}: are both preprocessed as in training?"
            )
    relabelled = _relabelled(sides)
    if relabelled:
        said.append(
            f"{relabelled} of the {len(sides.nonmembers)} non-members have the inputs of a member and another label."
        )
    train, test = model["train_accuracy"].value, model["test_accuracy"].value
    if train < test and model["loss_gap"].interval.high < 0:
        said.append(
            f"the model does better on what it never saw than on the members (accuracy {test:.3f} against {train:.3f}, "
            f"loss {model['test_loss'].value:.3f} against {model['train_loss'].value:.3f}): are members and "
            "non-members swapped, or the members not preprocessed as in training?"
        )
    return said


def _relabelled(sides: Sides) -> int:
    """How many non-members are members by their inputs alone, where inputs tell examples apart."""
    members, nonmembers = sides.members, sides.nonmembers
    if members.keys is not None or is_ambiguous(members.digests):
        return 0
    inputs, ids = set(members.digests), set(members.ids)
    both = zip(nonmembers.digests, nonmembers.ids, strict=True)
    return sum(digest in inputs and known not in ids for digest, known in both)


def _differ(here: tuple[float, float], there: tuple[float, float]) -> bool:
    """Whether two scales (mean, standard deviation) differ by more than data of one kind do."""
    low, high = sorted((here[1], there[1]))
    return high > 4 * low or abs(here[0] - there[0]) > 4 * high
