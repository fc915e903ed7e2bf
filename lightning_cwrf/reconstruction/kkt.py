"""The equation that a trained network's weights satisfy, and how well given examples satisfy it.

A homogeneous network that is trained long after it separates its examples approaches, in direction, a point of the
KKT conditions of margin maximisation (Lyu & Li 2020):

    θ = Σ_i Σ_{c ≠ y_i} λ_ic ∇_θ q_ic,   λ ≥ 0,   q_ic = f_{y_i}(x_i) − f_c(x_i).

With cross-entropy and a coupled weight decay w the same equation holds at a stationary point of any network that
computes the same in training as in evaluation (no BatchNorm, no dropout), with ``λ_ic = p_c(x_i) / (n w)``. An attacker
solves it for the examples (Haim et al. 2022; Buzaglo et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy import optimize
from torch import Tensor, nn

from lightning_cwrf.classification import classification_step, shapes_only
from lightning_cwrf.weights.copies import check_not_lazy, copied

_BLOCK = 128
"""Gradients that are computed together."""


class KKT(NamedTuple):
    """How well examples satisfy the equation.

    Attributes:
        residual: ρ = ‖θ − Σ λ_ic ∇q_ic‖² / ‖θ‖²; 0 if the equation holds, 1 without any examples.
        multipliers: λ, float64 ``(n, K − 1)``.
    """

    residual: float
    multipliers: Tensor


def logit_gaps(logits: Tensor, targets: Tensor) -> Tensor:
    """``q_ic = f_{y_i}(x_i) − f_c(x_i)`` for the classes c other than y_i, in order.

    Args:
        logits: ``(n, K)``.
        targets: class indices ``(n,)``.

    Returns:
        ``(n, K − 1)``; their minimum over c is the margin of the example.

    >>> logit_gaps(torch.tensor([[5.0, 1.0, 3.0]]), torch.tensor([2]))
    tensor([[-2.,  2.]])
    """
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = others + (others >= targets[:, None])
    return logits.gather(1, targets[:, None]) - logits.gather(1, others)


class Equation:
    """The equation of one network: its parameters, and the gradients of the gaps, in float64 on a copy.

    Only trained parameters that the outputs depend on are part of θ: the equation does not hold for frozen ones.

    Raises:
        ValueError: no parameter of the model is trained, or all are 0.
    """

    def __init__(self, model: nn.Module) -> None:
        check_not_lazy(model)
        self.model: nn.Module = copied(model).eval()
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.model.to("cpu" if device.type == "mps" else device, torch.float64)  # MPS has no float64
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(
                "no parameter of the model requires a gradient, so none counts as trained: call "
                "model.requires_grad_(True), or unfreeze those that were trained."
            )
        if not any(bool(p.any()) for p in self.parameters):
            raise ValueError("all trained weights of the model are 0, so they say nothing of any data: was it trained?")
        self.device = self.parameters[0].device

    def check_inputs(self, inputs: Tensor, targets: Tensor) -> None:
        """Raise a ValueError for inputs of a shape that the model does not take."""
        try:
            with shapes_only(), torch.no_grad():
                classification_step(self.model, (inputs[:2], targets[:2]))
        except RuntimeError as error:
            raise ValueError(
                f"the model cannot take inputs of the shape {tuple(inputs.shape[1:])}, beside that of the batch "
                f"({error}). Pass them as the model takes them."
            ) from error

    def unused(self, inputs: Tensor, targets: Tensor) -> list[bool]:
        """Of each parameter, whether the outputs do not depend on it."""
        with torch.enable_grad():
            gaps = self.gaps(inputs, targets).sum()
            if not gaps.requires_grad:
                return [True] * len(self.parameters)
            found = torch.autograd.grad(gaps, self.parameters, allow_unused=True)
        return [each is None for each in found]

    def gaps(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """:func:`logit_gaps` of the network's logits."""
        with shapes_only():
            return logit_gaps(*classification_step(self.model, (inputs, targets)))

    def residual(self, gaps: Tensor, multipliers: Tensor, *, create_graph: bool = False) -> Tensor:
        """ρ, a scalar, of gaps that are attached to the parameters."""
        weighted = (multipliers * gaps).sum()
        found = torch.autograd.grad(weighted, self.parameters, create_graph=create_graph, allow_unused=True)
        pairs = [(p.detach(), g) for p, g in zip(self.parameters, found, strict=True) if g is not None]
        missing = torch.stack([(p - g).square().sum() for p, g in pairs]).sum()
        return missing / torch.stack([p.square().sum() for p, _ in pairs]).sum()

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of all gaps as columns, ``(d, n (K − 1))``, and θ, ``(d,)``."""
        gaps = self.gaps(inputs, targets).flatten()
        blocks = [self._rows(gaps, block) for block in torch.split(torch.eye(len(gaps)).to(gaps), _BLOCK)]
        reached = [i for i in range(len(self.parameters)) if blocks[0][i] is not None]
        rows = torch.cat([torch.cat([block[i].flatten(1) for i in reached], 1) for block in blocks])  # type: ignore[union-attr]
        return rows.T, torch.cat([self.parameters[i].detach().flatten() for i in reached])

    def _rows(self, gaps: Tensor, block: Tensor) -> Sequence[Tensor | None]:
        """The gradients of some combinations of gaps, one a row, at once."""
        return torch.autograd.grad(
            gaps, self.parameters, block, retain_graph=True, allow_unused=True, is_grads_batched=True
        )

    def fitted(self, inputs: Tensor, targets: Tensor) -> KKT:
        """The multipliers λ ≥ 0 that leave the smallest residual, and that residual."""
        matrix, theta = self.gradients(inputs, targets)
        multipliers = nonnegative_least_squares(matrix, theta)
        residual = (theta - matrix @ multipliers).square().sum() / theta.square().sum()
        return KKT(float(residual), multipliers.view(len(inputs), -1))


def nonnegative_least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """The λ ≥ 0 with the smallest ``‖matrix λ − target‖₂``, by Lawson and Hanson's active sets.

    A QR decomposition makes the problem square first, so that its size is the number of columns; unlike the normal
    equations it does not square the condition number.

    Args:
        matrix: ``(d, p)``, of any rank.
        target: ``(d,)``.

    Returns:
        λ, float64 ``(p,)``.

    >>> nonnegative_least_squares(torch.eye(2), torch.tensor([3.0, -1.0]))
    tensor([3., 0.], dtype=torch.float64)
    """
    q, r = torch.linalg.qr(matrix.double())
    found, _ = optimize.nnls(r.cpu().numpy(), (q.T @ target.double()).cpu().numpy(), maxiter=30 * matrix.shape[1])
    return torch.from_numpy(found).to(matrix.device)


def kkt_residual(model: nn.Module, inputs: Tensor, targets: Tensor, multipliers: Tensor | None = None) -> KKT:
    """How well examples satisfy the equation of a network's weights, in float64; the model is not changed.

    Args:
        model: a classifier; it is evaluated on a copy, in eval mode.
        inputs: ``(n, ...)``.
        targets: class indices ``(n,)``.
        multipliers: λ, ``(n, K − 1)``, for the classes other than the target in order. None: those that leave the
            smallest residual, all K − 1 for each example.

    Returns:
        The residual and the multipliers.

    Raises:
        ValueError: inputs or multipliers of another shape, targets out of range, or no trained parameter.

    >>> net = nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    >>> found = kkt_residual(net, torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    >>> found.residual < 1e-12, found.multipliers
    (True, tensor([[0.5000]], dtype=torch.float64))
    """
    equation = Equation(model)
    inputs, targets = inputs.to(equation.device, torch.float64), targets.to(equation.device)
    equation.check_inputs(inputs, targets)
    with torch.enable_grad():
        logits, targets = classification_step(equation.model, (inputs, targets))  # checks the values
        if multipliers is None:
            return equation.fitted(inputs, targets)
        wanted = (len(logits), logits.shape[1] - 1)
        if tuple(multipliers.shape) != wanted:
            raise ValueError(f"multipliers must have the shape {wanted}, not {tuple(multipliers.shape)}.")
        multipliers = multipliers.to(equation.device, torch.float64)
        return KKT(float(equation.residual(equation.gaps(inputs, targets), multipliers)), multipliers)
