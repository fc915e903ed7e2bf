"""Private fine-tuning by draws of a quadratic exponential mechanism with public curvature, and its exact accounting."""

from lightning_cwrf.mechanism.curvature import PublicCurvature, public_curvature
from lightning_cwrf.mechanism.draw import clipped_sum, exponential_mechanism, quadratic_draw
from lightning_cwrf.mechanism.gradients import Subspace, example_gradients
from lightning_cwrf.mechanism.spent import GaussianLedger, PrivacySpent

__all__ = [
    "GaussianLedger",
    "PrivacySpent",
    "PublicCurvature",
    "Subspace",
    "clipped_sum",
    "example_gradients",
    "exponential_mechanism",
    "public_curvature",
    "quadratic_draw",
]
