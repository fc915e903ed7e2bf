"""How shadow models are trained: the user's own training, defense and CWRF, as a value identified by its content."""

from typing import TYPE_CHECKING

from lightning_cwrf._deprecated import renamed_names
from lightning_cwrf.recipes.cwrf import CWRFConfig
from lightning_cwrf.recipes.recipe import ShadowRecipe
from lightning_cwrf.recipes.selena import SELENARecipe

__all__ = ["CWRFConfig", "SELENARecipe", "ShadowRecipe"]

if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, CWRF="CWRFConfig")
