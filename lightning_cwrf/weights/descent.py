"""Eq. 2 along a plain SGD descent on a copy of the model, in little memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_cwrf.classification import classification_step, split_batch
from lightning_cwrf.data import isolated_rng
from lightning_cwrf.weights.copies import copied

_CHUNK = 1 << 20  # weights scored at a time, so that their products need no memory of the size of a layer


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that count as weights: trainable, each shared one once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Check the model; keep the caller's random state out, and leave the modes that surround the call."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {_named(model)}.")
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"the model has lazy parameters without a shape yet ({', '.join(lazy[:5])}): run a batch through it first."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(isolated_rng(device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {device.type, "cpu"}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _named(thing: Any) -> str:
    return f"the class {thing.__name__}; pass an instance" if isinstance(thing, type) else type(thing).__name__


def accumulate(
    model: nn.Module,
    begin: Callable[[], Callable[[nn.Module], Tensor]],
    steps: int,
    lr: float,
    on_step: Callable[[int], Any] | None,
) -> dict[str, Tensor]:
    """Eq. 2 along plain SGD on a copy: φ += |g ⊙ θ'|, then θ' -= η_e·g (Algorithm 1, lines 7-9).

    Each gradient is used and freed as soon as the backward pass has it, so that they never stand in memory together.
    A model that still needs a weight's old value afterwards (because it uses the weight detached somewhere) makes
    autograd say so, as does one with reentrant checkpoints, whose gradients come in parts; then it begins anew, and all
    gradients of a step are kept until its backward pass is over.

    Args:
        model: it is copied.
        begin: gives an objective, a function of the copy that takes the next batches. Called once more where the
            descent begins anew.
        steps: T.
        lr: η_e.
        on_step: called with the number of steps done.
    """
    try:
        return _descend(model, begin(), steps, lr, on_step, at_once=True)
    except _GradientsKept:
        return _descend(model, begin(), steps, lr, on_step, at_once=False)


class TwoBatches:
    """Runs two batches through a model, as one where that gives the same.

    In one forward pass autograd has each weight's gradient whole. In two, the gradients of one pass wait in memory,
    as large as the weights, for those of the other. Whether a model takes both batches as one is tried the first time.
    """

    def __init__(self) -> None:
        self._as_one: bool | None = None

    def __call__(self, model: nn.Module, first: Any, second: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The first batch's logits and targets, and the second one's logits."""
        joined = _joined(model, first, second) if self._as_one is not False else None
        if joined is not None and self._as_one is None:
            self._as_one = _alike(model, joined, first, second)
        if joined is not None and self._as_one:
            logits, targets = classification_step(model, joined)
            size = len(split_batch(first)[1])
            return logits[:size], targets[:size], logits[size:]
        logits, targets = classification_step(model, first)
        return logits, targets, classification_step(model, second)[0]


def _joined(model: nn.Module, *batches: Any) -> tuple[Tensor, Tensor] | None:
    """The batches as one; None where they are no pairs of plain tensors that fit, or the module has its own step."""
    if hasattr(model, "classification_step"):
        return None
    pairs = [split_batch(batch) for batch in batches]
    for parts in zip(*pairs, strict=True):
        if not all(isinstance(part, Tensor) and part.ndim > 0 and part.layout == torch.strided for part in parts):
            return None
        if len({(part.dtype, part.device, part.shape[1:]) for part in parts}) > 1:
            return None
    if any(len(inputs) != len(targets) for inputs, targets in pairs):
        return None
    inputs, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return inputs, targets


@torch.no_grad()
def _alike(model: nn.Module, joined: Any, first: Any, second: Any) -> bool:
    apart = torch.cat([classification_step(model, batch)[0] for batch in (first, second)])
    try:
        together = classification_step(model, joined)[0]
    except Exception:  # a model may take batches of one size alone
        return False
    return bool(torch.allclose(together, apart, rtol=1e-3, atol=1e-4 * float(apart.abs().max())))


class _GradientsKept(Exception):
    """The backward pass needs a weight's value after its gradient is known, or gives the gradient in parts."""


_WHY_KEPT = ("modified by an inplace operation", "use_reentrant=True")


def _descend(
    model: nn.Module,
    objective: Callable[[nn.Module], Tensor],
    steps: int,
    lr: float,
    on_step: Callable[[int], Any] | None,
    *,
    at_once: bool,
) -> dict[str, Tensor]:
    work = copied(model).eval()
    weights = trainable_parameters(work)
    if not weights:
        raise ValueError("the model has no trainable parameter (requires_grad is False everywhere): nothing to score.")
    scores: dict[str, Tensor] = {}
    if at_once:
        for name, weight in weights.items():
            weight.register_post_accumulate_grad_hook(partial(_take, name, scores, lr))  # type: ignore[no-untyped-call]
    for step in range(steps):
        loss = objective(work)
        if not torch.isfinite(loss):
            raise ValueError(f"the scoring loss is {loss.item()} at step {step + 1}; lower lr (now {lr}).")
        if step == 0:
            _check_copy(loss, model)
        if loss.requires_grad:
            try:
                loss.backward(inputs=list(weights.values()) if at_once else None)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                if at_once and any(why in str(error) for why in _WHY_KEPT):
                    raise _GradientsKept from error
                raise
        for name, weight in weights.items():
            if weight.grad is not None:
                _take(name, scores, lr, weight)
        if on_step is not None:
            on_step(step + 1)
    _tell_unreached([name for name in weights if name not in scores], len(weights))
    return {name: scores[name] for name in weights if name in scores}


def _check_copy(loss: Tensor, model: nn.Module) -> None:
    """Raise where the copy's loss is computed with the weights of the model that was copied."""
    own = {id(p): name for name, p in model.named_parameters()}
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        name = own.get(id(getattr(node, "variable", None)))
        if name is not None:
            raise ValueError(
                f"a copy of this {type(model).__name__} still computes with the {name!r} of the model itself, so its "
                "weights cannot be scored: look for a lambda or an inner function on the module that names self, and "
                "make it a method."
            )


@torch.no_grad()
def _take(name: str, scores: dict[str, Tensor], lr: float, weight: Tensor) -> None:
    """Add a weight's |g ⊙ θ'| to its score, take the SGD step, and free the gradient."""
    gradient = weight.grad
    if gradient is None:
        return
    gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
    weight.grad = None
    if name not in scores:
        scores[name] = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
    whole = (scores[name], gradient, weight)
    if weight.is_complex():  # the first-order change of the loss where the weight is set to zero
        scores[name] += (gradient.conj() * weight).real.float().abs_()
        weight.sub_(gradient, alpha=lr)
        return
    flat = all(tensor.is_contiguous() for tensor in whole)
    parts = zip(*(torch.split(t.view(-1), _CHUNK) for t in whole), strict=True) if flat else [whole]
    for score, g, w in parts:
        score += (g.float() * w.float()).abs_()
    weight.sub_(gradient, alpha=lr)


def _tell_unreached(names: list[str], total: int) -> None:
    if len(names) == total:
        raise ValueError("the loss depends on no trainable parameter of the model: nothing to score.")
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"the loss does not reach {len(names)} of {total} trainable parameters ({', '.join(names[:5])}{more}): "
            "they have no score and do not count among the weights that a rate is of. Averaged copies and unused "
            "heads are such; if a weight of the model is named, look for a detach() in its way.",
            UserWarning,
            stacklevel=2,
        )
