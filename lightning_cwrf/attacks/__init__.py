"""Membership inference attacks as pure tensor functions: signals and membership in, one score per example out.

A higher score means more likely a member. No attack is given the membership that it predicts: ``membership`` is that
of the shadow models alone.
"""

from lightning_cwrf.attacks.lira import lira
from lightning_cwrf.attacks.rmia import rmia
from lightning_cwrf.attacks.signals import example_losses, logit_signal, true_class_probability
from lightning_cwrf.attacks.threshold import loss_threshold

__all__ = ["example_losses", "lira", "logit_signal", "loss_threshold", "rmia", "true_class_probability"]
