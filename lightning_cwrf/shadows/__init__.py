"""Shadow models: trained by the same recipe as the audited model, on known halves of a pool of examples."""

from lightning_cwrf.shadows.jobs import Recipe
from lightning_cwrf.shadows.membership import balanced_membership
from lightning_cwrf.shadows.train import ShadowSignals, train_shadows

__all__ = ["Recipe", "ShadowSignals", "balanced_membership", "train_shadows"]
