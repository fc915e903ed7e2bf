"""torchmetrics classes over (score, is_member). Each is a few lines over :mod:`lightning_cwrf.metrics.functional`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.metrics.functional import (
    Interval,
    advantage_p_value,
    attack_advantage,
    auroc_p_value,
    balanced_accuracy,
    clopper_pearson,
    loss_gap,
    loss_gap_p_value,
    membership_auroc,
    p1_score,
    tpr_at_fpr,
    tpr_p_value,
)
from lightning_cwrf.metrics.functional.intervals import (
    auroc_interval,
    fewest_nonmembers,
    mean_difference_interval,
    tpr_interval,
)
from lightning_cwrf.metrics.functional.maxima import advantage_interval
from lightning_cwrf.metrics.functional.roc import check_scores, count_scores, split_scores


class MembershipMetric(Metric, ABC):
    """Base of the metrics over scores ``(n,)`` and ``is_member`` ``(n,)`` bool, higher score = more likely a member.

    ``compute()`` gives a scalar tensor and :meth:`interval` a confidence interval, both over all processes.

    Args:
        seed: of the split of :class:`EpsilonLowerBound`; the other metrics and their intervals draw nothing.
        kwargs: passed on to :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    scores: list[Tensor]
    is_member: list[Tensor]

    def __init__(self, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("seed", seed)
        self.seed = seed
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("is_member", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, is_member: Tensor) -> None:
        """Add examples.

        Raises:
            TypeError: scores or ``is_member`` that are no tensors.
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
        """A two-sided confidence interval of what :meth:`compute` estimates, over other examples like these.

        ``docs/numbers.md`` tells how each is made, how often it holds in simulation, and what it does not cover.
        """
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
    """Area under the attack's ROC; 0.5 is chance. Its interval rests on DeLong's variance and has never zero width.

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
        return _interval(auroc_interval(count_scores(scores, is_member), confidence))


class TPRAtFPR(MembershipMetric):
    """The share of members found while at most ``max_fpr`` of the non-members are falsely accused.

    The threshold is set on these non-members, so its FPR on others is not known exactly. The interval is one of the
    TPR at the threshold whose FPR on *all* non-members is ``max_fpr``; it covers the uncertainty of the threshold too
    (:func:`~lightning_cwrf.metrics.functional.tpr_interval`). With few non-members it bounds from above alone.

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
        check_number("max_fpr", max_fpr, low=0, high=1)
        self.max_fpr = max_fpr

    def _value(self, scores: Tensor, is_member: Tensor) -> Tensor:
        return tpr_at_fpr(scores, is_member, self.max_fpr)

    def _p_value(self, scores: Tensor, is_member: Tensor) -> float:
        return tpr_p_value(scores, is_member, self.max_fpr)

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        return _interval(tpr_interval(count_scores(scores, is_member), self.max_fpr, confidence))

    @property
    def note(self) -> str | None:
        """Says so where there are too few non-members to see the FPR that was asked, or to bound the TPR from below."""
        with self._synced():
            nonmembers = int((~self._data()[1]).sum())
        fewest = fewest_nonmembers(self.max_fpr)
        if nonmembers >= fewest:
            return None
        if nonmembers * self.max_fpr >= 1:
            return (
                f"{nonmembers} non-members cannot bound the TPR at an FPR of {self.max_fpr:g} from below (at 95% "
                f"confidence); {fewest} can"
            )
        return (
            f"{nonmembers} non-members cannot show an FPR of {self.max_fpr:g}: this is the TPR at zero false positives"
        )


class AttackAdvantage(MembershipMetric):
    """Membership advantage, max(TPR − FPR). Its best threshold is chosen on the same examples, so it errs upwards.

    Its interval allows for that: it is one of the best threshold's advantage on all examples.

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
        return _interval(advantage_interval(count_scores(scores, is_member), confidence))


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
        low, high = _interval(advantage_interval(count_scores(scores, is_member), confidence))
        return Interval((1 + low) / 2, (1 + high) / 2)


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
        members, nonmembers = split_scores(scores, is_member)
        return _interval(mean_difference_interval(nonmembers, members, confidence))


class P1Score(MembershipMetric):
    """P1 = 2·Acc·(1 − Adv) / (Acc + 1 − Adv): utility and privacy in one number, 1 is best.

    Its interval goes from P1 of the lowest accuracy and the highest advantage of their own intervals to P1 of the
    opposite ends, which holds however the two depend on each other.

    Args:
        accuracy: test accuracy in [0, 1]. None: it is taken from the ``correct`` of the non-members in ``update``.
        accuracy_examples: how many examples the accuracy was measured on, for its part of the interval. None: the
            accuracy is taken as exact, and the interval covers the advantage alone.

    >>> metric = P1Score(accuracy=1.0)
    >>> metric.update(torch.tensor([0.9, 0.8, 0.8, 0.1]), torch.tensor([True, True, False, False]))
    >>> metric.compute()
    tensor(0.6667, dtype=torch.float64)
    """

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

    def update(self, scores: Tensor, is_member: Tensor, correct: Tensor | None = None) -> None:
        """Add examples; ``correct`` (bool, ``(n,)``) tells which predictions were right, unless accuracy was given."""
        if (correct is None) == (self.accuracy is None):
            raise ValueError("P1Score needs the accuracy once: P1Score(accuracy=...), or update(..., correct=...).")
        super().update(scores, is_member)
        if correct is not None:
            if not isinstance(correct, Tensor) or correct.shape != is_member.shape or correct.dtype != torch.bool:
                raise ValueError(f"correct must be a bool tensor of shape {tuple(is_member.shape)}.")
            self.correct.append(correct)

    def _value(self, scores: Tensor, is_member: Tensor) -> Tensor:
        return p1_score(self._accuracy(is_member), attack_advantage(scores, is_member))

    def _p_value(self, scores: Tensor, is_member: Tensor) -> float:
        return advantage_p_value(scores, is_member)  # at a given accuracy P1 falls as the advantage rises

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        low, high = _interval(advantage_interval(count_scores(scores, is_member), confidence))
        worst, best = self._accuracy_interval(is_member, confidence)
        return Interval(float(p1_score(worst, high)), float(p1_score(best, low)))

    def _accuracy_interval(self, is_member: Tensor, confidence: float) -> Interval:
        accuracy = float(self._accuracy(is_member))
        trials = self.accuracy_examples if self.accuracy is not None else int((~is_member).sum())
        if trials is None:
            return Interval(accuracy, accuracy)
        return clopper_pearson(round(accuracy * trials), trials, confidence)

    def _accuracy(self, is_member: Tensor) -> Tensor | float:
        if self.accuracy is not None:
            return self.accuracy
        return dim_zero_cat(self.correct)[~is_member].double().mean()


def _interval(bounds: tuple[Tensor, Tensor]) -> Interval:
    low, high = (float(bound) for bound in bounds)
    return Interval(low, high)
