"""Shadow models: trained by the recipe of the audited model, on known halves of a pool of examples."""

from typing import TYPE_CHECKING

from lightning_cwrf._deprecated import renamed_names
from lightning_cwrf.shadows.jobs import Recipe
from lightning_cwrf.shadows.membership import balanced_membership
from lightning_cwrf.shadows.outputs import ShadowOutputs
from lightning_cwrf.shadows.train import train_shadows

__all__ = ["Recipe", "ShadowOutputs", "balanced_membership", "train_shadows"]

if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, ShadowSignals="ShadowOutputs")
