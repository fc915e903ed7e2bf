"""Defenses: each a loss as a pure function, and a mixin that trains a LightningModule with it."""

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
from lightning_cwrf.defenses.past import PASTMixin, past_penalty, past_weights
from lightning_cwrf.defenses.registry import Defense, available_defenses, create_defense, register_defense
from lightning_cwrf.defenses.relaxloss import RelaxLossMixin, relaxloss_loss

for _name, _mixin in {
    "ccl": CCLMixin,
    "confidence_penalty": ConfidencePenaltyMixin,
    "dpsgd": DPSGDMixin,
    "hamp": HAMPMixin,
    "label_smoothing": LabelSmoothingMixin,
    "past": PASTMixin,
    "relaxloss": RelaxLossMixin,
    "weight_penalty": WeightPenaltyMixin,
}.items():
    register_defense(_name)(_mixin)

__all__ = [
    "CCLMixin",
    "ConfidencePenaltyMixin",
    "DPSGDMixin",
    "Defense",
    "DefenseMixin",
    "HAMPMixin",
    "HAMPOutput",
    "LabelSmoothingMixin",
    "PASTMixin",
    "PrivacySpent",
    "RelaxLossMixin",
    "WeightPenaltyMixin",
    "available_defenses",
    "ccl_loss",
    "confidence_penalty_loss",
    "create_defense",
    "hamp_loss",
    "hamp_target_probability",
    "label_smoothing_loss",
    "past_penalty",
    "past_weights",
    "register_defense",
    "relaxloss_loss",
    "weight_penalty",
]
