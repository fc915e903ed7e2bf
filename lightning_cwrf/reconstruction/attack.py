"""The attack: examples and multipliers for which the equation of the weights holds (Haim et al. 2022).

Nothing of the members enters it but their number. What else the attacker knows is the prior, which is named.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.reconstruction.homogeneity import degree_of
from lightning_cwrf.reconstruction.kkt import Equation

LEAST_SHARE = 0.02
"""Candidates whose multipliers sum to less than this share of the largest sum are no part of the equation."""

RELUS = {F.relu, torch.relu, Tensor.relu, F.relu_, torch.relu_, Tensor.relu_}
_RELU_IN_PLACE = {F.relu_, torch.relu_, Tensor.relu_}


@dataclass(frozen=True, eq=False)
class ReconstructionPrior:
    """What the attacker knows of the inputs: where the search begins, and the range of their coordinates.

    The equation alone has infinitely many solutions, arbitrarily far from the members, and a prior chooses among them
    (Refael et al., "No Prior, No Leakage"). Every result names it, as ``str(prior)`` does.

    Args:
        center: the centre of the candidates at the start, in units of the input: a number, or a tensor of the inputs'
            shape, such as the mean image of the population.
        scale: the standard deviation of each coordinate around it, in units of the input.
        box: the lowest and the highest value of a coordinate, which the attack is told; None: it is not.

    Raises:
        TypeError: settings of the wrong type.
        ValueError: a scale that is not positive, values that are not finite, a box whose ends are not in order.

    >>> print(ReconstructionPrior(scale=1.0, box=(-0.8, 0.8)))
    N(0, 1²) in each coordinate, kept in [-0.8, 0.8]
    """

    center: float | Tensor = 0.0
    scale: float = 0.03
    box: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_number("scale", self.scale, low=0, low_open=True)
        if isinstance(self.center, Tensor):
            if not self.center.is_floating_point() or not bool(self.center.isfinite().all()):
                raise ValueError("center must be a number, or a tensor of finite floats of the inputs' shape.")
        else:
            check_number("center", self.center)
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
        center = self.center.detach().cpu().double() if isinstance(self.center, Tensor) else self.center
        return center + self.scale * noise

    def penalty(self, inputs: Tensor) -> Tensor:
        """``mean_j Σ_k relu(x − hi)² + relu(lo − x)²``; 0 without a box."""
        if self.box is None:
            return inputs.new_zeros(())
        low, high = self.box
        return ((inputs - high).relu().square() + (low - inputs).relu().square()).flatten(1).sum(1).mean()


@dataclass(frozen=True)
class Reconstruction:
    """What an attack found.

    Attributes:
        inputs: float64 ``(r, ...)`` on the CPU, the candidates that are part of the equation.
        targets: the class that each was a candidate of, ``(r,)``.
        multipliers: λ, float64 ``(r, K − 1)``; small negative ones are left by the penalty.
        residual: ρ of all candidates with the attack's soft gates, which it minimised.
        exact_residual: ρ of the same with the network's own gates and ``max(λ, 0)``.
        prior: what the attacker knew.
    """

    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    multipliers: Tensor = field(repr=False)
    residual: float
    exact_residual: float
    prior: ReconstructionPrior

    def __len__(self) -> int:
        return len(self.inputs)


class _SoftReLU(torch.autograd.Function):
    """ReLU whose derivative is ``σ(αh)`` instead of ``1[h > 0]``, and can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, sharpness: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.sharpness = sharpness
        return h.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (h,) = ctx.saved_tensors
        return gradients[0] * torch.sigmoid(ctx.sharpness * h), None


class soft_gates(TorchFunctionMode):
    """Inside, every ReLU has the derivative ``σ(αh)``; its output is unchanged.

    The gradients of a ReLU network by its weights are piecewise constant in the gates, so that without this the
    residual tells an attack nothing about the inputs at which a gate opens. It replaces ``nn.ReLU``, ``F.relu``,
    ``torch.relu`` and ``Tensor.relu``, also in place.

    Args:
        sharpness: α, per unit of h.

    Attributes:
        calls: how many ReLUs were replaced.

    >>> h = torch.zeros(1, requires_grad=True)
    >>> with soft_gates(30.0):
    ...     y = torch.relu(h)
    >>> torch.autograd.grad(y, h)
    (tensor([0.5000]),)
    """

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in RELUS:
            return func(*args, **kwargs)
        self.calls += 1
        given = [*args, *kwargs.values()]
        h = given[0]
        if func in _RELU_IN_PLACE or given[1:] == [True]:
            return h.copy_(_SoftReLU.apply(h.clone(), self.sharpness))
        return _SoftReLU.apply(h, self.sharpness)


def check_settings(
    prior: ReconstructionPrior,
    *,
    steps: int,
    lr: float,
    sharpness: float,
    margin: float,
    restarts: int,
    seed: int,
) -> None:
    """Raise for settings of :func:`reconstruct` that are no settings, before any time is spent."""
    if not isinstance(prior, ReconstructionPrior):
        raise TypeError(f"prior must be a ReconstructionPrior, not a {type(prior).__name__}.")
    check_integer("steps", steps, low=1)
    check_integer("restarts", restarts, low=1)
    check_integer("seed", seed, low=0)
    for name, value in (("lr", lr), ("sharpness", sharpness), ("margin", margin)):
        check_number(name, value, low=0, low_open=True)


def reconstruct(
    model: nn.Module,
    shape: tuple[int, ...],
    classes: int,
    *,
    candidates: int,
    prior: ReconstructionPrior | None = None,
    steps: int = 2000,
    lr: float = 0.02,
    sharpness: float = 30.0,
    margin: float = 5.0,
    restarts: int = 1,
    seed: int = 0,
) -> Reconstruction:
    """Examples for which the equation of the network's weights holds, by gradient descent from the prior.

    Minimises ``ρ(x, λ) + 5 · mean relu(−λ / λ₀)² + box`` over inputs and all K − 1 multipliers of each, with Adam and a
    cosine schedule, in float64 and with :func:`soft_gates`. ``λ₀ = 2 ‖θ‖² / (L · margin · m (K − 1))`` follows from
    Euler's theorem, ``Σ λ q = ‖θ‖² / L``, for a network of degree L; of a network without a degree, L is its number of
    ReLUs and one more, the largest it could have.

    Args:
        model: a classifier with ReLUs; it is not changed.
        shape: of one input.
        classes: K. Candidates are of each class in turn.
        candidates: m.
        prior: what the attacker knows of the inputs. None: the default of :class:`ReconstructionPrior`.
        steps: of Adam.
        lr: of Adam, in units of the input, and for λ in units of λ₀; at most ``lr`` a step and coordinate.
        sharpness: α times the mean norm of the first weight's rows: per unit of distance to a neuron's hyperplane.
        margin: a guess of the members' logit gaps, for the scale of the multipliers alone.
        restarts: runs from other starting points, of which the one with the smallest residual is returned.
        seed: of the starting points.

    Raises:
        TypeError, ValueError: settings of the wrong type or out of range; a center of another shape; an attack that
            diverged; a model that gives another number of classes.

    Warns:
        UserWarning: the network calls no ReLU that :func:`soft_gates` knows.

    >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    >>> found = reconstruct(net, (2,), 2, candidates=4, steps=5)
    >>> found.inputs.shape[1:], found.multipliers.shape[1:]
    (torch.Size([2]), torch.Size([1]))
    """
    prior = ReconstructionPrior() if prior is None else prior
    check_settings(prior, steps=steps, lr=lr, sharpness=sharpness, margin=margin, restarts=restarts, seed=seed)
    check_integer("candidates", candidates, low=1)
    check_integer("classes", classes, low=2)
    prior.check_shape(tuple(shape))
    equation = Equation(model)
    norm = sum(float(p.detach().square().sum()) for p in equation.parameters)
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.arange(candidates) % classes).to(equation.device)
    with torch.enable_grad():
        relus = _relus(equation, prior, tuple(shape))
        degree = degree_of(model, tuple(shape)).degree or relus + 1
        unit = 2 * norm / (degree * margin * candidates * (classes - 1))
        descent = _Descent(equation, prior, targets, unit, sharpness / _mean_row_norm(equation.model), steps, lr)
        runs = []
        for _ in range(restarts):
            inputs = prior.draw(candidates, tuple(shape), generator)
            multipliers = torch.rand(candidates, classes - 1, generator=generator, dtype=torch.float64)
            runs.append(descent.run(inputs, multipliers))
    return min(runs, key=lambda found: found.residual)


def _relus(equation: Equation, prior: ReconstructionPrior, shape: tuple[int, ...]) -> int:
    """How many ReLUs the attack can smooth."""
    inputs = prior.draw(2, shape, torch.Generator().manual_seed(0)).to(equation.device)
    gates = soft_gates(1.0)
    with gates, torch.no_grad():
        equation.gaps(inputs, torch.zeros(2, dtype=torch.long, device=equation.device))
    if not gates.calls:
        warnings.warn(
            "the network calls no ReLU that the attack can smooth (nn.ReLU, F.relu, torch.relu): the attack is made "
            "for ReLU networks, and that it finds nothing in this one shows nothing.",
            stacklevel=3,
        )
    return gates.calls


def _mean_row_norm(model: nn.Module) -> float:
    """Of the first weight, by which h is in units of the input."""
    weight = next((p for p in model.parameters() if p.ndim > 1), torch.ones(1, 1))
    return max(float(weight.detach().flatten(1).norm(dim=1).mean()), 1e-12)


@dataclass(frozen=True)
class _Descent:
    """The minimisation from one starting point."""

    equation: Equation
    prior: ReconstructionPrior
    targets: Tensor
    unit: float
    sharpness: float
    steps: int
    lr: float

    def run(self, inputs: Tensor, scaled: Tensor) -> Reconstruction:
        device = self.equation.device
        inputs, scaled = (each.to(device).requires_grad_() for each in (inputs, scaled))
        optimizer = torch.optim.Adam([inputs, scaled], lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            residual = self._soft_residual(inputs, scaled, create_graph=True)
            loss = residual + 5 * F.relu(-scaled).square().mean() + self.prior.penalty(inputs)
            inputs.grad, scaled.grad = torch.autograd.grad(loss, (inputs, scaled))
            optimizer.step()
            schedule.step()
        final = float(self._soft_residual(inputs, scaled))
        if not math.isfinite(final):
            raise ValueError(f"the attack diverged at lr={self.lr:g} (its residual is {final}): pass a smaller lr.")
        return self._found(inputs.detach(), self.unit * scaled.detach(), final)

    def _soft_residual(self, inputs: Tensor, scaled: Tensor, *, create_graph: bool = False) -> Tensor:
        with soft_gates(self.sharpness):
            gaps = self.equation.gaps(inputs, self.targets)
        return self.equation.residual(gaps, self.unit * scaled, create_graph=create_graph)

    def _found(self, inputs: Tensor, multipliers: Tensor, residual: float) -> Reconstruction:
        positive = multipliers.clamp_min(0)
        exact = float(self.equation.residual(self.equation.gaps(inputs, self.targets), positive))
        strength = positive.sum(1)
        kept = (strength > LEAST_SHARE * strength.max()).nonzero().flatten()
        inputs, targets, multipliers = (each[kept].cpu() for each in (inputs, self.targets, multipliers))
        return Reconstruction(inputs, targets, multipliers, residual, exact, self.prior)
