"""Membership metrics as functions of (score, is_member); see :mod:`lightning_cwrf.metrics` for the classes."""

from lightning_cwrf.metrics.functional.advantage import advantage_interval, balanced_accuracy_interval
from lightning_cwrf.metrics.functional.crossed import CrossedJackknife
from lightning_cwrf.metrics.functional.discoveries import benjamini_hochberg, conformal_p_values, exposure, holm
from lightning_cwrf.metrics.functional.epsilon import epsilon_lower_bound, largest_epsilon_bound, mu_lower_bound
from lightning_cwrf.metrics.functional.intervals import (
    Interval,
    auroc_interval,
    clopper_pearson,
    fewest_nonmembers,
    loss_gap_interval,
    mean_difference_interval,
    mean_interval,
    proportion_interval,
    tpr_interval,
)
from lightning_cwrf.metrics.functional.one_run import f_dp_rejects, one_run_epsilon, one_run_mu, one_run_p_value
from lightning_cwrf.metrics.functional.roc import (
    attack_advantage,
    balanced_accuracy,
    loss_gap,
    membership_auroc,
    membership_roc,
    p1_score,
    tpr_at_fpr,
)
from lightning_cwrf.metrics.functional.significance import (
    advantage_p_value,
    auroc_p_value,
    loss_gap_p_value,
    resolvable_auc,
    tpr_p_value,
)
from lightning_cwrf.metrics.functional.tradeoff import gaussian_delta, gaussian_epsilon, gaussian_mu

__all__ = [
    "CrossedJackknife",
    "Interval",
    "advantage_interval",
    "advantage_p_value",
    "attack_advantage",
    "auroc_interval",
    "auroc_p_value",
    "balanced_accuracy",
    "balanced_accuracy_interval",
    "benjamini_hochberg",
    "clopper_pearson",
    "conformal_p_values",
    "epsilon_lower_bound",
    "exposure",
    "f_dp_rejects",
    "fewest_nonmembers",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_mu",
    "holm",
    "largest_epsilon_bound",
    "loss_gap",
    "loss_gap_interval",
    "loss_gap_p_value",
    "mean_difference_interval",
    "mean_interval",
    "membership_auroc",
    "membership_roc",
    "mu_lower_bound",
    "one_run_epsilon",
    "one_run_mu",
    "one_run_p_value",
    "p1_score",
    "proportion_interval",
    "resolvable_auc",
    "tpr_at_fpr",
    "tpr_interval",
    "tpr_p_value",
]
