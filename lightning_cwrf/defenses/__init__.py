"""Defenses: each a loss as a pure function, and a mixin that trains a LightningModule with it."""

from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.relaxloss import RelaxLossMixin, relaxloss_loss

__all__ = ["DefenseMixin", "RelaxLossMixin", "relaxloss_loss"]
