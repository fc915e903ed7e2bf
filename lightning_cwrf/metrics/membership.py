"""The metrics that are functions of scores; see :mod:`lightning_cwrf.metrics.functional` for the formulas."""

from __future__ import annotations

import math
from typing import Any

from lightning_cwrf.checks import check_number
from lightning_cwrf.metrics import functional
from lightning_cwrf.metrics.base import AuditContext, MembershipMetric, of_counts, register_metric

FPRS = (1e-3, 1e-5)
"""The false positive rates of an audit, as published."""


@register_metric("auroc")
class MembershipAUROC(MembershipMetric):
    """Area under the attack's ROC; 0.5 is chance. Its interval uses DeLong's variance and never has zero width.

    >>> from torch import tensor
    >>> metric = MembershipAUROC()
    >>> metric.update(tensor([0.9, 0.8, 0.8, 0.1]), tensor([True, True, False, False]))
    >>> metric.compute()
    tensor(0.8750, dtype=torch.float64)
    """

    value_function = staticmethod(functional.membership_auroc)
    uses_accuracy = False
    interval_function = of_counts(functional.auroc_interval)
    p_value_function = staticmethod(functional.auroc_p_value)
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def chance(self, nonmembers: int) -> float:
        return 0.5


@register_metric("tpr_at_fpr")
class TPRAtFPR(MembershipMetric):
    """The share of members found at the lowest threshold that accuses at most ``max_fpr`` of the non-members.

    The threshold is set on these non-members, so its FPR on others is not known exactly. The interval is for the TPR
    at the threshold whose FPR on *all* non-members is ``max_fpr``; it covers the uncertainty of the threshold too
    (:func:`~lightning_cwrf.metrics.functional.tpr_interval`). With few non-members it only bounds the TPR from above.

    Args:
        max_fpr: the FPR allowed. Published: 1e-3 and 1e-5.

    >>> from torch import tensor
    >>> metric = TPRAtFPR(max_fpr=1e-3)
    >>> metric.update(tensor([0.9, 0.2, 0.8, 0.1]), tensor([True, True, False, False]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    >>> metric.note
    '2 non-members cannot show an FPR of 0.001: this is the TPR at zero false positives'
    """

    value_function = staticmethod(functional.tpr_at_fpr)
    uses_accuracy = False
    interval_function = of_counts(functional.tpr_interval)
    p_value_function = staticmethod(functional.tpr_p_value)
    settings = ("max_fpr",)
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def __init__(self, max_fpr: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("max_fpr", max_fpr, low=0, high=1)
        self.max_fpr = max_fpr

    @classmethod
    def for_audit(cls, context: AuditContext) -> dict[str, MembershipMetric]:
        return {f"{cls.name}_{fpr:g}": cls(fpr, **context.common) for fpr in FPRS}

    def chance(self, nonmembers: int) -> float:
        """(k + 1) / (n + 1): with k false positives allowed, a member is found if at most k non-members are above it.

        It is more than ``max_fpr``, and much more where the non-members are few.
        """
        return (math.floor(self.max_fpr * nonmembers + 1e-9) + 1) / (nonmembers + 1)

    @property
    def note(self) -> str | None:
        """Says so where there are too few non-members to show this FPR, or to bound the TPR from below."""
        with self._synced():
            nonmembers = int((~self._data()[1]).sum())
        fewest = functional.fewest_nonmembers(self.max_fpr)
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


@register_metric("advantage")
class AttackAdvantage(MembershipMetric):
    """Membership advantage, max(TPR − FPR). The maximum is taken on the same examples, so it is biased upwards.

    The interval accounts for that: it is for the advantage of the best threshold on all examples.

    >>> from torch import tensor
    >>> metric = AttackAdvantage()
    >>> metric.update(tensor([0.9, 0.8, 0.8, 0.1]), tensor([True, True, False, False]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    value_function = staticmethod(functional.attack_advantage)
    uses_accuracy = False
    interval_function = of_counts(functional.advantage_interval)
    p_value_function = staticmethod(functional.advantage_p_value)
    plot_lower_bound, plot_upper_bound = 0.0, 1.0


@register_metric("balanced_accuracy")
class BalancedAccuracy(MembershipMetric):
    """Balanced accuracy at the attack's best threshold, (1 + advantage) / 2; biased upwards as the advantage is.

    >>> from torch import tensor
    >>> metric = BalancedAccuracy()
    >>> metric.update(tensor([0.9, 0.8, 0.8, 0.1]), tensor([True, True, False, False]))
    >>> metric.compute()
    tensor(0.7500, dtype=torch.float64)
    """

    value_function = staticmethod(functional.balanced_accuracy)
    uses_accuracy = False
    interval_function = of_counts(functional.balanced_accuracy_interval)
    p_value_function = staticmethod(functional.advantage_p_value)
    plot_lower_bound, plot_upper_bound = 0.5, 1.0


@register_metric("loss_gap")
class LossGap(MembershipMetric):
    """Mean loss of non-members minus mean loss of members; ``scores`` are per-example losses.

    >>> from torch import tensor
    >>> metric = LossGap()
    >>> metric.update(tensor([0.25, 0.75, 1.5]), tensor([True, True, False]))
    >>> metric.compute()
    tensor(1., dtype=torch.float64)
    """

    value_function = staticmethod(functional.loss_gap)
    interval_function = staticmethod(functional.loss_gap_interval)
    p_value_function = staticmethod(functional.loss_gap_p_value)

    @classmethod
    def for_audit(cls, context: AuditContext) -> dict[str, MembershipMetric]:
        return {}  # of the model's losses, measured once, not of an attack's scores
