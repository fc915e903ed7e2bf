"""P1, utility and privacy in one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.metrics import functional
from lightning_cwrf.metrics.base import AuditContext, MembershipMetric, register_metric
from lightning_cwrf.metrics.functional import Interval, p1_score
from lightning_cwrf.metrics.functional.roc import check_scores, count_scores


@register_metric("p1")
class P1Score(MembershipMetric):
    """P1 = 2·Acc·(1 − Adv) / (Acc + 1 − Adv): utility and privacy in one number, 1 is best.

    Its interval extends from P1 at the lowest accuracy and the highest advantage of their own intervals to P1 at the
    opposite ends, which is valid however the two depend on each other.

    Args:
        accuracy: test accuracy in [0, 1]. None: it is computed from ``correct`` of the non-members in ``update``.
        accuracy_examples: the number of examples behind the accuracy, for its part of the interval. None: the
            accuracy is exact, and the interval covers the advantage only.

    >>> metric = P1Score(accuracy=1.0)
    >>> metric.update(torch.tensor([0.9, 0.8, 0.8, 0.1]), torch.tensor([True, True, False, False]))
    >>> metric.compute()
    tensor(0.6667, dtype=torch.float64)
    """

    p_value_function = staticmethod(functional.advantage_p_value)  # at a given accuracy P1 falls as the advantage rises
    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 1.0
    correct: list[Tensor]

    def __init__(self, accuracy: float | None = None, *, accuracy_examples: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if accuracy is not None:
            check_number("accuracy", accuracy, low=0, high=1)
        if accuracy_examples is not None:
            check_integer("accuracy_examples", accuracy_examples, low=1)
            if accuracy is None:
                raise ValueError("accuracy_examples goes with accuracy; without it the non-members are counted.")
        self.accuracy, self.accuracy_examples = accuracy, accuracy_examples
        self.add_state("correct", default=[], dist_reduce_fx="cat")

    @classmethod
    def for_audit(cls, context: AuditContext) -> dict[str, MembershipMetric]:
        return {cls.name: cls(context.accuracy, accuracy_examples=context.accuracy_examples, **context.common)}

    def update(self, scores: Tensor, is_member: Tensor, correct: Tensor | None = None) -> None:
        """Add examples; ``correct``, bool ``(n,)``, marks the correct predictions, unless accuracy was given."""
        if (correct is None) == (self.accuracy is None):
            raise ValueError("P1Score needs the accuracy once: P1Score(accuracy=...), or update(..., correct=...).")
        super().update(scores, is_member)
        if correct is not None:
            if not isinstance(correct, Tensor) or correct.shape != is_member.shape or correct.dtype != torch.bool:
                raise ValueError(f"correct must be a bool tensor of shape {tuple(is_member.shape)}.")
            self.correct.append(correct)

    def value_of(self, scores: Tensor, is_member: Tensor) -> Tensor:
        """P1 of these examples alone, at the given accuracy."""
        if type(self) is not P1Score or self.accuracy is None:
            return super().value_of(scores, is_member)
        check_scores(scores, is_member)
        return self._value(scores, is_member)

    def _value(self, scores: Tensor, is_member: Tensor) -> Tensor:
        return p1_score(self._accuracy(is_member), functional.attack_advantage(scores, is_member))

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        low, high = functional.advantage_interval(count_scores(scores, is_member), confidence)
        worst, best = self._accuracy_interval(is_member, confidence)
        return Interval(float(p1_score(worst, high)), float(p1_score(best, low)))

    def _accuracy_interval(self, is_member: Tensor, confidence: float) -> Interval:
        accuracy = float(self._accuracy(is_member))
        trials = self.accuracy_examples if self.accuracy is not None else int((~is_member).sum())
        if trials is None:
            return Interval(accuracy, accuracy)
        return functional.clopper_pearson(round(accuracy * trials), trials, confidence)

    def _accuracy(self, is_member: Tensor) -> Tensor | float:
        if self.accuracy is not None:
            return self.accuracy
        return dim_zero_cat(self.correct)[~is_member].double().mean()
