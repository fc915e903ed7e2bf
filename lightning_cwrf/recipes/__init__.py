"""How shadow models are trained: the user's own training, defense and CWRF, as a value that is known by its content."""

from lightning_cwrf.recipes.cwrf import CWRF
from lightning_cwrf.recipes.recipe import ShadowRecipe

__all__ = ["CWRF", "ShadowRecipe"]
