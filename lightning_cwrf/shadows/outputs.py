"""What trained shadow models give: their outputs on the pool and the population."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from lightning_cwrf.data import isolated_rng
from lightning_cwrf.shadows.jobs import Recipe, View
from lightning_cwrf.shadows.pool import read_once
from lightning_cwrf.shadows.store import ShadowStore


@dataclass(frozen=True)
class ShadowOutputs:
    """Outputs of k shadow models on a pool of n examples, and on a population of m that none of them was trained on.

    Attributes:
        logits: ``(k, n, K)``, in float32 or the dtype they were stored in.
        membership: bool ``(k, n)``, True where the model was trained on the example.
        targets: ``(n,)``.
        digests: a digest of the content of each example, by which an audit finds its column.
        population: the population data set itself, for the audited model's outputs on it; or None.
        population_logits: ``(k, m, K)``, or None.
        store: the models' files, under the key of pool, population, views, recipe and seed.
        views: functions of a batch of inputs, for the audited model's outputs on these views; or empty.
        view_logits: on q augmented views of the pool, ``(k, q, n, K)``, or None.
        recipe: how the models were trained, or None.
    """

    logits: Tensor = field(repr=False)
    membership: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    digests: list[bytes] = field(repr=False)
    population: Dataset[Any] | None = field(repr=False)
    population_logits: Tensor | None = field(repr=False)
    store: ShadowStore
    views: tuple[View, ...] = field(default=(), repr=False)
    view_logits: Tensor | None = field(default=None, repr=False)
    recipe: Recipe | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.logits)

    def __repr__(self) -> str:
        others = 0 if self.population_logits is None else self.population_logits.shape[1]
        return (
            f"ShadowOutputs({len(self)} models, pool of {len(self.targets)}, population of {others}, {len(self.views)} "
            f"views, {self.logits.dtype}, {self.store.folder})"
        )

    def part(self, examples: Tensor, population: Tensor | None = None) -> ShadowOutputs:
        """The outputs on some examples of the pool, and on some of the population (None: all), by their indices.

        Raises:
            TypeError: indices that are not a tensor of integers.
            ValueError: an index that is out of range or given twice.
        """
        examples = _check_places("examples", examples, len(self.targets))
        given, outside = self.population, self.population_logits
        if population is not None:
            if given is None or outside is None:
                raise ValueError("these shadow models have no population; leave population out.")
            population = _check_places("population", population, outside.shape[1])
            given, outside = Subset(given, population.tolist()), outside[:, population]
        return replace(
            self,
            logits=self.logits[:, examples],
            membership=self.membership[:, examples],
            targets=self.targets[examples],
            digests=[self.digests[i] for i in examples.tolist()],
            population=given,
            population_logits=outside,
            view_logits=None if self.view_logits is None else self.view_logits[:, :, examples],
        )

    def read_population(self) -> tuple[Tensor, list[bytes]]:
        """The class indices ``(m,)`` and the digests of the population's examples; empty if there is none."""
        if self.population is None:
            return torch.empty(0, dtype=torch.long), []
        with isolated_rng():
            digests, targets = read_once(self.population, "population")
        return targets, digests

    def weights(self, model: int) -> dict[str, Tensor]:
        """The state dict of one shadow model; :func:`train_shadows` must have run with ``keep_weights=True``."""
        return self.store.weights(model)

    def differences(self, model: nn.Module) -> list[str]:
        """Visible differences between the training of ``model`` and that of these models.

        See :meth:`ShadowRecipe.differences`; with a recipe that is a function of your own, none can be seen.
        """
        compare = getattr(self.recipe, "differences", None)
        return [] if compare is None else list(compare(model))


def _check_places(name: str, places: Any, size: int) -> Tensor:
    if not isinstance(places, Tensor) or places.ndim != 1 or places.dtype != torch.long:
        raise TypeError(f"{name} must be indices, an int64 tensor of one dimension.")
    if (
        len(places) == 0
        or int(places.min()) < 0
        or int(places.max()) >= size
        or len(set(places.tolist())) < len(places)
    ):
        raise ValueError(f"{name} must be different indices from 0 to {size - 1}, at least one.")
    return places
