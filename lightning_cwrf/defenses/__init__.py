"""Defenses: each a loss as a pure function, its settings as a dataclass, and a mixin that trains a module with it."""

from importlib import import_module
from pkgutil import iter_modules

from lightning_cwrf.defenses.adversarial import (
    AdversarialRegularization,
    AdversarialRegularizationMixin,
    adversarial_regularization_loss,
    attack_gain,
)
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.baselines import (
    ConfidencePenalty,
    ConfidencePenaltyMixin,
    LabelSmoothing,
    LabelSmoothingMixin,
    WeightPenalty,
    WeightPenaltyMixin,
    confidence_penalty_loss,
    label_smoothing_loss,
    weight_penalty,
)
from lightning_cwrf.defenses.ccl import CCL, CCLMixin, ccl_loss
from lightning_cwrf.defenses.distillation import (
    DMP,
    SELENA,
    DMPMixin,
    SELENAMixin,
    distillation_loss,
    most_certain,
    split_ai_labels,
)
from lightning_cwrf.defenses.dpsgd import DPSGD, DPSGDMixin, PrivacySpent
from lightning_cwrf.defenses.hamp import HAMP, HAMPMixin, HAMPOutput, hamp_loss, hamp_target_probability
from lightning_cwrf.defenses.memguard import MemGuardOutput, memguard_probability, memguard_scores
from lightning_cwrf.defenses.mixup_mmd import MixupMMD, MixupMMDMixin, mixup_loss, mmd2
from lightning_cwrf.defenses.output import OutputDefense, RoundedOutput
from lightning_cwrf.defenses.past import PAST, PASTMixin, past_penalty, past_weights
from lightning_cwrf.defenses.registry import available_defenses, create_defense, defense_class, register_defense
from lightning_cwrf.defenses.relaxloss import RelaxLoss, RelaxLossMixin, relaxloss_loss
from lightning_cwrf.defenses.settings import Defense
from lightning_cwrf.defenses.state import DefenseState

# So that a new defense is one file: importing it registers it.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "CCL",
    "DMP",
    "DPSGD",
    "HAMP",
    "PAST",
    "SELENA",
    "AdversarialRegularization",
    "AdversarialRegularizationMixin",
    "CCLMixin",
    "ConfidencePenalty",
    "ConfidencePenaltyMixin",
    "DMPMixin",
    "DPSGDMixin",
    "Defense",
    "DefenseMixin",
    "DefenseState",
    "HAMPMixin",
    "HAMPOutput",
    "LabelSmoothing",
    "LabelSmoothingMixin",
    "MemGuardOutput",
    "MixupMMD",
    "MixupMMDMixin",
    "OutputDefense",
    "PASTMixin",
    "PrivacySpent",
    "RelaxLoss",
    "RelaxLossMixin",
    "RoundedOutput",
    "SELENAMixin",
    "WeightPenalty",
    "WeightPenaltyMixin",
    "adversarial_regularization_loss",
    "attack_gain",
    "available_defenses",
    "ccl_loss",
    "confidence_penalty_loss",
    "create_defense",
    "defense_class",
    "distillation_loss",
    "hamp_loss",
    "hamp_target_probability",
    "label_smoothing_loss",
    "memguard_probability",
    "memguard_scores",
    "mixup_loss",
    "mmd2",
    "most_certain",
    "past_penalty",
    "past_weights",
    "register_defense",
    "relaxloss_loss",
    "split_ai_labels",
    "weight_penalty",
]
