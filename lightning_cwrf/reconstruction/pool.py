"""The members and non-members of a reconstruction audit, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.auditing.audited import AuditedData
from lightning_cwrf.classification import split_batch
from lightning_cwrf.data import Batches, as_loader, bring_to, isolated_rng
from lightning_cwrf.data.examples import ExampleId
from lightning_cwrf.data.overlap import places_among, told
from lightning_cwrf.data.seen import is_seen
from lightning_cwrf.outputs import ModelOutputs
from lightning_cwrf.reconstruction.homogeneity import Degree, degree_of
from lightning_cwrf.reconstruction.prior import ReconstructionPrior
from lightning_cwrf.reconstruction.remarks import of_labels, of_layers, of_near_copies, of_size


@dataclass(frozen=True)
class ReconstructionData:
    """Checked members and non-members, each example once, as the model takes them.

    Attributes:
        inputs: float64, members first, ``(n + k, ...)``.
        targets: of the members, ``(n,)``.
        classes: K.
        degree: of the network at the time.
        remarks: about the data and the network.
    """

    inputs: Tensor
    targets: Tensor
    classes: int
    degree: Degree
    remarks: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> tuple[int, int]:
        """The members and the non-members."""
        return len(self.targets), len(self.inputs) - len(self.targets)


def reconstruction_data(
    model: nn.Module,
    data: AuditedData,
    prior: ReconstructionPrior,
    transfer: Callable[[Any], Any] | None = None,
) -> ReconstructionData:
    """Read and check the data of an audit."""
    data.check(transfer)
    outputs = data.outputs(model, transfer)
    _check_apart(outputs["members"], outputs["nonmembers"], outputs["seen"])
    remarks, kept, parts = [], [], []
    for name, side, batches in (
        ("members", outputs["members"], data.members),
        ("non-members", outputs["nonmembers"], data.nonmembers),
    ):
        inputs = _inputs(model, batches, name, transfer)
        places = _distinct(side)
        if len(places) < len(inputs):
            remarks.append(
                f"{len(inputs) - len(places)} of the {len(inputs)} {name} are copies of others, and are left out: no "
                "reconstruction is nearer to one of two equal examples."
            )
        kept.append(places)
        parts.append(inputs[places])
    n, k = map(len, kept)
    if n < 2 or k < n:
        raise ValueError(
            f"there are {n} different members and {k} different non-members: the level of chance needs at least two "
            "members and as many non-members. Pass more nonmembers=."
        )
    if parts[0].shape[1:] != parts[1].shape[1:]:
        raise ValueError(f"members and non-members have inputs of different shapes, {_shapes(parts)}.")
    prior.check_shape(tuple(parts[0].shape[1:]))
    members: ModelOutputs = outputs["members"]
    classes = members.logits.shape[1]
    targets = members.targets[kept[0]]
    remarks += of_near_copies(torch.cat(parts), n)
    remarks += of_labels(targets, outputs["nonmembers"].targets[kept[1]])
    remarks += of_size(n, classes)
    remarks += of_layers(model)
    degree = degree_of(model, tuple(parts[0].shape[1:]))
    return ReconstructionData(torch.cat(parts), targets, classes, degree, remarks)


def _check_apart(members: ModelOutputs, nonmembers: ModelOutputs, seen: Mapping[str, Collection[ExampleId]]) -> None:
    """Raise a ValueError for non-members that are members, by their inputs, or that the model has seen otherwise."""
    found = {"members": places_among(nonmembers.digests, set(members.digests))}
    for what, known in seen.items():
        found[what] = [place for place, each in enumerate(nonmembers.ids) if is_seen(each, known)]
    for what, places in found.items():
        if places:
            message = told(places, len(nonmembers), "nonmembers", what, "the same inputs")
            raise ValueError(f"{message}: leave them out, so that chance is measured on examples the model never saw.")


def _distinct(side: ModelOutputs) -> list[int]:
    """The first place of each content."""
    first: dict[bytes, int] = {}
    for place, digest in enumerate(side.digests):
        first.setdefault(digest, place)
    return list(first.values())


def _shapes(parts: list[Tensor]) -> str:
    return " and ".join(str(tuple(each.shape[1:])) for each in parts)


def _inputs(model: nn.Module, data: Batches, name: str, transfer: Callable[[Any], Any] | None) -> Tensor:
    """All inputs as the model takes them, float64 ``(n, ...)`` on the CPU."""
    bring = bring_to(model, transfer)
    rows: list[Tensor] = []
    with isolated_rng():
        for batch in as_loader(data, shuffle=False):
            inputs, _ = split_batch(bring(batch))
            if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
                what = f"of {inputs.dtype}" if isinstance(inputs, Tensor) else f"a {type(inputs).__name__}"
                raise TypeError(
                    f"the inputs of {name} must be one float tensor, which an attack can move, not {what}: batches "
                    "are (inputs, targets). Convert them in the data set."
                )
            if rows and inputs.shape[1:] != rows[0].shape[1:]:
                raise ValueError(f"{name} have inputs of different shapes, {_shapes([rows[0], inputs])}.")
            rows.append(inputs.detach().double().cpu())
    return torch.cat(rows)
