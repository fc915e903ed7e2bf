"""The lower bound on ε as a metric."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_cwrf.checks import check_confidence, check_number
from lightning_cwrf.metrics.base import AuditContext, MembershipMetric, register_metric
from lightning_cwrf.metrics.functional import Interval, clopper_pearson, epsilon_lower_bound


@register_metric("epsilon_lower_bound")
class EpsilonLowerBound(MembershipMetric):
    """A lower bound on the training's ε (:func:`~lightning_cwrf.metrics.functional.epsilon_lower_bound`).

    The threshold is chosen on one half of the examples and measured on the other. The interval extends from the bound
    to infinity: an audit gives no upper bound.

    Args:
        delta: δ.
        confidence: of the bound.

    >>> import torch
    >>> metric = EpsilonLowerBound()
    >>> metric.update(torch.rand(100), torch.arange(100) < 50)
    >>> metric.compute()
    tensor(0., dtype=torch.float64)
    """

    value_function = staticmethod(epsilon_lower_bound)
    settings = ("delta", "confidence", "seed")
    has_shadow_interval = False  # it has a confidence of its own
    plot_lower_bound = 0.0

    def __init__(self, delta: float = 0.0, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("delta", delta, low=0, high=1, high_open=True)
        check_confidence(confidence)
        self.delta, self.confidence = delta, confidence

    @classmethod
    def for_audit(cls, context: AuditContext) -> dict[str, MembershipMetric]:
        return {cls.name: cls(confidence=context.confidence, **context.common)}

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        bound = epsilon_lower_bound(scores, is_member, **{**self._settings(), "confidence": confidence})
        return Interval(float(bound), math.inf)

    @property
    def note(self) -> str | None:
        """The largest bound that this many examples can show."""
        with self._synced():
            members = self._data()[1]
        sides = [max(1, int(n) - int(n) // 2) for n in (members.sum(), (~members).sum())]
        best = min(clopper_pearson(n, n, self.confidence).low for n in sides)
        if best > 0.5:
            largest = math.log(best / (1 - best))
            return f"from this many examples no lower bound can be above {largest:.2g}, however large ε is"
        return "this few examples cannot show any ε above 0"
