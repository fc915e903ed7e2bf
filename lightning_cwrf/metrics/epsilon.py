"""The bound on ε as a metric."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_cwrf.checks import check_confidence, check_number
from lightning_cwrf.metrics.functional import Interval, clopper_pearson, epsilon_lower_bound
from lightning_cwrf.metrics.membership import MembershipMetric


class EpsilonLowerBound(MembershipMetric):
    """An ε that the training exceeds, at a confidence (:func:`~lightning_cwrf.metrics.functional.epsilon_lower_bound`).

    The threshold is chosen on one half of the examples and measured on the other. The interval goes from it upwards: an
    audit bounds nothing from above.

    Args:
        delta: δ.
        confidence: of the bound.

    >>> import torch
    >>> metric = EpsilonLowerBound()
    >>> metric.update(torch.rand(100), torch.arange(100) < 50)
    >>> metric.compute()
    tensor(0., dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def __init__(self, delta: float = 0.0, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("delta", delta, low=0, high=1, high_open=True)
        check_confidence(confidence)
        self.delta, self.confidence = delta, confidence

    def _value(self, scores: Tensor, is_member: Tensor) -> Tensor:
        return epsilon_lower_bound(scores, is_member, delta=self.delta, confidence=self.confidence, seed=self.seed)

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        bound = epsilon_lower_bound(scores, is_member, delta=self.delta, confidence=confidence, seed=self.seed)
        return Interval(float(bound), math.inf)

    @property
    def note(self) -> str | None:
        """How large a bound this many examples can show at most."""
        with self._synced():
            members = self._data()[1]
        sides = [max(1, int(n) - int(n) // 2) for n in (members.sum(), (~members).sum())]
        perfect = (clopper_pearson(n, n, self.confidence).low for n in sides)
        best = min(perfect)
        return (
            f"this many examples cannot show an ε above {math.log(best / (1 - best)):.2g}"
            if best > 0.5
            else ("so few examples cannot show any ε above 0")
        )
