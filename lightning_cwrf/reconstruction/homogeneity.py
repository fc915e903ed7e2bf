"""Whether a network is homogeneous in its weights, as margin maximisation needs it without weight decay."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_cwrf.reconstruction.kkt import Equation

_TOLERANCE = 1e-6


class Degree(NamedTuple):
    """The degree L of a network, ``f(x; a θ) = a^L f(x; θ)``, or the first layer whose outputs have none.

    Attributes:
        degree: L, at least 1; None: there is none.
        layer: the name and the class of the first layer without a degree; empty where all have one.
    """

    degree: int | None
    layer: str = ""


def homogeneity(model: nn.Module, example: Tensor) -> int | None:
    """The degree L for which ``f(x; a θ) = a^L f(x; θ)``, from the outputs at a = ½ and 2; None if there is none.

    It is a question about the architecture: the parameters and the float buffers of a copy are disturbed at random
    first, because biases of zero and the statistics of a fresh BatchNorm hide that they are inhomogeneous.

    Args:
        model: a classifier; it is not changed.
        example: inputs ``(n, ...)``, whose shape alone counts: random ones are used.

    >>> homogeneity(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)), torch.zeros(1, 3))
    2
    >>> print(homogeneity(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 3)))
    None
    """
    return degree_of(model, tuple(example.shape[1:])).degree


def degree_of(model: nn.Module, shape: tuple[int, ...]) -> Degree:
    """:func:`homogeneity` for inputs of a shape, with the layer that is in the way."""
    equation = Equation(model)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(16, *shape, generator=generator, dtype=torch.float64).to(equation.device)
    targets = torch.zeros(16, dtype=torch.long, device=equation.device)
    equation.check_inputs(inputs, targets)
    with torch.no_grad():
        _disturb(equation, generator)
        start = [p.clone() for p in equation.parameters]
        found = []
        for factor in (1.0, 0.5, 2.0):
            for p, value in zip(equation.parameters, start, strict=True):
                p.copy_(factor * value)
            found.append(_outputs(equation, inputs, targets))
    base, half, double = found
    if list(base) == list(half) == list(double):
        for name, value in base.items():
            if _degree(value, half[name], double[name]) is None:
                return Degree(None, name)
    gaps = _degree(*(each[_GAPS] for each in found))
    return Degree(gaps) if gaps is not None and gaps >= 1 else Degree(None, "the outputs")


_GAPS = "the outputs"


def _disturb(equation: Equation, generator: torch.Generator) -> None:
    """Add noise to the trained parameters, and make the float buffers larger by random factors."""

    def noise(like: Tensor, draw: Any) -> Tensor:
        return draw(like.shape, generator=generator, dtype=like.dtype).to(like.device)  # type: ignore[no-any-return]

    for p in equation.parameters:
        spread = float(p.std()) if p.numel() > 1 else 0.0
        p.add_(max(spread, 0.1) * noise(p, torch.randn))
    for buffer in equation.model.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1 + noise(buffer, torch.rand)).add_(0.1 * noise(buffer, torch.rand))


def _outputs(equation: Equation, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The outputs of each layer in the order of the calls, and the gaps of the logits."""
    outputs: dict[str, Tensor] = {}

    def noted(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[f"{name or 'the model'} ({type(module).__name__})"] = output.clone()  # it may be overwritten

        return hook

    leaves = [(name, each) for name, each in equation.model.named_modules() if not list(each.children())]
    hooks = [each.register_forward_hook(noted(name)) for name, each in leaves]
    try:
        gaps = equation.gaps(inputs, targets)
    finally:
        for hook in hooks:
            hook.remove()
    return {**outputs, _GAPS: gaps}


def _degree(base: Tensor, half: Tensor, double: Tensor) -> int | None:
    if not base.is_floating_point():
        return 0
    size, larger = float(base.norm()), float(double.norm())
    if size == 0 or larger == 0:
        return 0 if size == larger == float(half.norm()) else None
    degree = round(float(torch.log2(torch.tensor(larger / size))))
    for factor, scaled in ((0.5, half), (2.0, double)):
        expected = factor**degree * base
        if float((scaled - expected).norm()) > _TOLERANCE * float(expected.norm()):
            return None
    return degree
