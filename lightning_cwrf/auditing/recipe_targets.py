"""The models of a recipe as the targets of attacks: their outputs, groups of examples, and measures without each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_cwrf.attacks import Evidence, PerModel, example_losses
from lightning_cwrf.metrics.functional import CrossedJackknife
from lightning_cwrf.shadows.outputs import ShadowOutputs
from lightning_cwrf.weights.trained import outcome

GROUPS = 16
"""Groups of examples that the jackknife leaves out in turn."""

Measures: TypeAlias = dict[str, float]
"""Values by name."""


class InGroups(NamedTuple):
    """The measures of one target, and those without each group of examples."""

    whole: Measures
    without_group: list[Measures]


def in_groups(measured: Callable[[Tensor], Measures], groups: Tensor) -> InGroups:
    """Measures of all examples, and of all but those of each group."""
    everything = torch.ones_like(groups, dtype=torch.bool)
    return InGroups(measured(everything), [measured(groups != g) for g in range(GROUPS)])


@dataclass(frozen=True)
class RecipeTargets:
    """The k models as targets: their outputs on the pool and on the population, and the groups of examples.

    Attributes:
        outputs: of all models, by the field of :class:`Evidence` that has them.
        membership: bool ``(k, n)``.
        targets: class indices ``(n,)``.
        population_targets: ``(m,)``.
        losses: ``(k, n + m)``, of the pool and the population.
        correct: bool ``(k, n + m)``.
        groups: ``(n + m,)``, the number of each example's group.
        identity: what two audits share that can be compared in pairs.
    """

    outputs: Mapping[str, PerModel]
    membership: Tensor
    targets: Tensor
    population_targets: Tensor
    losses: Tensor
    correct: Tensor
    groups: Tensor
    identity: tuple[Any, ...]

    @classmethod
    def of(cls, shadows: ShadowOutputs, seed: int) -> RecipeTargets:
        population_targets, population = shadows.read_population()
        examples = len(shadows.targets)
        groups = torch.cat([_groups(shadows.digests, seed), _groups(population, seed)])
        kept = [shadows.membership[:, groups[:examples] != g] for g in range(GROUPS)]
        if (
            not all((each.any(1) & ~each.all(1)).all() for each in kept)
            or len(set(groups[:examples].tolist())) < GROUPS
        ):
            raise ValueError(
                f"a pool of {examples} examples is too small for an audit of a recipe: every model needs members and "
                f"non-members in several of {GROUPS} groups of examples."
            )
        given = {
            "shadow_logits": shadows.logits,
            "shadow_population_logits": shadows.population_logits,
            "shadow_view_logits": shadows.view_logits,
        }
        sides = [(shadows.logits, shadows.targets)]
        sides += [] if shadows.population_logits is None else [(shadows.population_logits, population_targets)]
        models = range(len(shadows))
        labelled = (shadows.digests, shadows.targets.tolist(), population, population_targets.tolist())
        return cls(
            outputs={name: PerModel(each) for name, each in given.items() if each is not None},
            membership=shadows.membership,
            targets=shadows.targets,
            population_targets=population_targets,
            losses=torch.stack([torch.cat([example_losses(z[i].float(), y) for z, y in sides]) for i in models]),
            correct=torch.stack([torch.cat([z[i].argmax(-1) == y for z, y in sides]) for i in models]),
            groups=groups,
            identity=(*labelled, shadows.membership.tolist(), seed),
        )

    def __len__(self) -> int:
        return len(self.membership)

    def evidence(self, target: int) -> Evidence:
        """Of an attack on one of the models; its shadow models are all models, of which an attack gets a part."""
        own = {
            name.removeprefix("shadow_"): each[torch.tensor([target])].tensor()[0].float()
            for name, each in self.outputs.items()
        }
        if "population_logits" in own:
            own["population_targets"] = self.population_targets
        fields: dict[str, Any] = {**own, **self.outputs}
        return Evidence(targets=self.targets, membership=self.membership, **fields)

    def against(self, target: int, without: int | None = None) -> Tensor:
        """The models that attack one of them: those of the other pairs, less the pair ``without``."""
        return torch.tensor([i for i in range(len(self)) if i // 2 not in (target // 2, without)])

    def of_models(self) -> dict[str, CrossedJackknife]:
        """The metrics of the models themselves."""
        found = []
        for losses, correct, members in zip(self.losses, self.correct, self.membership, strict=True):
            inside = torch.zeros(len(self.groups), dtype=torch.bool)
            inside[: len(members)] = members

            def measured(
                kept: Tensor, losses: Tensor = losses, correct: Tensor = correct, inside: Tensor = inside
            ) -> Measures:
                train, test = inside & kept, ~inside & kept
                train_loss, test_loss = losses[train].mean(), losses[test].mean()
                return {
                    "train_accuracy": float(correct[train].double().mean()),
                    "test_accuracy": float(correct[test].double().mean()),
                    "train_loss": float(train_loss),
                    "test_loss": float(test_loss),
                    "loss_gap": float(test_loss - train_loss),
                }

            found.append(in_groups(measured, self.groups))
        return jackknives_of(found)

    def accuracy(self, target: int, kept: Tensor) -> float:
        """Of one model on the ``kept`` examples that it never saw."""
        unseen = kept.clone()
        unseen[: len(self.targets)] &= ~self.membership[target]
        return float(self.correct[target][unseen].double().mean())

    def remarks(self) -> list[str]:
        """Probable mistakes."""
        logits = self.outputs["shadow_logits"]
        for i, members in enumerate(self.membership):
            remark = outcome(logits[torch.tensor([i])].tensor()[0][members].float(), self.targets[members]).remark
            if remark is not None:
                return [f"model {i}: {remark}"]
        return []

    def digest(self) -> str:
        """What two audits share that can be compared in pairs."""
        return hashlib.blake2b(repr(self.identity).encode(), digest_size=16).hexdigest()


def jackknives_of(
    found: Sequence[InGroups], without_pair: Sequence[Sequence[Measures]] | None = None
) -> dict[str, CrossedJackknife]:
    """Every measure's mean over the targets; ``without_pair`` has the measures of the other targets for each pair."""
    made = {}
    for name in found[0].whole:
        whole = torch.tensor([each.whole[name] for each in found], dtype=torch.float64).view(-1, 2).mean(1)
        without = torch.tensor([[g[name] for g in each.without_group] for each in found], dtype=torch.float64)
        cells = GROUPS * whole[:, None] - (GROUPS - 1) * without.view(-1, 2, GROUPS).mean(1)
        if without_pair is None:
            left = (whole.sum() - whole) / (len(whole) - 1)
        else:
            left = torch.tensor([sum(m[name] for m in each) / len(each) for each in without_pair], dtype=torch.float64)
        made[name] = CrossedJackknife(float(whole.mean()), left, cells)
    return made


def _groups(digests: Sequence[bytes], seed: int) -> Tensor:
    """Random groups of equal size; copies of an example are in the same one."""
    first: dict[bytes, int] = {}
    numbers = torch.tensor([first.setdefault(digest, len(first)) for digest in digests], dtype=torch.long)
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed)) % GROUPS
    return order[numbers]
