"""Weights: score them (Eq. 2, 4), choose and freeze the critical ones (Eq. 5 to 7), and their vanilla values."""

from lightning_cwrf.weights.masks import WeightMask
from lightning_cwrf.weights.scores import (
    learnability_scores,
    load_scores,
    privacy_vulnerability_scores,
    pve_loss,
    save_scores,
    score_correlation,
    weight_kinds,
)
from lightning_cwrf.weights.vanilla import capture, load_vanilla, redraw, save_vanilla

__all__ = [
    "WeightMask",
    "capture",
    "learnability_scores",
    "load_scores",
    "load_vanilla",
    "privacy_vulnerability_scores",
    "pve_loss",
    "redraw",
    "save_scores",
    "save_vanilla",
    "score_correlation",
    "weight_kinds",
]
