"""Defenses: each a loss as a pure function, and a mixin that trains a LightningModule with it."""

from lightning_cwrf.defenses.adversarial import (
    AdversarialRegularizationMixin,
    adversarial_regularization_loss,
    attack_gain,
)
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.baselines import (
    ConfidencePenaltyMixin,
    LabelSmoothingMixin,
    WeightPenaltyMixin,
    confidence_penalty_loss,
    label_smoothing_loss,
    weight_penalty,
)
from lightning_cwrf.defenses.ccl import CCLMixin, ccl_loss
from lightning_cwrf.defenses.dpsgd import DPSGDMixin, PrivacySpent
from lightning_cwrf.defenses.hamp import HAMPMixin, HAMPOutput, hamp_loss, hamp_target_probability
from lightning_cwrf.defenses.mixup_mmd import MixupMMDMixin, mixup_loss, mmd2
from lightning_cwrf.defenses.past import PASTMixin, past_penalty, past_weights
from lightning_cwrf.defenses.registry import Defense, available_defenses, create_defense, register_defense
from lightning_cwrf.defenses.relaxloss import RelaxLossMixin, relaxloss_loss

for _name, _mixin in {
    "adversarial_regularization": AdversarialRegularizationMixin,
    "ccl": CCLMixin,
    "confidence_penalty": ConfidencePenaltyMixin,
    "dpsgd": DPSGDMixin,
    "hamp": HAMPMixin,
    "label_smoothing": LabelSmoothingMixin,
    "mixup_mmd": MixupMMDMixin,
    "past": PASTMixin,
    "relaxloss": RelaxLossMixin,
    "weight_penalty": WeightPenaltyMixin,
}.items():
    register_defense(_name)(_mixin)

__all__ = [
    "AdversarialRegularizationMixin",
    "CCLMixin",
    "ConfidencePenaltyMixin",
    "DPSGDMixin",
    "Defense",
    "DefenseMixin",
    "HAMPMixin",
    "HAMPOutput",
    "LabelSmoothingMixin",
    "MixupMMDMixin",
    "PASTMixin",
    "PrivacySpent",
    "RelaxLossMixin",
    "WeightPenaltyMixin",
    "adversarial_regularization_loss",
    "attack_gain",
    "available_defenses",
    "ccl_loss",
    "confidence_penalty_loss",
    "create_defense",
    "hamp_loss",
    "hamp_target_probability",
    "label_smoothing_loss",
    "mixup_loss",
    "mmd2",
    "past_penalty",
    "past_weights",
    "register_defense",
    "relaxloss_loss",
    "weight_penalty",
]
