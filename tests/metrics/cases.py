"""Scores and metrics for the tests of metrics."""

import torch
from hypothesis import strategies as st
from scipy import stats

from lightning_cwrf.metrics import AuditContext
from lightning_cwrf.metrics.base import METRICS

levels = st.sampled_from([0.5, 0.8, 0.95, 0.99])
NULLS = 200


def examples(n=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    is_member = torch.rand(n, generator=g) < 0.5
    return torch.randn(n, generator=g) + is_member, is_member


def groups(seed, m, n, levels=None, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(m + n, generator=generator, dtype=torch.float64)
    scores[:m] += shift
    if levels:
        scores = (scores * levels).round()
    return scores, torch.arange(m + n) < m


def null(run):
    return groups(1000 + run, 60, 80)


def floats(bounds):
    return tuple(float(bound) for bound in bounds)


def instances(sync_on_compute=False):
    """New metrics by name: every registered one, as an audit makes it or, if audits do not, by its defaults."""
    context = AuditContext(accuracy=0.9, sync_on_compute=sync_on_compute)
    return {name: metric for cls in METRICS for name, metric in (cls.for_audit(context) or {cls.name: cls()}).items()}


def is_calibrated(name):
    """Whether p-values below 5 % (of a bound: values above 0) come in at most 5 % of audits of noise."""
    found = 0
    for run in range(NULLS):
        metric = instances()[name]
        metric.update(*null(run))
        p_value = metric.p_value()
        found += float(metric.compute()) > 0 if p_value is None else p_value < 0.05
    return found <= stats.binom.ppf(0.9999, NULLS, 0.05)
