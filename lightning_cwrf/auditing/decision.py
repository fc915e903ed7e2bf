"""When an attack counts as better than guessing: all tests of an audit are judged together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_cwrf.auditing.tables import percent
from lightning_cwrf.auditing.values import FPR, Estimate
from lightning_cwrf.metrics.functional import resolvable_auc

TESTED = ("auroc", f"tpr_at_fpr_{FPR:g}")
"""The measures of each attack that are tested."""

Estimates = Mapping[str, Mapping[str, Estimate]]
"""Of an audit, by attack and metric."""


def judged_measures(estimates: Estimates) -> list[tuple[str, str, Estimate]]:
    """The measures that can be tested: those with a p-value that is a number, and AUCs with such a bound.

    A TPR without a p-value cannot: its chance level depends on the number of non-members.
    """
    return [
        (attack, metric, found[metric])
        for attack, found in estimates.items()
        for metric in TESTED
        if metric in found and _is_measured(metric, found[metric])
    ]


def joint_level(confidence: float, tests: int) -> float:
    """The p-value of each test at which all together have the audit's confidence (Bonferroni).

    >>> round(joint_level(0.95, 2), 6)
    0.025
    """
    return (1 - confidence) / max(tests, 1)


def beating_guesses(estimates: Estimates, confidence: float) -> list[str]:
    """The attacks that beat guessing."""
    tests = judged_measures(estimates)
    level = joint_level(confidence, len(tests))
    return list(dict.fromkeys(attack for attack, _, each in tests if _beats_chance(each, level)))


def least_auc(members: int, nonmembers: int, confidence: float, tests: int) -> float:
    """The smallest AUC, without ties, with which an attack beats guessing in an audit of so many tests."""
    return resolvable_auc(members, nonmembers, 1 - joint_level(confidence, tests))


def resolution(members: int, nonmembers: int, confidence: float, tests: int) -> str:
    """What an audit of so many examples and tests can resolve, in words.

    >>> resolution(100, 100, 0.95, 1)[:66]
    '100 members and 100 non-members: an AUC of at least 0.567 is signi'
    """
    least = least_auc(members, nonmembers, confidence, tests)
    auc = f"an AUC of at least {least:.3f}" if math.isfinite(least) else "no AUC"
    together = f" for the {tests} tests of this audit together" if tests > 1 else ""
    return (
        f"{members} members and {nonmembers} non-members: {auc} is significantly better than chance (one-sided, at "
        f"{percent(confidence)} confidence{together}); the smallest FPR that can be seen is {1 / nonmembers:.2g}"
    )


def _is_measured(metric: str, estimate: Estimate) -> bool:
    if estimate.p_value is None and metric != "auroc":
        return False
    tested = estimate.interval.low if estimate.p_value is None else estimate.p_value
    return not math.isnan(estimate.value) and not math.isnan(tested)


def _beats_chance(estimate: Estimate, level: float) -> bool:
    return estimate.interval.low > 0.5 if estimate.p_value is None else estimate.p_value <= level
