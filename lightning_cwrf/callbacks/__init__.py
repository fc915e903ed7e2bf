"""Lightning callbacks: glue over scores, masks, vanilla weights and audits; no formula is in this subpackage."""

from lightning_cwrf.callbacks.audit import MIAAuditCallback
from lightning_cwrf.callbacks.defense import DefenseCallback
from lightning_cwrf.callbacks.exponential import ExponentialMechanismCallback
from lightning_cwrf.callbacks.finished import FinishedWeightsCallback
from lightning_cwrf.callbacks.gradient_mask import GradientMaskCallback
from lightning_cwrf.callbacks.loss_trace import LossTraceCallback
from lightning_cwrf.callbacks.reconstruction import ReconstructionAuditCallback
from lightning_cwrf.callbacks.rewind import CriticalRewindCallback
from lightning_cwrf.callbacks.scoring import PrivacyScoringCallback
from lightning_cwrf.callbacks.snapshot import VanillaSnapshotCallback

__all__ = [
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
]
