"""Make a finished PyTorch Lightning classifier safer against membership inference, and measure by how much."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_cwrf import _deprecated
from lightning_cwrf._version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_cwrf.arrays import probabilities_to_logits as probabilities_to_logits
    from lightning_cwrf.attacks import create_attack as create_attack
    from lightning_cwrf.auditing import AuditResult as AuditResult
    from lightning_cwrf.auditing import RecipeAudit as RecipeAudit
    from lightning_cwrf.auditing import audit as audit
    from lightning_cwrf.auditing import audit_logits as audit_logits
    from lightning_cwrf.auditing import audit_recipe as audit_recipe
    from lightning_cwrf.auditing import example_risk as example_risk
    from lightning_cwrf.auditing import insert_canaries as insert_canaries
    from lightning_cwrf.callbacks import CriticalRewindCallback as CriticalRewindCallback
    from lightning_cwrf.callbacks import DefenseCallback as DefenseCallback
    from lightning_cwrf.callbacks import ExponentialMechanismCallback as ExponentialMechanismCallback
    from lightning_cwrf.callbacks import FinishedWeightsCallback as FinishedWeightsCallback
    from lightning_cwrf.callbacks import GradientMaskCallback as GradientMaskCallback
    from lightning_cwrf.callbacks import LossTraceCallback as LossTraceCallback
    from lightning_cwrf.callbacks import MIAAuditCallback as MIAAuditCallback
    from lightning_cwrf.callbacks import PrivacyScoringCallback as PrivacyScoringCallback
    from lightning_cwrf.callbacks import ReconstructionAuditCallback as ReconstructionAuditCallback
    from lightning_cwrf.callbacks import VanillaSnapshotCallback as VanillaSnapshotCallback
    from lightning_cwrf.data import without_overlap as without_overlap
    from lightning_cwrf.defenses import CCL as CCL
    from lightning_cwrf.defenses import DMP as DMP
    from lightning_cwrf.defenses import DPSGD as DPSGD
    from lightning_cwrf.defenses import HAMP as HAMP
    from lightning_cwrf.defenses import PAST as PAST
    from lightning_cwrf.defenses import SELENA as SELENA
    from lightning_cwrf.defenses import AdversarialRegularization as AdversarialRegularization
    from lightning_cwrf.defenses import AdversarialRegularizationMixin as AdversarialRegularizationMixin
    from lightning_cwrf.defenses import CCLMixin as CCLMixin
    from lightning_cwrf.defenses import ConfidencePenalty as ConfidencePenalty
    from lightning_cwrf.defenses import ConfidencePenaltyMixin as ConfidencePenaltyMixin
    from lightning_cwrf.defenses import Defense as Defense
    from lightning_cwrf.defenses import DefenseMixin as DefenseMixin
    from lightning_cwrf.defenses import DMPMixin as DMPMixin
    from lightning_cwrf.defenses import DPSGDMixin as DPSGDMixin
    from lightning_cwrf.defenses import HAMPMixin as HAMPMixin
    from lightning_cwrf.defenses import LabelSmoothing as LabelSmoothing
    from lightning_cwrf.defenses import LabelSmoothingMixin as LabelSmoothingMixin
    from lightning_cwrf.defenses import MixupMMD as MixupMMD
    from lightning_cwrf.defenses import MixupMMDMixin as MixupMMDMixin
    from lightning_cwrf.defenses import PASTMixin as PASTMixin
    from lightning_cwrf.defenses import RelaxLoss as RelaxLoss
    from lightning_cwrf.defenses import RelaxLossMixin as RelaxLossMixin
    from lightning_cwrf.defenses import SELENAMixin as SELENAMixin
    from lightning_cwrf.defenses import WeightPenalty as WeightPenalty
    from lightning_cwrf.defenses import WeightPenaltyMixin as WeightPenaltyMixin
    from lightning_cwrf.defenses import create_defense as create_defense
    from lightning_cwrf.exporting import export as export
    from lightning_cwrf.preflight import check as check
    from lightning_cwrf.recipes import CWRFConfig as CWRFConfig
    from lightning_cwrf.recipes import SELENARecipe as SELENARecipe
    from lightning_cwrf.recipes import ShadowRecipe as ShadowRecipe
    from lightning_cwrf.reconstruction import ReconstructionPrior as ReconstructionPrior
    from lightning_cwrf.reconstruction import ReconstructionResult as ReconstructionResult
    from lightning_cwrf.reconstruction import audit_reconstruction as audit_reconstruction
    from lightning_cwrf.searching import RecipeSearch as RecipeSearch
    from lightning_cwrf.searching import default_candidates as default_candidates
    from lightning_cwrf.searching import search_recipes as search_recipes
    from lightning_cwrf.shadows import train_shadows as train_shadows
    from lightning_cwrf.weights import WeightMask as WeightMask
    from lightning_cwrf.weights import learnability_scores as learnability_scores
    from lightning_cwrf.weights import privacy_vulnerability_scores as privacy_vulnerability_scores
    from lightning_cwrf.weights import score_correlation as score_correlation

# The public names by subpackage. Each subpackage is imported on first use, so that importing this one is fast.
_PUBLIC = {
    "arrays": ("probabilities_to_logits",),
    "attacks": ("create_attack",),
    "auditing": (
        "AuditResult",
        "RecipeAudit",
        "audit",
        "audit_logits",
        "audit_recipe",
        "example_risk",
        "insert_canaries",
    ),
    "callbacks": (
        "CriticalRewindCallback",
        "DefenseCallback",
        "ExponentialMechanismCallback",
        "FinishedWeightsCallback",
        "GradientMaskCallback",
        "LossTraceCallback",
        "MIAAuditCallback",
        "PrivacyScoringCallback",
        "ReconstructionAuditCallback",
        "VanillaSnapshotCallback",
    ),
    "data": ("without_overlap",),
    "defenses": (
        "AdversarialRegularization",
        "AdversarialRegularizationMixin",
        "CCL",
        "CCLMixin",
        "ConfidencePenalty",
        "ConfidencePenaltyMixin",
        "DMP",
        "DMPMixin",
        "DPSGD",
        "DPSGDMixin",
        "Defense",
        "DefenseMixin",
        "HAMP",
        "HAMPMixin",
        "LabelSmoothing",
        "LabelSmoothingMixin",
        "MixupMMD",
        "MixupMMDMixin",
        "PAST",
        "PASTMixin",
        "RelaxLoss",
        "RelaxLossMixin",
        "SELENA",
        "SELENAMixin",
        "WeightPenalty",
        "WeightPenaltyMixin",
        "create_defense",
    ),
    "exporting": ("export",),
    "preflight": ("check",),
    "recipes": ("CWRFConfig", "SELENARecipe", "ShadowRecipe"),
    "reconstruction": ("ReconstructionPrior", "ReconstructionResult", "audit_reconstruction"),
    "searching": ("RecipeSearch", "default_candidates", "search_recipes"),
    "shadows": ("train_shadows",),
    "weights": ("WeightMask", "learnability_scores", "privacy_vulnerability_scores", "score_correlation"),
}
_SUBPACKAGES = {*_PUBLIC, "classification", "mechanism", "metrics", "outputs", "report"}
_HOMES = {name: home for home, names in _PUBLIC.items() for name in names}

__all__ = sorted(["__version__", *_HOMES])

_deprecated.install()
_renamed = _deprecated.renamed_names(__name__, CWRF="CWRFConfig")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    return _renamed(name, stacklevel=4)


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBPACKAGES})
