"""The sides of an audit: members, non-members and a population, disjoint from one another and from other seen data."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lightning_cwrf.auditing.values import Estimate
from lightning_cwrf.checks import check_choice
from lightning_cwrf.data.examples import ExampleId
from lightning_cwrf.data.overlap import OVERLAPS, REMEDY, Overlap, is_ambiguous, places_among, told
from lightning_cwrf.data.seen import is_seen
from lightning_cwrf.outputs import ModelOutputs
from lightning_cwrf.weights.trained import outcome


@dataclass(frozen=True)
class Sides:
    """Outputs on each side, after examples on two sides were handled.

    Attributes:
        kept: for ``"nonmembers"`` and ``"population"``, the indices that are left if some were dropped.
        overlap: for the same, the indices of examples that are on another side too.
    """

    members: ModelOutputs
    nonmembers: ModelOutputs
    population: ModelOutputs | None
    kept: dict[str, list[int]] = field(default_factory=dict)
    overlap: dict[str, list[int]] = field(default_factory=dict)
    members_seen: dict[str, int] = field(default_factory=dict)


def apart(
    members: ModelOutputs,
    nonmembers: ModelOutputs,
    population: ModelOutputs | None,
    *,
    seen: Mapping[str, Collection[ExampleId]],
    overlap: Overlap,
) -> Sides:
    """Find examples that are on two sides, or ``seen`` by the model (by kind), and handle them as ``overlap`` says."""
    check_choice("overlap", overlap, OVERLAPS)
    inside = set(members.ids)
    messages: list[str] = []
    overlaps: dict[str, list[int]] = {}
    others = {"nonmembers": nonmembers} if population is None else {"nonmembers": nonmembers, "population": population}
    for name, outputs in others.items():
        found = {"members": places_among(outputs.ids, inside), **_seen(outputs, seen)}
        if name == "population":
            found["non-members too"] = places_among(outputs.ids, set(nonmembers.ids))
        by = "the same inputs and label" if outputs.keys is None else "the same key"
        messages += [told(places, len(outputs), name, what, by) for what, places in found.items() if places]
        if together := sorted(set().union(*found.values())):
            overlaps[name] = together
    if messages and overlap == "error":
        raise ValueError(f"{'; '.join(messages)}: the sets must be disjoint. {REMEDY}")
    members_seen = {what: len(places) for what, places in _seen(members, seen).items() if places}
    if overlap != "drop":
        return Sides(members, nonmembers, population, overlap=overlaps, members_seen=members_seen)
    kept = {name: sorted(set(range(len(others[name]))).difference(places)) for name, places in overlaps.items()}
    for name, left in kept.items():
        if not left:
            raise ValueError(
                f"every example of {name} is on another side too: {'; '.join(messages)}; none is left to audit with."
            )
        others[name] = others[name].at(left)
    return Sides(members, others["nonmembers"], others.get("population"), kept, overlaps, members_seen)


def examples_digest(sides: Sides) -> str:
    """A digest of the inputs of members and non-members, in order."""
    made = hashlib.blake2b(digest_size=16)
    for outputs in (sides.members, sides.nonmembers):
        made.update(repr(outputs.digests).encode())
    return made.hexdigest()


def _seen(outputs: ModelOutputs, seen: Mapping[str, Collection[ExampleId]]) -> dict[str, list[int]]:
    """Indices of examples that the model has seen, by kind; none if content does not identify examples."""
    ids = list(zip(outputs.digests, outputs.targets.tolist(), strict=True))
    if outputs.keys is not None and is_ambiguous(ids):
        return {}
    return {what: [i for i, known in enumerate(ids) if is_seen(known, found)] for what, found in seen.items()}


def suspicions(sides: Sides, model: Mapping[str, Estimate], overlap: Overlap) -> list[str]:
    """Probable mistakes: sides of different scale, swapped sides, copies, random outputs, an untrained model."""
    remarks = [
        f"{len(outputs) - len(set(outputs.ids))} of the {len(outputs)} {name} are copies of others. Intervals and "
        "p-values count each as an independent example; remove copies if they are unintended."
        for name, outputs in (("members", sides.members), ("non-members", sides.nonmembers))
        if overlap != "allow" and is_ambiguous(outputs.ids)
    ]
    remarks += [
        f"{count} of the {len(sides.members)} members are {what}: the audit is of these, and not of the data that were "
        "to be protected. Pass members=, the examples that the model, or its teacher, was trained on."
        for what, count in sides.members_seen.items()
        if 2 * count > len(sides.members)  # fewer are copies, which the check of that other data is about
    ]
    if overlap == "drop" and sides.members.keys is None and is_ambiguous(sides.members.ids):
        remarks += [
            f"{len(places)} of the {len(places) + len(sides.kept[name])} {name} were left out, and many members share "
            "their content with one another (categorical data?). The examples that are left then differ from the "
            'members by construction, and attacks look stronger than they are: pass key=, or overlap="allow".'
            for name, places in sides.overlap.items()
        ]
    if sides.members.random:
        remarks.append(
            "the model gives other outputs each time for the same inputs, in eval mode too: attacks look weaker than "
            "those of an attacker who queries it several times. Is there a dropout without training=self.training?"
        )
    untrained = outcome(sides.members.logits, sides.members.targets).remark
    if untrained is not None:
        remarks.append(untrained)
    for name, outputs in (("non-members", sides.nonmembers), ("population", sides.population)):
        here, there = sides.members.scale, None if outputs is None else outputs.scale
        if here is not None and there is not None and _differ(here, there):
            remarks.append(
                f"the inputs of the members have mean {here[0]:.3g} and standard deviation {here[1]:.3g}, those of the "
                f"{name} {there[0]:.3g} and {there[1]:.3g}: are both preprocessed as in training?"
            )
    relabelled = _relabelled(sides)
    if relabelled:
        remarks.append(
            f"{relabelled} of the {len(sides.nonmembers)} non-members have the inputs of a member and another label."
        )
    train, test = model["train_accuracy"].value, model["test_accuracy"].value
    if train < test and model["loss_gap"].interval.high < 0:
        remarks.append(
            f"the model does better on examples that it never saw than on the members (accuracy {test:.3f} against "
            f"{train:.3f}, loss {model['test_loss'].value:.3f} against {model['train_loss'].value:.3f}): are members "
            "and non-members swapped, or the members not preprocessed as in training?"
        )
    return remarks


def _relabelled(sides: Sides) -> int:
    """How many non-members have the inputs of a member and another label, if inputs identify examples."""
    members, nonmembers = sides.members, sides.nonmembers
    if members.keys is not None or is_ambiguous(members.digests):
        return 0
    inputs, ids = set(members.digests), set(members.ids)
    both = zip(nonmembers.digests, nonmembers.ids, strict=True)
    return sum(digest in inputs and known not in ids for digest, known in both)


def _differ(here: tuple[float, float], there: tuple[float, float]) -> bool:
    """Whether two scales (mean, standard deviation) differ more than those of data of one kind."""
    low, high = sorted((here[1], there[1]))
    return high > 4 * low or abs(here[0] - there[0]) > 4 * high
