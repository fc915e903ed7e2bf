"""The attack: examples and multipliers for which the equation of the weights holds (Haim et al. 2022).

Nothing of the members enters it but their number. What else the attacker knows is the prior, which is named.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.reconstruction.gates import soft_gates
from lightning_cwrf.reconstruction.homogeneity import degree_of
from lightning_cwrf.reconstruction.kkt import Equation
from lightning_cwrf.reconstruction.prior import ReconstructionPrior

LARGEST = 2**28
"""Coordinates and multipliers of all candidates: in float64, with gradients and Adam's moments, over 8 GiB."""
LEAST_SHARE = 0.02
"""Candidates whose multipliers sum to less than this share of the largest sum are no part of the equation."""


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


def check_size(candidates: int, shape: tuple[int, ...], classes: int) -> None:
    """Raise a ValueError for more candidates than an attack can hold."""
    each = math.prod(shape) + classes - 1
    if candidates * each > LARGEST:
        raise ValueError(
            f"{candidates} candidates with {each} values to find each need more than {32 * LARGEST / 2**30:.0f} GiB: "
            f"pass fewer candidates=, at most {LARGEST // each} in all."
        )


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
        lr: of Adam: about the longest step of a coordinate, in units of the input, and of λ in units of λ₀.
        sharpness: α times the mean norm of the first weight's rows: per unit of distance to a neuron's hyperplane.
        margin: a guess of the members' logit gaps, for the scale of the multipliers alone.
        restarts: runs from other starting points, of which the one with the smallest residual is returned.
        seed: of the starting points.

    Raises:
        TypeError, ValueError: settings of the wrong type or out of range; more candidates than an attack can hold; a
            shape that the model does not take, or the center does not have; an attack that diverged; a model that
            gives another number of classes.

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
    check_size(candidates, tuple(shape), classes)
    prior.check_shape(tuple(shape))
    equation = Equation(model)
    norm = sum(float(p.detach().square().sum()) for p in equation.parameters)
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.arange(candidates) % classes).to(equation.device)
    with torch.enable_grad():
        relus = _relus(equation, prior, tuple(shape), classes)
        degree = degree_of(model, tuple(shape)).degree or relus + 1
        unit = 2 * norm / (degree * margin * candidates * (classes - 1))
        descent = _Descent(equation, prior, targets, unit, sharpness / _mean_row_norm(equation.model), steps, lr)
        runs = []
        for _ in range(restarts):
            inputs = prior.draw(candidates, tuple(shape), generator)
            multipliers = torch.rand(candidates, classes - 1, generator=generator, dtype=torch.float64)
            runs.append(descent.run(inputs, multipliers))
    return min(runs, key=lambda found: found.residual)


def _relus(equation: Equation, prior: ReconstructionPrior, shape: tuple[int, ...], classes: int) -> int:
    """How many ReLUs the attack can smooth; raises for another number of classes."""
    inputs = prior.draw(2, shape, torch.Generator().manual_seed(0)).to(equation.device)
    targets = torch.zeros(2, dtype=torch.long, device=equation.device)
    equation.check_inputs(inputs, targets)
    gates = soft_gates(1.0)
    with gates, torch.no_grad():
        found = equation.gaps(inputs, targets).shape[1] + 1
    if found != classes:
        raise ValueError(f"the model has {found} classes, not {classes}: pass classes={found}.")
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
