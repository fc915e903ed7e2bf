"""The lower bounds on ε and on the μ of Gaussian DP as metrics."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_cwrf.checks import check_confidence, check_number
from lightning_cwrf.metrics.base import AuditContext, MembershipMetric, register_metric
from lightning_cwrf.metrics.functional import Interval, epsilon_lower_bound, largest_epsilon_bound, mu_lower_bound


class _LowerBound(MembershipMetric):
    """A lower bound at a confidence of its own; the interval extends from it to infinity."""

    has_shadow_interval = False  # it has a confidence of its own
    uses_accuracy = False
    plot_lower_bound = 0.0

    def __init__(self, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_confidence(confidence)
        self.confidence = confidence

    @classmethod
    def for_audit(cls, context: AuditContext) -> dict[str, MembershipMetric]:
        return {cls.name: cls(confidence=context.confidence, **context.common)}

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        settings = {**self._settings(), "confidence": confidence}
        return Interval(float(self.value_function(scores, is_member, **settings)), math.inf)


@register_metric("epsilon_lower_bound")
class EpsilonLowerBound(_LowerBound):
    """A lower bound on the training's ε (:func:`~lightning_cwrf.metrics.functional.epsilon_lower_bound`).

    It holds at several thresholds at once, and uses all examples. The interval extends from the bound to infinity: an
    audit gives no upper bound.

    Args:
        delta: δ.
        confidence: of the bound.

    >>> import torch
    >>> metric = EpsilonLowerBound()
    >>> metric.update(torch.arange(100) % 50 / 50, torch.arange(100) < 50)  # members score as non-members do
    >>> metric.compute()
    tensor(0., dtype=torch.float64)
    """

    value_function = staticmethod(epsilon_lower_bound)
    settings = ("delta", "confidence", "seed")

    def __init__(self, delta: float = 0.0, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(confidence, **kwargs)
        check_number("delta", delta, low=0, high=1, high_open=True)
        self.delta = delta

    @property
    def note(self) -> str | None:
        """The largest bound that this many examples can show."""
        with self._synced():
            members = self._data()[1]
        inside = int(members.sum())
        largest = largest_epsilon_bound(inside, len(members) - inside, delta=self.delta, confidence=self.confidence)
        if largest > 0:
            return f"from this many examples no lower bound can be above {largest:.2g}, however large ε is"
        return "this few examples cannot show any ε above 0"


@register_metric("mu_lower_bound")
class MuLowerBound(_LowerBound):
    """A lower bound on the training's μ of Gaussian DP (:func:`~lightning_cwrf.metrics.functional.mu_lower_bound`).

    Args:
        confidence: of the bound.

    >>> import torch
    >>> metric = MuLowerBound()
    >>> metric.update(torch.arange(100) % 50 / 50, torch.arange(100) < 50)  # members score as non-members do
    >>> metric.compute()
    tensor(0., dtype=torch.float64)
    """

    value_function = staticmethod(mu_lower_bound)
    settings = ("confidence", "seed")
