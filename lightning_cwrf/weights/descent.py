"""Eq. 2 along a plain SGD descent on a copy of the model, in little memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.data import isolated_rng
from lightning_cwrf.weights.copies import check_not_lazy, copied

_CHUNK = 1 << 20  # weights scored at a time, so that their products need less memory than a layer


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that count as weights: trainable, each tied one once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def in_mode(copy: nn.Module, mode: str) -> nn.Module:
    """A copy of a model in eval mode, or as it trains: as it is where it trains, so that frozen layers stay in eval."""
    if mode == "eval":
        copy.eval()
    elif not copy.training:
        copy.train()
    return copy


@contextmanager
def scoring_context(model: Any) -> Iterator[None]:
    """Check the model, keep the caller's random state, and switch off no_grad, inference mode and autocast."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}; pass an instance" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a torch.nn.Module, not {what}.")
    check_not_lazy(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(isolated_rng(device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {device.type, "cpu"}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def accumulate(
    model: nn.Module,
    make_objective: Callable[[], Callable[[nn.Module], Tensor]],
    steps: int,
    lr: float,
    on_step: Callable[[int], Any] | None,
    mode: str = "eval",
) -> dict[str, Tensor]:
    """Eq. 2 along plain SGD on a copy: φ += |g ⊙ θ'|, then θ' -= η_e·g (Algorithm 1, lines 7-9).

    A hook on each weight does both as soon as the backward pass has its gradient, and frees it, so that the gradients
    are never all in memory together. Autograd raises for a model that needs a weight's old value later in the backward
    pass (because it also uses the weight detached) and for one with reentrant checkpoints, whose gradients come in
    parts. Then the descent starts over, with a new objective, and the weights are updated after each backward pass.

    ``make_objective`` makes a function of the copy that takes the next batches and returns the loss.
    """
    try:
        return _descend(model, make_objective(), steps, lr, on_step, mode, in_backward=True)
    except _CannotUpdateInBackward:
        return _descend(model, make_objective(), steps, lr, on_step, mode, in_backward=False)


class _CannotUpdateInBackward(Exception):
    pass


_REASONS = ("modified by an inplace operation", "use_reentrant=True")


def _descend(
    model: nn.Module,
    objective: Callable[[nn.Module], Tensor],
    steps: int,
    lr: float,
    on_step: Callable[[int], Any] | None,
    mode: str,
    *,
    in_backward: bool,
) -> dict[str, Tensor]:
    work = in_mode(copied(model), mode)
    weights = trainable_parameters(work)
    if not weights:
        raise ValueError("the model has no trainable parameter (requires_grad is False everywhere): nothing to score.")
    scores: dict[str, Tensor] = {}
    updates = {name: partial(_score_and_step, name, scores, lr) for name in weights}
    if in_backward:
        for name, weight in weights.items():
            weight.register_post_accumulate_grad_hook(updates[name])  # type: ignore[no-untyped-call]
    for step in range(1, steps + 1):
        loss = _loss_of(objective, work, mode)
        if not torch.isfinite(loss):
            raise ValueError(f"the scoring loss is {loss.item()} at step {step}; lower lr (now {lr}).")
        if step == 1:
            _check_copy(loss, model)
        if loss.requires_grad:
            try:
                loss.backward(inputs=list(weights.values()) if in_backward else None)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                if in_backward and any(reason in str(error) for reason in _REASONS):
                    raise _CannotUpdateInBackward from error
                if mode == "train" and _REASONS[0] in str(error):
                    raise ValueError(
                        "the model writes into a tensor that it also computes with in train mode, and a step of the "
                        'scoring runs two batches before its backward pass: score with mode="eval".'
                    ) from error
                raise
        for name, weight in weights.items():
            updates[name](weight)
        if on_step is not None:
            on_step(step)
    _warn_unreached([name for name in weights if name not in scores], len(weights))
    return {name: scores[name] for name in weights if name in scores}


def _loss_of(objective: Callable[[nn.Module], Tensor], work: nn.Module, mode: str) -> Tensor:
    try:
        return objective(work)
    except ValueError as error:
        if mode == "train" and "more than 1 value per channel" in str(error):
            raise ValueError(
                "a batch of one example has no batch statistics, and the data leave one at their end: pass another "
                'batch_size, a loader with drop_last=True, or mode="eval".'
            ) from error
        raise


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
                "weights cannot be scored: look for a lambda or an inner function on the module that uses self, and "
                "make it a method."
            )


@torch.no_grad()
def _score_and_step(name: str, scores: dict[str, Tensor], lr: float, weight: Tensor) -> None:
    """Add a weight's |g ⊙ θ'| to its score, take the SGD step, and free the gradient; nothing without a gradient."""
    gradient = weight.grad
    if gradient is None:
        return
    gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
    weight.grad = None
    if name not in scores:
        scores[name] = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
    score = scores[name]
    if weight.is_complex():  # the first-order change of the loss where the weight is set to zero
        score += (gradient.conj() * weight).real.float().abs_()
    elif all(tensor.is_contiguous() for tensor in (score, gradient, weight)):
        chunks = (torch.split(tensor.view(-1), _CHUNK) for tensor in (score, gradient, weight))
        for part, g, w in zip(*chunks, strict=True):
            part += (g.float() * w.float()).abs_()
    else:
        score += (gradient.float() * weight.float()).abs_()
    weight.sub_(gradient, alpha=lr)


def _warn_unreached(names: list[str], total: int) -> None:
    if len(names) == total:
        raise ValueError("the loss depends on no trainable parameter of the model: nothing to score.")
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"the loss does not reach {len(names)} of {total} trainable parameters ({', '.join(names[:5])}{more}): "
            "they have no score, and a rate is a share of the other weights. This is expected for averaged copies and "
            "unused heads; for any other weight, look for a detach() in its way.",
            UserWarning,
            stacklevel=2,
        )
