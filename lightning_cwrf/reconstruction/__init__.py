"""Reconstruction of training examples from the weights of small ReLU networks, measured against chance."""

from lightning_cwrf.reconstruction.attack import Reconstruction, reconstruct
from lightning_cwrf.reconstruction.audit import audit_reconstruction
from lightning_cwrf.reconstruction.gates import soft_gates
from lightning_cwrf.reconstruction.homogeneity import homogeneity
from lightning_cwrf.reconstruction.kkt import KKT, kkt_residual, logit_gaps, nonnegative_least_squares
from lightning_cwrf.reconstruction.measures import (
    claims,
    hits_p_value,
    reconstruction_scores,
    relative_distances,
)
from lightning_cwrf.reconstruction.prior import ReconstructionPrior
from lightning_cwrf.reconstruction.result import ReconstructionResult
from lightning_cwrf.reconstruction.splitting import Split, split

__all__ = [
    "KKT",
    "Reconstruction",
    "ReconstructionPrior",
    "ReconstructionResult",
    "Split",
    "audit_reconstruction",
    "claims",
    "hits_p_value",
    "homogeneity",
    "kkt_residual",
    "logit_gaps",
    "nonnegative_least_squares",
    "reconstruct",
    "reconstruction_scores",
    "relative_distances",
    "soft_gates",
    "split",
]
