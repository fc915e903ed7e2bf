"""What people read instead of the names of attacks and metrics."""

from __future__ import annotations

from lightning_cwrf.auditing.tables import percent

_METRIC_NAMES = {
    "auroc": "AUC",
    "p1": "P1",
    "epsilon_lower_bound": "ε, lower bound",
    "mu_lower_bound": "μ, lower bound",
}
_ATTACK_NAMES = {"loss": "loss attack", "lira": "LiRA", "rmia": "RMIA"}


def attack_name(attack: str) -> str:
    """What tables call an attack."""
    return _ATTACK_NAMES.get(attack, attack)


def failure_note(attack: str, why: str) -> str:
    """What notes say of an attack that failed; ``why`` is its error's message, which may begin with its name.

    >>> failure_note("rmia", "the rmia attack needs a population.")
    'RMIA failed: it needs a population.'
    """
    named = f"the {attack} attack "
    return f"{attack_name(attack)} failed: {f'it {why[len(named) :]}' if why.startswith(named) else why}"


def metric_name(metric: str) -> str:
    """What tables call a metric.

    >>> metric_name("tpr_at_fpr_0.001"), metric_name("balanced_accuracy")
    ('TPR at 0.1% FPR', 'balanced accuracy')
    """
    before, found, rate = metric.partition("tpr_at_fpr_")
    if found and not before:
        return f"TPR at {percent(float(rate))} FPR"
    return _METRIC_NAMES.get(metric, metric.replace("_", " "))
