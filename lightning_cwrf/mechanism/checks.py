"""What draws need of their settings, the model and the private data, so that their guarantee holds."""

from __future__ import annotations

from torch import nn

from lightning_cwrf.checks import check_choice, check_integer, check_number
from lightning_cwrf.mechanism.curvature import PublicCurvature
from lightning_cwrf.mechanism.gradients import flat, parameter_names
from lightning_cwrf.mechanism.spent import SHIFTS


def check_settings(
    target_epsilon: float | None, mu: float | None, target_delta: float, draws: int, eta: float, adjacency: str
) -> None:
    """Raise a TypeError or ValueError for settings of :func:`exponential_mechanism` that are out of range."""
    if (target_epsilon is None) == (mu is None):
        raise ValueError("the exponential mechanism needs one of target_epsilon and mu, and not both.")
    if target_epsilon is not None:
        hint = "A larger one promises nothing; pass mu for so little noise."
        check_number("target_epsilon", target_epsilon, low=0, high=100, low_open=True, hint=hint)
    if mu is not None:
        check_number("mu", mu, low=0, low_open=True)
    hint = "It is the chance that the guarantee fails: take less than 1 / (number of training examples)."
    check_number("target_delta", target_delta, low=0, high=1, low_open=True, high_open=True, hint=hint)
    check_integer("draws", draws, low=1)
    check_number("eta", eta, low=0, low_open=True)
    check_choice("adjacency", adjacency, SHIFTS)


def check_fit(model: nn.Module, curvature: PublicCurvature) -> None:
    """Raise a ValueError where a curvature is not of this model, or draws cannot be accounted for by themselves."""
    if parameter_names(model, curvature.names) != curvature.names:
        raise ValueError("the curvature's names are not in the model's order: it is that of another model.")
    numbers = len(flat(model, curvature.names))
    expected = curvature.dimensions if curvature.subspace is None else len(curvature.subspace.basis)
    if numbers != expected:
        raise ValueError(f"the curvature is of {expected} parameters, and the model has {numbers} under its names.")
    steps = getattr(getattr(model, "_dpsgd_ledger", None), "steps", 0)
    if steps:
        raise ValueError(
            f"this model has taken {steps} steps of DP-SGD, and the ε of draws would not count them. Start from the "
            "weights of before; or load these into a new model, and add the two ε and the two δ yourself."
        )
