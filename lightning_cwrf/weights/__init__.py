"""Weights: score them (Eq. 2, 4), choose and freeze the critical ones (Eq. 5 to 7), and their vanilla values."""

from lightning_cwrf.weights.batchnorm import estimated_statistics, reset_statistics
from lightning_cwrf.weights.copies import capture, weights_digest
from lightning_cwrf.weights.correlation import score_correlation, weight_kinds
from lightning_cwrf.weights.descent import trainable_parameters
from lightning_cwrf.weights.masks import WeightMask
from lightning_cwrf.weights.redraw import fresh_weights, redraw
from lightning_cwrf.weights.score_files import load_scores, save_scores
from lightning_cwrf.weights.scores import learnability_scores, privacy_vulnerability_scores, pve_loss
from lightning_cwrf.weights.units import attention_heads
from lightning_cwrf.weights.vanilla import load_vanilla, save_vanilla

__all__ = [
    "WeightMask",
    "attention_heads",
    "capture",
    "estimated_statistics",
    "fresh_weights",
    "learnability_scores",
    "load_scores",
    "load_vanilla",
    "privacy_vulnerability_scores",
    "pve_loss",
    "redraw",
    "reset_statistics",
    "save_scores",
    "save_vanilla",
    "score_correlation",
    "trainable_parameters",
    "weight_kinds",
    "weights_digest",
]
