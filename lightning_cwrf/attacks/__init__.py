"""Membership inference attacks as pure tensor functions: signals and membership in, one score per example out.

A higher score means more likely a member. No attack is given the membership that it predicts: ``membership`` is that
of the shadow models alone. :func:`create_attack` gives them by name, over one :class:`Evidence`.
"""

from lightning_cwrf.attacks import named  # noqa: F401 - makes the package's attacks known by name
from lightning_cwrf.attacks.augmentation import augmentation_attack
from lightning_cwrf.attacks.bavaria import bavaria
from lightning_cwrf.attacks.evidence import Evidence, PerModel
from lightning_cwrf.attacks.learned import neural_attack, quantile_regression
from lightning_cwrf.attacks.lira import lira
from lightning_cwrf.attacks.metric_based import calibrated, confidence, correctness, entropy, modified_entropy
from lightning_cwrf.attacks.reference import attack_p, attack_r
from lightning_cwrf.attacks.registry import (
    Attack,
    available_attacks,
    create_attack,
    create_attacks,
    register_attack,
)
from lightning_cwrf.attacks.resampling import shadow_bootstrap
from lightning_cwrf.attacks.rmia import rmia, tune_offline_a
from lightning_cwrf.attacks.signals import example_losses, logit_signal, true_class_probability
from lightning_cwrf.attacks.threshold import loss_threshold

__all__ = [
    "Attack",
    "Evidence",
    "PerModel",
    "attack_p",
    "attack_r",
    "augmentation_attack",
    "available_attacks",
    "bavaria",
    "calibrated",
    "confidence",
    "correctness",
    "create_attack",
    "create_attacks",
    "entropy",
    "example_losses",
    "lira",
    "logit_signal",
    "loss_threshold",
    "modified_entropy",
    "neural_attack",
    "quantile_regression",
    "register_attack",
    "rmia",
    "shadow_bootstrap",
    "true_class_probability",
    "tune_offline_a",
]
