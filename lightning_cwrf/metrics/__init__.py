"""Membership metrics: torchmetrics over (score, is_member), each with a confidence interval and a p-value."""

from importlib import import_module
from pkgutil import iter_modules

from lightning_cwrf.metrics.base import AuditContext, MembershipMetric, available_metrics, register_metric
from lightning_cwrf.metrics.epsilon import EpsilonLowerBound, MuLowerBound
from lightning_cwrf.metrics.functional.intervals import Interval
from lightning_cwrf.metrics.membership import (
    AttackAdvantage,
    BalancedAccuracy,
    LossGap,
    MembershipAUROC,
    TPRAtFPR,
)
from lightning_cwrf.metrics.p1 import P1Score

# So that a new metric is one file: importing it registers it.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "AttackAdvantage",
    "AuditContext",
    "BalancedAccuracy",
    "EpsilonLowerBound",
    "Interval",
    "LossGap",
    "MembershipAUROC",
    "MembershipMetric",
    "MuLowerBound",
    "P1Score",
    "TPRAtFPR",
    "available_metrics",
    "register_metric",
]
