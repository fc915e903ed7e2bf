"""What trained shadow models give: their outputs on the pool and the population."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_cwrf.shadows.jobs import Recipe, View
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

    def weights(self, model: int) -> dict[str, Tensor]:
        """The state dict of one shadow model; :func:`train_shadows` must have run with ``keep_weights=True``."""
        return self.store.weights(model)

    def differences(self, model: nn.Module) -> list[str]:
        """Visible differences between the training of ``model`` and that of these models.

        See :meth:`ShadowRecipe.differences`; with a recipe that is a function of your own, none can be seen.
        """
        compare = getattr(self.recipe, "differences", None)
        return [] if compare is None else list(compare(model))
