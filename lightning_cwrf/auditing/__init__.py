"""An audit of one model: the attacks run, measured with intervals, and kept as a result."""

from lightning_cwrf.auditing.canaries import Canaries, insert_canaries
from lightning_cwrf.auditing.estimates import FPRS, attack_metrics
from lightning_cwrf.auditing.example_risk import ExampleRisk, example_risk
from lightning_cwrf.auditing.logits import audit_logits
from lightning_cwrf.auditing.recipe_audit import audit_recipe
from lightning_cwrf.auditing.recipe_result import Difference, RecipeAudit
from lightning_cwrf.auditing.result import AuditResult
from lightning_cwrf.auditing.run import attack_scores, audit, audit_outputs
from lightning_cwrf.auditing.slices import Slice, Slices
from lightning_cwrf.auditing.tables import aligned
from lightning_cwrf.auditing.values import FPR, Estimate, Exposed

__all__ = [
    "FPR",
    "FPRS",
    "AuditResult",
    "Canaries",
    "Difference",
    "Estimate",
    "ExampleRisk",
    "Exposed",
    "RecipeAudit",
    "Slice",
    "Slices",
    "aligned",
    "attack_metrics",
    "attack_scores",
    "audit",
    "audit_logits",
    "audit_outputs",
    "audit_recipe",
    "example_risk",
    "insert_canaries",
]
