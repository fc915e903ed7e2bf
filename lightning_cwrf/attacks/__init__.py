"""Membership inference attacks as pure tensor functions: signals and shadow membership in, one score per example out.

A higher score means more likely a member. No attack receives the membership that it predicts: ``membership`` is that
of the shadow models. Each attack's file holds its formula and registers it; :func:`create_attack` creates it by name.
"""

from importlib import import_module
from pkgutil import iter_modules

from lightning_cwrf.attacks.augmentation import augmentation_attack
from lightning_cwrf.attacks.base import (
    Attack,
    Evidence,
    available_attacks,
    create_attack,
    create_attacks,
    register_attack,
)
from lightning_cwrf.attacks.bavaria import bavaria
from lightning_cwrf.attacks.bayesian import bmia, laplace_outputs
from lightning_cwrf.attacks.boundary import BoundaryDistances, boundary_distance
from lightning_cwrf.attacks.inverse_hessian import IHAScores, conjugate_gradients, inverse_hessian_attack
from lightning_cwrf.attacks.likelihood_ratio import tune_rmia
from lightning_cwrf.attacks.lira import lira
from lightning_cwrf.attacks.loss import loss_threshold
from lightning_cwrf.attacks.loss_trace import LossTraces, loss_tnr, lt_iqr
from lightning_cwrf.attacks.metric_based import calibrated, confidence, correctness, entropy, modified_entropy
from lightning_cwrf.attacks.neural import neural_attack
from lightning_cwrf.attacks.oslo import OSLOScores, oslo
from lightning_cwrf.attacks.per_model import PerModel
from lightning_cwrf.attacks.quantile_regression import quantile_regression
from lightning_cwrf.attacks.reference import attack_p, attack_r
from lightning_cwrf.attacks.resampling import shadow_bootstrap
from lightning_cwrf.attacks.rmia import base_attack, rmia
from lightning_cwrf.attacks.signals import example_losses, logit_signal, true_class_probability

# So that a new attack is one file: importing it registers it.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Attack",
    "BoundaryDistances",
    "Evidence",
    "IHAScores",
    "LossTraces",
    "OSLOScores",
    "PerModel",
    "attack_p",
    "attack_r",
    "augmentation_attack",
    "available_attacks",
    "base_attack",
    "bavaria",
    "bmia",
    "boundary_distance",
    "calibrated",
    "confidence",
    "conjugate_gradients",
    "correctness",
    "create_attack",
    "create_attacks",
    "entropy",
    "example_losses",
    "inverse_hessian_attack",
    "laplace_outputs",
    "lira",
    "logit_signal",
    "loss_threshold",
    "loss_tnr",
    "lt_iqr",
    "modified_entropy",
    "neural_attack",
    "oslo",
    "quantile_regression",
    "register_attack",
    "rmia",
    "shadow_bootstrap",
    "true_class_probability",
    "tune_rmia",
]
