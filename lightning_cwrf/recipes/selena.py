"""SELENA as a recipe: an ensemble of shadow models, distilled into one model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import LightningModule
from torch.utils.data import Dataset

from lightning_cwrf.checks import check_integer
from lightning_cwrf.defenses import SELENA
from lightning_cwrf.recipes.recipe import ShadowRecipe
from lightning_cwrf.shadows import train_shadows


@dataclass(frozen=True)
class SELENARecipe:
    """Trains a model by SELENA (Tang et al. 2022): Split-AI's ensemble first, by the shadow engine, then the model.

    Calling it with the training data and a seed gives the protected model. As the recipe of
    :func:`~lightning_cwrf.train_shadows` it gives shadow models that know the defense: each trains an ensemble of its
    own, so that k shadow models take (``models`` + 1) · k trainings.

    Args:
        recipe: how each model of the ensemble, and the distilled one, is trained: without a defense and CWRF.
        models: of the ensemble, an even number; each example is unknown to half of them. Published: 25, of which 10.
        stack: how many models of the ensemble to train as one (:class:`~lightning_cwrf.ShadowRecipe`).

    Raises:
        TypeError: ``recipe`` is no :class:`~lightning_cwrf.ShadowRecipe`, or a number is of the wrong type.
        ValueError: a recipe with a defense or CWRF; an odd number of models.

    >>> SELENARecipe(ShadowRecipe(LightningModule, {"max_epochs": 1}, batch_size=32)).models
    20
    """

    recipe: ShadowRecipe
    models: int = 20
    stack: int = 1

    def __post_init__(self) -> None:
        given: Any = self.recipe
        if not isinstance(given, ShadowRecipe):
            raise TypeError(f"recipe must be a ShadowRecipe, not a {type(given).__name__}.")
        if self.recipe.defense is not None or self.recipe.cwrf is not None:
            raise ValueError("the recipe must have no defense and no CWRF: SELENA is the defense.")
        check_integer("models", self.models, low=2)
        if self.models % 2:
            raise ValueError(f"models must be even, because shadow models come in pairs, not {self.models}.")
        check_integer("stack", self.stack, low=1)

    def __call__(self, members: Dataset[Any], seed: int) -> LightningModule:
        """Train one model.

        Args:
            members: its training examples; they must read the same every time.
            seed: of the ensemble and of the model.
        """
        halves = replace(self.recipe, examples=None)  # the ensemble is no attack, so its sizes may differ from it
        with TemporaryDirectory() as folder:
            ensemble = train_shadows(
                halves, members, self.models, store=folder, seed=seed, workers=1, stack=self.stack, progress=False
            )
        distilled = replace(self.recipe, defense=SELENA(ensemble=ensemble))
        return distilled(members, seed)
