"""Audit results made by hand."""

import math

import torch

from lightning_cwrf.auditing import AuditResult, Estimate
from lightning_cwrf.metrics import Interval


def estimate(value, low, high, **more):
    return Estimate(value, Interval(low, high), **more)


def made(auc=0.75, low=0.6, high=0.9, n=6, **changes):
    """A result by hand: two attacks on n members and n non-members."""
    is_member = torch.arange(2 * n) < n
    scores = {"loss": torch.linspace(-1, 1, 2 * n, dtype=torch.float64), "lira": torch.arange(2.0 * n).sqrt()}
    values = {
        "auroc": estimate(auc, low, high, p_value=0.01, shadow_interval=Interval(0.55, 0.95)),
        "tpr_at_fpr_0.001": estimate(0.1, 0.0, 0.2, note="too few"),
        "advantage": estimate(0.4, 0.1, 0.7),
        "epsilon_lower_bound": estimate(1.5, 1.5, math.inf),
    }
    whole = {
        "scores": scores,
        "is_member": is_member,
        "targets": torch.arange(2 * n) % 3,
        "losses": torch.rand(2 * n, dtype=torch.float64),
        "estimates": {"loss": dict(values), "lira": dict(values)},
        "model": {"train_accuracy": estimate(1.0, 0.9, 1.0), "loss_gap": estimate(0.1, -math.inf, math.inf)},
        "confidence": 0.95,
        "failures": {"rmia": "no population"},
    }
    return AuditResult(**{**whole, **changes})
