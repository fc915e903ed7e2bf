"""Other solutions of the same equation: an example split in two, arbitrarily far apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cwrf.checks import check_integer, check_number


class Split(NamedTuple):
    """Examples of which one is split in two, with their multipliers; the second half is the last one."""

    inputs: Tensor
    targets: Tensor
    multipliers: Tensor


def split(
    inputs: Tensor,
    targets: Tensor,
    multipliers: Tensor,
    place: int,
    direction: Tensor,
    *,
    forward: float,
    backward: float,
) -> Split:
    """Split one example along a direction: ``x + aν`` with ``λ b / (a + b)``, and ``x − bν`` with ``λ a / (a + b)``.

    The multipliers sum to λ, and the weighted mean of the two points is x. So the residual of the equation
    (:func:`~lightning_cwrf.reconstruction.kkt_residual`) and the logits do not change while no gate changes; where the
    first weight W does not see the direction, Wν = 0, none ever does. This is the argument of Refael et al. ("No Prior,
    No Leakage") that the weights alone do not give the data away: the two points can be arbitrarily far from x.

    Args:
        inputs: ``(n, ...)``.
        targets: ``(n,)``.
        multipliers: ``(n, K − 1)``.
        place: the index of the example.
        direction: of the shape of an input; its length is not used.
        forward: a, above 0, in units of the input.
        backward: b, above 0.

    Returns:
        n + 1 examples.

    Raises:
        TypeError, ValueError: inputs that are no floats; shapes that do not fit; a place or a distance out of range; a
            direction of another shape or without a length.

    >>> halves = split(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([[4.0]]), 0, torch.tensor([0.0, 2.0]),
    ...                forward=1.0, backward=3.0)
    >>> halves.inputs.tolist(), halves.multipliers.tolist()
    ([[0.0, 1.0], [0.0, -3.0]], [[3.0], [1.0]])
    """
    check_integer("place", place, low=0, high=len(inputs) - 1)
    check_number("forward", forward, low=0, low_open=True)
    check_number("backward", backward, low=0, low_open=True)
    if not inputs.is_floating_point():
        raise TypeError(f"inputs must be floats, which can be moved by parts of a unit, not {inputs.dtype}.")
    if multipliers.ndim != 2 or len(multipliers) != len(inputs) or targets.shape != (len(inputs),):
        raise ValueError(
            f"{len(inputs)} inputs need targets ({len(inputs)},) and multipliers ({len(inputs)}, K - 1), not "
            f"{tuple(targets.shape)} and {tuple(multipliers.shape)}."
        )
    if direction.shape != inputs.shape[1:]:
        raise ValueError(f"direction must have the shape {tuple(inputs.shape[1:])}, not {tuple(direction.shape)}.")
    length = direction.norm()
    if not bool(length > 0):
        raise ValueError("direction must have a length above 0.")
    unit = (direction / length).to(inputs)
    total = forward + backward
    points = torch.cat([inputs, (inputs[place] - backward * unit)[None]])
    points[place] = inputs[place] + forward * unit
    weights = torch.cat([multipliers, multipliers[place : place + 1] * (forward / total)])
    weights[place] = multipliers[place] * (backward / total)
    return Split(points, torch.cat([targets, targets[place : place + 1]]), weights)
