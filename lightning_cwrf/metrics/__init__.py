"""Membership metrics: torchmetrics over (score, is_member), each with a confidence interval."""

from lightning_cwrf.metrics.epsilon import EpsilonLowerBound
from lightning_cwrf.metrics.functional.intervals import Interval
from lightning_cwrf.metrics.membership import (
    AttackAdvantage,
    BalancedAccuracy,
    LossGap,
    MembershipAUROC,
    MembershipMetric,
    P1Score,
    TPRAtFPR,
)

__all__ = [
    "AttackAdvantage",
    "BalancedAccuracy",
    "EpsilonLowerBound",
    "Interval",
    "LossGap",
    "MembershipAUROC",
    "MembershipMetric",
    "P1Score",
    "TPRAtFPR",
]
