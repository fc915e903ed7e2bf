"""What an attacker knows of the inputs, named in every result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cwrf.checks import check_number


@dataclass(frozen=True, eq=False)
class ReconstructionPrior:
    """What the attacker knows of the inputs: where the search begins, and the range of their coordinates.

    The equation alone has infinitely many solutions, arbitrarily far from the members, and a prior chooses among them
    (Refael et al., "No Prior, No Leakage"). Every result names it, as ``str(prior)`` does.

    Args:
        center: the centre of the candidates at the start, in units of the input: a number, or a tensor, an array or
            nested lists of the inputs' shape, such as the mean image of the population. Kept as a number or a tensor.
        scale: the standard deviation of each coordinate around it, in units of the input.
        box: the lowest and the highest value of a coordinate, which the attack is told; None: it is not.

    Raises:
        TypeError: settings of the wrong type.
        ValueError: a scale that is not positive, values that are not finite, a box whose ends are not in order.

    >>> print(ReconstructionPrior(scale=1.0, box=(-0.8, 0.8)))
    N(0, 1²) in each coordinate, kept in [-0.8, 0.8]
    """

    center: float | Tensor | list[Any] = 0.0
    scale: float = 0.03
    box: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_number("scale", self.scale, low=0, low_open=True)
        object.__setattr__(self, "center", _center(self.center))
        if self.box is not None:
            if not isinstance(self.box, (tuple, list)) or len(self.box) != 2:
                raise TypeError(f"box must be a pair, the lowest and the highest value, not {self.box!r}.")
            for value in self.box:
                check_number("the ends of box", value)
            if self.box[0] >= self.box[1]:
                raise ValueError(f"box must have its lower end first, not {tuple(self.box)}.")

    def __str__(self) -> str:
        kept = "" if self.box is None else f", kept in [{self.box[0]:g}, {self.box[1]:g}]"
        if isinstance(self.center, Tensor):
            return f"N(c, {self.scale:g}²) around a given c of shape {tuple(self.center.shape)}{kept}"
        return f"N({self.center:g}, {self.scale:g}²) in each coordinate{kept}"

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise a ValueError for a center of another shape than the inputs."""
        if isinstance(self.center, Tensor) and tuple(self.center.shape) != shape:
            raise ValueError(
                f"the prior's center has the shape {tuple(self.center.shape)} and the inputs {shape}: pass a number or "
                "a tensor of one input."
            )

    def draw(self, count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """``count`` starting points, float64 ``(count, *shape)``."""
        noise = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        center = torch.as_tensor(self.center, dtype=torch.float64).detach().cpu()
        return self.scale * noise + center

    def penalty(self, inputs: Tensor) -> Tensor:
        """``mean_j Σ_k relu(x − hi)² + relu(lo − x)²``; 0 without a box."""
        if self.box is None:
            return inputs.new_zeros(())
        low, high = self.box
        return ((inputs - high).relu().square() + (low - inputs).relu().square()).flatten(1).sum(1).mean()


def _center(given: Any) -> float | Tensor:
    """A number as it is; an array or nested lists as a tensor."""
    wrong = "center must be a number, or a tensor, an array or nested lists of finite floats of the inputs' shape"
    if isinstance(given, (list, tuple)):
        try:
            values = np.array(given)
        except ValueError as error:  # lists of different lengths
            raise ValueError(f"{wrong}: these lists have different lengths.") from error
        given = values.astype(np.float64) if values.dtype.kind in "iuf" else values
    if isinstance(given, np.ndarray):
        if given.dtype.kind != "f":
            raise ValueError(f"{wrong}, not of {given.dtype}.")
        given = torch.from_numpy(given.astype(np.float64))
    if not isinstance(given, Tensor):
        check_number("center", given)
        return given  # type: ignore[no-any-return]
    if not given.is_floating_point():
        raise ValueError(f"{wrong}, not of {given.dtype}.")
    if not bool(given.isfinite().all()):
        raise ValueError(f"{wrong}; some of these are not finite.")
    return given
