"""torchmetrics classes over (score, is_member). Each is a few lines over :mod:`lightning_cwrf.metrics.functional`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_cwrf.metrics.functional import (
    Interval,
    advantage_p_value,
    attack_advantage,
    auroc_p_value,
    balanced_accuracy,
    clopper_pearson,
    epsilon_lower_bound,
    loss_gap,
    loss_gap_p_value,
    membership_auroc,
    p1_score,
    tpr_at_fpr,
    tpr_p_value,
)
from lightning_cwrf.metrics.functional.intervals import bootstrap_counts, bootstrap_means, check_confidence
from lightning_cwrf.metrics.functional.roc import (
    advantage_of,
    auroc_of,
    balanced_accuracy_of,
    check_scores,
    split_scores,
)


class MembershipMetric(Metric, ABC):
    """Base of the metrics over scores ``(n,)`` and ``is_member`` ``(n,)`` bool, higher score = more likely a member.

    ``compute()`` gives a scalar tensor and :meth:`interval` a confidence interval, both over all processes.

    Args:
        seed: of the bootstrap; the caller's random state is never touched.
        kwargs: passed on to :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    scores: list[Tensor]
    is_member: list[Tensor]

    def __init__(self, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("is_member", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, is_member: Tensor) -> None:
        """Add examples.

        Raises:
            ValueError: wrong shapes, an ``is_member`` that is not bool, or NaN scores (which).
        """
        check_scores(scores, is_member)
        self.scores.append(scores.detach())
        self.is_member.append(is_member)

    def compute(self) -> Tensor:
        """The metric as a scalar float64 tensor.

        Raises:
            ValueError: there are no members, or no non-members.
        """
        return self._value(*self._data())

    def interval(self, confidence: float = 0.95) -> Interval:
        """A two-sided confidence interval of :meth:`compute` over the same examples."""
        with self._synced():
            return self._interval(*self._data(), confidence)

    def p_value(self) -> float | None:
        """One-sided against chance: how likely so high a value is where members and non-members do not differ.

        None where the metric has no such test.
        """
        with self._synced():
            return self._p_value(*self._data())

    @property
    def note(self) -> str | None:
        """What the number of examples cannot show, in a sentence; None where there is nothing to say."""
        return None

    def _p_value(self, scores: Tensor, is_member: Tensor) -> float | None:
        return None

    @abstractmethod
    def _value(self, scores: Tensor, is_member: Tensor) -> Tensor: ...

    @abstractmethod
    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval: ...

    def _data(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.scores, list) and not self.scores:
            raise ValueError(f"{type(self).__name__} has no examples: call update(scores, is_member) first.")
        return dim_zero_cat(self.scores), dim_zero_cat(self.is_member)

    @contextmanager
    def _synced(self) -> Iterator[None]:
        # compute() is synchronised by torchmetrics; what else reads the states must ask for it.
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            yield


class MembershipAUROC(MembershipMetric):
    """Area under the attack's ROC; 0.5 is chance. Its interval is a stratified bootstrap over examples.

    >>> metric = MembershipAUROC()
    >>> metric.update(torch.tensor([0.9, 0.8, 0.8, 0.1]), torch.tensor([True, True, False, False]))
    >>> metric.compute()
    tensor(0.8750, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def _value(self, scores: Tensor, is_member: Tensor) -> Tensor:
        return membership_auroc(scores, is_member)

    def _p_value(self, scores: Tensor, is_member: Tensor) -> float:
        return auroc_p_value(scores, is_member)

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        return bootstrap_counts(auroc_of, scores, is_member, confidence, self.seed)


class TPRAtFPR(MembershipMetric):
    """The share of members found while at most ``max_fpr`` of the non-members are falsely accused.

    The threshold is set on the non-members alone; given it, the interval of the members' share is exact
    (Clopper–Pearson).

    Args:
        max_fpr: the FPR allowed. Published: 1e-3 and 1e-5.

    >>> metric = TPRAtFPR(max_fpr=1e-3)
    >>> metric.update(torch.tensor([0.9, 0.2, 0.8, 0.1]), torch.tensor([True, True, False, False]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    >>> metric.note
    '2 non-members cannot show an FPR of 0.001: this is the TPR at zero false positives'
    """

    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def __init__(self, max_fpr: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= max_fpr <= 1.0:
            raise ValueError(f"max_fpr must lie in [0, 1], not {max_fpr}.")
        self.max_fpr = max_fpr

    def _value(self, scores: Tensor, is_member: Tensor) -> Tensor:
        return tpr_at_fpr(scores, is_member, self.max_fpr)

    def _p_value(self, scores: Tensor, is_member: Tensor) -> float:
        return tpr_p_value(scores, is_member, self.max_fpr)

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        members, _ = split_scores(scores, is_member)
        found = round(float(self._value(scores, is_member)) * len(members))
        return clopper_pearson(found, len(members), confidence)

    @property
    def note(self) -> str | None:
        """Says so where there are too few non-members to see the FPR that was asked."""
        with self._synced():
            nonmembers = int((~self._data()[1]).sum())
        if nonmembers * self.max_fpr >= 1:
            return None
        return (
            f"{nonmembers} non-members cannot show an FPR of {self.max_fpr:g}: this is the TPR at zero false positives"
        )


class AttackAdvantage(MembershipMetric):
    """Membership advantage, max(TPR − FPR). Its best threshold is chosen on the same examples, so it errs upwards.

    >>> metric = AttackAdvantage()
    >>> metric.update(torch.tensor([0.9, 0.8, 0.8, 0.1]), torch.tensor([True, True, False, False]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def _value(self, scores: Tensor, is_member: Tensor) -> Tensor:
        return attack_advantage(scores, is_member)

    def _p_value(self, scores: Tensor, is_member: Tensor) -> float:
        return advantage_p_value(scores, is_member)

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        return bootstrap_counts(advantage_of, scores, is_member, confidence, self.seed)


class BalancedAccuracy(MembershipMetric):
    """Balanced accuracy at the attack's best threshold, (1 + advantage) / 2; it errs upwards as the advantage does.

    >>> metric = BalancedAccuracy()
    >>> metric.update(torch.tensor([0.9, 0.8, 0.8, 0.1]), torch.tensor([True, True, False, False]))
    >>> metric.compute()
    tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.5, 1.0

    def _value(self, scores: Tensor, is_member: Tensor) -> Tensor:
        return balanced_accuracy(scores, is_member)

    def _p_value(self, scores: Tensor, is_member: Tensor) -> float:
        return advantage_p_value(scores, is_member)

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        return bootstrap_counts(balanced_accuracy_of, scores, is_member, confidence, self.seed)


class LossGap(MembershipMetric):
    """Mean loss of non-members minus mean loss of members; ``scores`` are per-example losses.

    >>> metric = LossGap()
    >>> metric.update(torch.tensor([0.25, 0.75, 1.5]), torch.tensor([True, True, False]))
    >>> metric.compute()
    tensor(1., dtype=torch.float64)
    """

    higher_is_better = False

    def _value(self, scores: Tensor, is_member: Tensor) -> Tensor:
        return loss_gap(scores, is_member)

    def _p_value(self, scores: Tensor, is_member: Tensor) -> float:
        return loss_gap_p_value(scores, is_member)

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        return bootstrap_means(scores, is_member, confidence, self.seed)


class P1Score(MembershipMetric):
    """P1 = 2·Acc·(1 − Adv) / (Acc + 1 − Adv): utility and privacy in one number, 1 is best.

    Args:
        accuracy: test accuracy in [0, 1]. None: it is taken from the ``correct`` of the non-members in ``update``.

    >>> metric = P1Score(accuracy=1.0)
    >>> metric.update(torch.tensor([0.9, 0.8, 0.8, 0.1]), torch.tensor([True, True, False, False]))
    >>> metric.compute()
    tensor(0.6667, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 1.0
    correct: list[Tensor]

    def __init__(self, accuracy: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if accuracy is not None and not 0.0 <= accuracy <= 1.0:
            raise ValueError(f"accuracy must lie in [0, 1], not {accuracy}.")
        self.accuracy = accuracy
        self.add_state("correct", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, is_member: Tensor, correct: Tensor | None = None) -> None:
        """Add examples; ``correct`` (bool, ``(n,)``) tells which predictions were right, unless accuracy was given."""
        if (correct is None) == (self.accuracy is None):
            raise ValueError("P1Score needs the accuracy once: P1Score(accuracy=...), or update(..., correct=...).")
        super().update(scores, is_member)
        if correct is not None:
            if correct.shape != is_member.shape or correct.dtype != torch.bool:
                raise ValueError(f"correct must be bool of shape {tuple(is_member.shape)}.")
            self.correct.append(correct)

    def _value(self, scores: Tensor, is_member: Tensor) -> Tensor:
        return p1_score(self._accuracy(is_member), attack_advantage(scores, is_member))

    def _p_value(self, scores: Tensor, is_member: Tensor) -> float:
        return advantage_p_value(scores, is_member)  # at a given accuracy P1 falls as the advantage rises

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        accuracy = self._accuracy(is_member)
        return bootstrap_counts(
            lambda counts: p1_score(accuracy, advantage_of(counts)), scores, is_member, confidence, self.seed
        )

    def _accuracy(self, is_member: Tensor) -> Tensor | float:
        if self.accuracy is not None:
            return self.accuracy
        return dim_zero_cat(self.correct)[~is_member].double().mean()


class EpsilonLowerBound(MembershipMetric):
    """An ε that the training exceeds, at a confidence (:func:`~lightning_cwrf.metrics.functional.epsilon_lower_bound`).

    The threshold is chosen on one half of the examples and measured on the other. The interval goes from it upwards: an
    audit bounds nothing from above.

    Args:
        delta: δ.
        confidence: of the bound.

    >>> metric = EpsilonLowerBound()
    >>> metric.update(torch.rand(100), torch.arange(100) < 50)
    >>> metric.compute()
    tensor(0., dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def __init__(self, delta: float = 0.0, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= delta < 1.0:
            raise ValueError(f"delta must lie in [0, 1), not {delta}.")
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
