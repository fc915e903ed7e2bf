"""IHA, the inverse Hessian attack (Suri, Zhang & Evans 2024): white-box, with the other training examples known."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_cwrf.attacks.signals import check_finite
from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.classification import shapes_only
from lightning_cwrf.data import OverlapCheck, as_loader, bring_to
from lightning_cwrf.outputs import ForwardStep, evaluating
from lightning_cwrf.weights.copies import copied

_BLOCK = 16
"""Examples whose systems are solved together."""


class IHAScores(NamedTuple):
    """Scores of :func:`inverse_hessian_attack`, float64, higher = more likely a member; each in the data's order."""

    members: Tensor
    nonmembers: Tensor


def inverse_hessian_attack(
    model: nn.Module,
    members: Dataset[Any] | DataLoader[Any],
    nonmembers: Dataset[Any] | DataLoader[Any],
    *,
    learning_rate: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    damping: float = 0.2,
    count: int | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
) -> IHAScores:
    """IHA (Suri, Zhang & Evans 2024, arXiv 2406.11544): what the weights say about one more training example.

    The attacker knows the model's weights, how it was trained by SGD, and **every training example but the one in
    question**; this is the leave-one-out game of differential privacy, and a much stronger attacker than that of other
    attacks here. With ℓ the loss of the example z, g its gradient, n the number of training examples, L their mean
    loss (of a member: that of the others), H the Hessian of the mean loss of the training data plus ``weight_decay``
    and ``damping``, d = H⁻¹g, a = H⁻¹∇L, η the learning rate, μ the momentum and λ the weight decay, the score is that
    of the authors' code::

        ℓ / (1 + μ) − (d·d / n + 2 a·d) · (1 − ηλ / (1 + μ)) / η − (d·e / n + 2 a·e) · λ / η,    e = H⁻¹d

    Inverse-Hessian products are solved by conjugate gradients in float64, one for each example (two with weight decay).
    Each iteration is a pass over all the training data, whose activations are kept in memory, so this is for small
    models and data, or for a few examples (``count``).

    Args:
        model: a finished classifier, without a defense that changes its outputs; it is not changed.
        members: all the training examples, without augmentation: a data set or a loader of one.
        nonmembers: examples that the model never saw, likewise.
        learning_rate: η, of the training's SGD.
        momentum: μ, in [0, 1).
        weight_decay: λ.
        damping: added to the Hessian's diagonal, which makes it positive definite. The authors use 0.2.
        count: score the first so many examples of each side alone; None: all.
        tolerance: of a solution, relative to the gradient's norm.
        max_iterations: of conjugate gradients.

    Raises:
        TypeError: data of another kind, a number of the wrong type.
        ValueError: a number out of range; fewer than 2 members; non-members that are members; a Hessian that is not
            positive definite, or a solution that is not reached: raise the damping.

    >>> from torch.utils.data import TensorDataset
    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> x, y = torch.randn(12, 3), torch.arange(12) % 2
    >>> inside, outside = TensorDataset(x[:6], y[:6]), TensorDataset(x[6:], y[6:])
    >>> scores = inverse_hessian_attack(nn.Linear(3, 2), inside, outside, learning_rate=0.1)
    >>> scores.members.shape, scores.nonmembers.shape
    (torch.Size([6]), torch.Size([6]))
    """
    check_number("learning_rate", learning_rate, low=0, low_open=True)
    check_number("momentum", momentum, low=0, high=1, high_open=True)
    check_number("weight_decay", weight_decay, low=0)
    check_number("damping", damping, low=0)
    check_number("tolerance", tolerance, low=0, high=1, low_open=True)
    check_integer("max_iterations", max_iterations, low=1)
    if count is not None:
        check_integer("count", count, low=1)
    sides = [_one_by_one(data, name) for data, name in ((members, "members"), (nonmembers, "nonmembers"))]
    OverlapCheck(members, nonmembers, "nonmembers")
    with evaluating(model):
        work = _Losses(copied(model).double(), members)
    if work.examples < 2:
        raise ValueError("the attack needs at least 2 members, because the attacker knows the others.")

    def solve(right: Tensor) -> Tensor:
        curvature = weight_decay + damping
        return conjugate_gradients(lambda v: work.hessian(v) + curvature * v, right, tolerance, max_iterations)

    n, shared = work.examples, solve(work.gradient()[None])
    found = []
    for side, inside in zip(sides, (True, False), strict=True):
        batches = list(itertools.islice(side, count))
        scores = []
        for begin in range(0, len(batches), _BLOCK):
            losses, gradients = work.of_each(batches[begin : begin + _BLOCK])
            d = solve(gradients)
            e = solve(d) if weight_decay else torch.zeros_like(d)
            a = (n * shared - d) / (n - 1) if inside else shared  # linear: no further solution for the others' mean
            pull, decay = ((d * with_).sum(-1) / n + 2 * (a * with_).sum(-1) for with_ in (d, e))
            scale = (1 - learning_rate * weight_decay / (1 + momentum)) / learning_rate
            scores.append(losses / (1 + momentum) - pull * scale - decay * weight_decay / learning_rate)
        found.append(check_finite("the scores", torch.cat(scores).cpu()))
    return IHAScores(*found)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float = 1e-5, max_iterations: int = 1000
) -> Tensor:
    """Solutions ``(b, p)`` of A x = r for each row r of ``right`` ``(b, p)``, A symmetric and positive definite.

    Args:
        product: gives A v for each row v of ``(b, p)``.
        right: the right-hand sides.
        tolerance: a solution's residual is at most this times the norm of its right-hand side.
        max_iterations: at most.

    Raises:
        ValueError: A is not positive definite along a direction that was met, or a solution is not reached.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradients(lambda v: v @ A, torch.tensor([[3.0, 4.0]])).round(decimals=4)
    tensor([[1., 1.]])
    """
    found, residual = torch.zeros_like(right), right.clone()
    direction, size = residual.clone(), residual.square().sum(-1)
    goal = tolerance**2 * size
    for _ in range(max_iterations):
        going = size > goal
        if not bool(going.any()):
            return found
        moved = product(direction)
        curvature = (direction * moved).sum(-1)
        if bool((curvature[going] <= 0).any()):
            raise ValueError(
                "the Hessian with this damping is not positive definite: the model is not at a minimum of its training "
                "loss. Raise damping."
            )
        length = torch.where(going, size / curvature.clamp_min(torch.finfo(size.dtype).tiny), 0.0)[:, None]
        found, residual = found + length * direction, residual - length * moved
        now = residual.square().sum(-1)
        direction = residual + (now / size.clamp_min(torch.finfo(size.dtype).tiny))[:, None] * direction
        size = now
    if bool((size > goal).any()):
        raise ValueError(
            f"conjugate gradients did not reach the tolerance {tolerance:g} in {max_iterations} iterations. Raise "
            "damping, max_iterations or the tolerance."
        )
    return found


class _Losses:
    """Loss, gradient and Hessian of a copied model in float64, over its trainable weights as one vector."""

    def __init__(self, model: Any, data: Any) -> None:
        self.model = ForwardStep(model.eval())
        self.weights = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        if not self.weights:
            raise ValueError("the model has no trainable weights.")
        bring = bring_to(model)
        self.batches = [bring(batch) for batch in as_loader(data, shuffle=False)]
        self.bring = bring
        with torch.no_grad():
            self.sizes = [len(self.model(batch)[1]) for batch in self.batches]  # and wrong values raise here
        self.examples = sum(self.sizes)
        self._products: list[Callable[[dict[str, Tensor]], Any]] = []

    def gradient(self) -> Tensor:
        """Of the mean loss of all examples, ``(p,)``."""
        total: Any = 0.0
        for batch, size in zip(self.batches, self.sizes, strict=True):
            total = total + size / self.examples * self._flat(torch.func.grad(self._loss)(self.weights, batch))
        found: Tensor = total
        return found

    def hessian(self, vectors: Tensor) -> Tensor:
        """The Hessian of the mean loss times each row of ``(b, p)``."""
        if not self._products:
            for batch in self.batches:
                gradient = torch.func.grad(functools.partial(self._loss, batch=batch))
                _, times, *_ = torch.func.vjp(gradient, self.weights)  # the Hessian is symmetric
                self._products.append(torch.vmap(times))
        total = torch.zeros_like(vectors)
        for times, size in zip(self._products, self.sizes, strict=True):
            total += size / self.examples * self._flat(times(self._split(vectors))[0], 1)
        return total

    def of_each(self, batches: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """The losses ``(b,)`` and gradients ``(b, p)`` of batches of one example each."""
        found = [torch.func.grad_and_value(self._loss)(self.weights, self.bring(batch)) for batch in batches]
        return torch.stack([loss for _, loss in found]), torch.stack([self._flat(gradient) for gradient, _ in found])

    def _loss(self, weights: dict[str, Tensor], batch: Any) -> Tensor:
        with shapes_only():
            logits, targets = torch.func.functional_call(self.model, weights, (batch,))
        found: Tensor = nn.functional.cross_entropy(logits, targets)
        return found

    def _flat(self, parts: dict[str, Tensor], kept: int = 0) -> Tensor:
        """The parts side by side; the first ``kept`` dimensions stay."""
        return torch.cat([parts[name].detach().flatten(kept) for name in self.weights], -1)

    def _split(self, vectors: Tensor) -> dict[str, Tensor]:
        pieces = torch.split(vectors, [value.numel() for value in self.weights.values()], dim=-1)
        return {
            name: piece.view(len(vectors), *value.shape)
            for (name, value), piece in zip(self.weights.items(), pieces, strict=True)
        }


def _one_by_one(data: Any, name: str) -> Any:
    """Batches of one example."""
    source = data.dataset if isinstance(data, DataLoader) else data
    if not isinstance(source, Dataset) or isinstance(source, IterableDataset):
        raise TypeError(f"{name} must be a map-style data set or a DataLoader of one, not a {type(data).__name__}.")
    return as_loader(data, shuffle=False, batch_size=1)
