"""An audit of one model: the attacks run, measured with intervals, and kept as a result."""

from lightning_cwrf.audit.estimates import FPRS, attack_metrics
from lightning_cwrf.audit.result import FPR, AuditResult, Estimate, Exposed, aligned
from lightning_cwrf.audit.run import attack_scores, audit, audit_outputs

__all__ = [
    "FPR",
    "FPRS",
    "AuditResult",
    "Estimate",
    "Exposed",
    "aligned",
    "attack_metrics",
    "attack_scores",
    "audit",
    "audit_outputs",
]
