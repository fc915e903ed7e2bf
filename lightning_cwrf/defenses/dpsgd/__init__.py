"""Differentially private training: DP-SGD by Opacus, and what it has spent."""

from lightning_cwrf.defenses.dpsgd.ledger import PrivacySpent
from lightning_cwrf.defenses.dpsgd.mixin import DPSGDMixin
from lightning_cwrf.defenses.dpsgd.settings import DPSGD

__all__ = ["DPSGD", "DPSGDMixin", "PrivacySpent"]
