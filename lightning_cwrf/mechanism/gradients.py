"""Derivatives of each example's loss by itself, and the directions that a mechanism moves in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lightning_cwrf.classification import check_no_probabilities, shapes_only, split_batch
from lightning_cwrf.outputs import ForwardStep

_NUMBERS_AT_ONCE = 1 << 24
"""How many derivatives are held at once before they are used."""
_ENOUGH = 8
"""Examples whose logits do not sum to 1 each by chance."""


@contextmanager
def _keeps_nothing() -> Iterator[None]:
    """Say what is meant where values of a vectorised pass were kept, and come back in a later one."""
    try:
        yield
    except RuntimeError as error:
        if "functorch" not in str(error) and "vmap" not in str(error):
            raise
        raise ValueError(
            "the model keeps something of the examples that it has seen (a buffer or an attribute that its forward "
            "pass or its classification_step sets, or a metric that it updates there), and the gradient of an example "
            "must be its own: update them in training_step, or not in eval mode."
        ) from error


@_keeps_nothing()
def example_gradients(model: nn.Module, batch: Any, names: Sequence[str], at: Tensor | None = None) -> Tensor:
    """The gradient of each example's cross-entropy, ``(n, d)`` in the model's precision; the model is not changed.

    Each example goes through the model by itself, vectorised where the model allows that, so no gradient can depend on
    another example. Call it with the model in eval mode.

    Args:
        model: a classifier.
        batch: of n examples; every tensor in it has the examples first.
        names: of parameters, with d numbers together.
        at: float64 ``(d,)``, values of these parameters in place of the model's.

    Raises:
        TypeError: the batch holds something other than tensors.
        ValueError: a tensor in it does not have the examples first; targets or logits are wrong.

    >>> layer = nn.Linear(2, 2).eval()
    >>> example_gradients(layer, (torch.ones(3, 2), torch.tensor([0, 1, 0])), ["weight", "bias"]).shape
    torch.Size([3, 6])
    """
    batch, _ = _checked(batch)
    step, weights = _step(model, names, at)
    with torch.no_grad():  # as a whole: what is wrong with targets or logits raises here
        torch.func.functional_call(step, weights, (batch,))

    def loss(values: dict[str, Tensor], example: Any) -> Tensor:
        with shapes_only():
            logits, targets = torch.func.functional_call(step, values, (_alone(example),))
        return F.cross_entropy(logits, targets)

    size = sum(value.numel() for value in weights.values())
    return _side_by_side(_each(torch.func.grad(loss), weights, batch, size), weights, 1)


@_keeps_nothing()
def label_gradients(model: nn.Module, batch: Any, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What the loss of each example would have as its gradient under each label: ``(n, K, d)``, and softmax ``(n, K)``.

    The labels of the batch are not read, and it need not have any.

    >>> gradients, p = label_gradients(nn.Linear(2, 3).eval(), torch.ones(4, 2), ["weight", "bias"])
    >>> gradients.shape, p.shape
    (torch.Size([4, 3, 9]), torch.Size([4, 3]))
    """
    batch, examples = _checked(_without_labels(model, batch))
    step, weights = _step(model, names, None)
    with shapes_only(), torch.no_grad():
        logits, _ = torch.func.functional_call(step, weights, (batch,))
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's logits on the public data are NaN or infinite: its curvature is not defined.")
    if len(logits) != examples:
        raise ValueError(f"the model gives {len(logits)} rows of logits for {examples} examples of the public data.")
    if examples >= _ENOUGH:
        check_no_probabilities(logits, "the public data")

    def losses(values: dict[str, Tensor], example: Any) -> tuple[Tensor, Tensor]:
        with shapes_only():
            z, _ = torch.func.functional_call(step, values, (_alone(example),))
        logs = F.log_softmax(z[0], -1)
        return -logs, logs.exp()

    size = logits.shape[1] * sum(value.numel() for value in weights.values())
    found, p = _each(torch.func.jacrev(losses, has_aux=True), weights, batch, size)
    return _side_by_side(found, weights, 2), p


def parts_of(batches: Iterable[Any], size: list[int]) -> Iterator[Any]:
    """The batches in parts of at most ``size[0]`` examples, which the caller may change from part to part."""
    for batch in batches:
        leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim]
        begin, examples = 0, max(map(len, leaves), default=1)
        while begin < examples:
            end = begin + size[0]
            yield rows(batch, begin, end)
            begin = end


def part_size(model: nn.Module, names: Sequence[str], classes: int = 1) -> int:
    """How many examples' derivatives are held at once."""
    own = dict(model.named_parameters())
    return max(1, _NUMBERS_AT_ONCE // (classes * sum(own[name].numel() for name in names)))


def rows(batch: Any, begin: int, end: int) -> Any:
    """Some examples of a batch, whose tensors have the examples first."""

    def some(leaf: Any) -> Any:
        return leaf[begin:end] if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim else leaf

    return pytree.tree_map(some, batch)


@dataclass(frozen=True)
class Subspace:
    """Random directions ``R`` ``(d, k)`` float32, drawn from a seed alone: the parameters are ``θ_0 + R z``."""

    basis: Tensor

    @classmethod
    def draw(cls, parameters: int, dimensions: int, seed: int) -> Subspace:
        """Draw k directions of d parameters, with entries ``N(0, 1/d)``.

        >>> Subspace.draw(100, 3, seed=0).basis.shape
        torch.Size([100, 3])
        """
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(parameters, dimensions, generator=generator) / math.sqrt(parameters))

    def project(self, gradients: Tensor) -> Tensor:
        """Gradients ``(..., d)`` by ``θ`` as gradients ``(..., k)`` by ``z``."""
        return gradients @ self.basis.to(gradients)

    def lift(self, position: Tensor) -> Tensor:
        """``R z``, float64 ``(d,)``."""
        return (self.basis @ position.to(self.basis)).double()


def _step(model: nn.Module, names: Sequence[str], at: Tensor | None) -> tuple[ForwardStep, dict[str, Tensor]]:
    """The model as a function of a batch, and the values of the named parameters."""
    own = dict(model.named_parameters())
    weights = {f"model.{name}": own[name].detach() for name in names}
    if at is not None:
        pieces = torch.split(at, [value.numel() for value in weights.values()])
        given = zip(weights.items(), pieces, strict=True)
        weights = {name: piece.view(value.shape).to(value) for (name, value), piece in given}
    return ForwardStep(model), weights


def _each(function: Callable[..., Any], weights: dict[str, Tensor], batch: Any, size: int) -> Any:
    """``function(weights, example)`` of each example, vectorised where the model allows it, else one by one."""
    at_once = max(1, _NUMBERS_AT_ONCE // size)
    try:
        return torch.func.vmap(function, in_dims=(None, 0), chunk_size=at_once)(weights, batch)
    except (RuntimeError, ValueError, NotImplementedError):  # a layer without a vectorised form, or values are read
        examples = len(next(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)))
        alone = (pytree.tree_map(lambda leaf, i=i: leaf[i], batch) for i in range(examples))
        found = [function(weights, example) for example in alone]
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *found)


def _alone(example: Any) -> Any:
    """One example as a batch."""
    return pytree.tree_map(lambda leaf: leaf.unsqueeze(0), example)


def _side_by_side(parts: dict[str, Tensor], weights: dict[str, Tensor], kept: int) -> Tensor:
    return torch.cat([parts[name].detach().flatten(kept) for name in weights], -1)


def _checked(batch: Any) -> tuple[Any, int]:
    """The batch with tensors in place of arrays, and its size; each tensor must have one row for each example."""
    batch = pytree.tree_map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, batch)
    leaves = pytree.tree_leaves(batch)
    other = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    if other or not leaves:
        what = f"a {type(other[0]).__name__}" if other else "nothing"
        raise TypeError(
            f"gradients of single examples need batches of tensors, and this one holds {what}: give tensors by the "
            "loader's collate_fn."
        )
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(sizes) > 1 or None in sizes:
        raise ValueError(
            f"every tensor of a batch must have one row for each example, these have the shapes "
            f"{', '.join(str(tuple(leaf.shape)) for leaf in leaves)}: what all examples share could hold any of them."
        )
    return batch, int(leaves[0].shape[0])


def _without_labels(model: nn.Module, batch: Any) -> Any:
    """The batch with zeros as its labels, unless only the model's own ``classification_step`` can interpret it."""
    if hasattr(model, "classification_step"):
        return batch
    try:
        inputs, _ = split_batch(batch)
    except TypeError:
        inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else batch
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, (Tensor, np.ndarray))]
    if not leaves:
        raise TypeError(f"the public data must give batches of tensors, not {type(batch).__name__}.")
    device = leaves[0].device if isinstance(leaves[0], Tensor) else None
    zeros = torch.zeros(len(leaves[0]), dtype=torch.long, device=device)
    return {**batch, "label": zeros} if inputs is batch and isinstance(batch, Mapping) else (inputs, zeros)
