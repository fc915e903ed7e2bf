"""Make a finished PyTorch Lightning classifier safer against membership inference, and measure by how much."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_cwrf._version import __version__

if TYPE_CHECKING:
    from lightning_cwrf.audit import AuditResult
    from lightning_cwrf.callbacks import (
        CriticalRewindCallback,
        GradientMaskCallback,
        MIAAuditCallback,
        PrivacyScoringCallback,
        VanillaSnapshotCallback,
    )
    from lightning_cwrf.canaries import insert_canaries
    from lightning_cwrf.defenses import DefenseMixin, RelaxLossMixin
    from lightning_cwrf.masks import WeightMask
    from lightning_cwrf.overlap import without_overlap
    from lightning_cwrf.recipes import CWRF, ShadowRecipe
    from lightning_cwrf.scores import learnability_scores, privacy_vulnerability_scores, score_correlation
    from lightning_cwrf.shadows import train_shadows

# Public names and where they live. Each is imported on first use, so that importing the package is fast.
_HOMES = {
    "CWRF": "recipes",
    "AuditResult": "audit",
    "CriticalRewindCallback": "callbacks",
    "DefenseMixin": "defenses",
    "GradientMaskCallback": "callbacks",
    "MIAAuditCallback": "callbacks",
    "PrivacyScoringCallback": "callbacks",
    "RelaxLossMixin": "defenses",
    "ShadowRecipe": "recipes",
    "VanillaSnapshotCallback": "callbacks",
    "WeightMask": "masks",
    "insert_canaries": "canaries",
    "learnability_scores": "scores",
    "privacy_vulnerability_scores": "scores",
    "score_correlation": "scores",
    "train_shadows": "shadows",
    "without_overlap": "data",
}

__all__ = [
    "CWRF",
    "AuditResult",
    "CriticalRewindCallback",
    "DefenseMixin",
    "GradientMaskCallback",
    "MIAAuditCallback",
    "PrivacyScoringCallback",
    "RelaxLossMixin",
    "ShadowRecipe",
    "VanillaSnapshotCallback",
    "WeightMask",
    "__version__",
    "insert_canaries",
    "learnability_scores",
    "privacy_vulnerability_scores",
    "score_correlation",
    "train_shadows",
    "without_overlap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
