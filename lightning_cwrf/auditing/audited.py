"""The data of an audit: what can be audited, and what the model and its attacks get of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_cwrf.attacks import Attack
from lightning_cwrf.attacks.augmentation import default_views
from lightning_cwrf.checks import check_choice
from lightning_cwrf.data import Batches, Key, Overlap, check_side
from lightning_cwrf.data.overlap import OVERLAPS
from lightning_cwrf.data.sampling import support
from lightning_cwrf.data.seen import seen_by
from lightning_cwrf.outputs import collect_inputs, collect_outputs, collect_view_logits
from lightning_cwrf.shadows.outputs import ShadowOutputs


@dataclass(frozen=True)
class AuditedData:
    """Members, non-members and a population, as :func:`~lightning_cwrf.auditing.audit` takes them."""

    members: Batches
    nonmembers: Batches
    population: Batches | None = None
    key: Key | None = None
    overlap: Overlap = "error"

    def __post_init__(self) -> None:
        check_choice("overlap", self.overlap, OVERLAPS)

    @property
    def sides(self) -> dict[str, Batches]:
        """The data by the name of their argument."""
        sides = {"members": self.members, "nonmembers": self.nonmembers}
        return sides if self.population is None else {**sides, "population": self.population}

    def check(self, transfer: Callable[[Any], Any] | None = None) -> None:
        """Raise if data cannot be audited: random augmentation, one-shot iterators, several loaders."""
        for name, data in self.sides.items():
            check_side(data, name, transfer)

    def outputs(self, model: nn.Module, transfer: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """The arguments of :func:`audit_outputs` that depend on the data: outputs on each side, and their overlap."""
        sides = {
            name: collect_outputs(model, data, name=name, transfer=transfer, key=self.key, repeat=name == "members")
            for name, data in self.sides.items()
        }
        return {**sides, "seen": seen_by(model), "overlap": self.overlap}

    def extra(
        self,
        model: nn.Module,
        attacks: Sequence[Attack],
        shadows: ShadowOutputs | None,
        views: Sequence[Callable[[Tensor], Tensor]] | None,
    ) -> dict[str, Tensor]:
        """What some attacks need beyond outputs: inputs, and outputs on augmented views."""
        if views is not None and (not isinstance(views, Sequence) or not views or not all(map(callable, views))):
            raise TypeError("views must be a list of functions of a batch of inputs, at least one.")
        needs = {need for attack in attacks for need in attack.needs}
        both = [self.members, self.nonmembers]
        extra: dict[str, Tensor] = {}
        if "inputs" in needs:
            extra["inputs"] = torch.cat([collect_inputs(data) for data in both])
            if self.population is not None:
                extra["population_inputs"] = collect_inputs(self.population)
        if "views" in needs:
            if shadows is not None and shadows.views:
                if views is not None:
                    raise ValueError("the shadow models have views of their own, which are used; leave views out.")
                views = shadows.views
            views = default_views() if views is None else views
            extra["view_logits"] = torch.cat([collect_view_logits(model, data, views) for data in both], 1)
        return extra


def warn_of_draws(members: Batches) -> None:
    """Warn if a pass over the members' loader leaves many of them out; the number of passes is unknown."""
    if not isinstance(members, DataLoader) or isinstance(members.dataset, IterableDataset):
        return
    given = support(members)
    if given.unseen(1) > 0.1:
        warnings.warn(
            f"the members' loader draws examples at random, and a pass leaves out {given.unseen(1):.0%} of its "
            f"{len(given.places)} examples. All of them count as members, also those that the training never drew: "
            "pass members= the examples that it was trained on.",
            stacklevel=3,
        )
