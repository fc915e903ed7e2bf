"""Membership metrics as functions of (score, is_member); see :mod:`lightning_cwrf.metrics` for the classes."""

from lightning_cwrf.metrics.functional.intervals import Interval, clopper_pearson
from lightning_cwrf.metrics.functional.roc import (
    attack_advantage,
    loss_gap,
    membership_auroc,
    membership_roc,
    p1_score,
    tpr_at_fpr,
)

__all__ = [
    "Interval",
    "attack_advantage",
    "clopper_pearson",
    "loss_gap",
    "membership_auroc",
    "membership_roc",
    "p1_score",
    "tpr_at_fpr",
]
