"""Differentially private training: DP-SGD by Opacus, and what it has spent."""

from lightning_cwrf.defenses.dpsgd.ledger import PrivacySpent
from lightning_cwrf.defenses.dpsgd.mixin import DPSGDMixin

__all__ = ["DPSGDMixin", "PrivacySpent"]
