"""What the first batch of a fit shows of gradients and state that DP-SGD cannot vouch for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cwrf.data import isolated_rng
from lightning_cwrf.defenses.dpsgd.clipping import Clipping
from lightning_cwrf.defenses.dpsgd.ghost import KeptBackprops
from lightning_cwrf.defenses.dpsgd.hooks import ReweightedLoss, SampledGradients
from lightning_cwrf.defenses.dpsgd.independence import is_low, other_rows
from lightning_cwrf.weights.copies import changed_since, parameters_and_buffers, visiting

_FEW = 4  # examples whose own gradients are compared


class _Weighing(Clipping):
    """Multiplies the examples' gradients by given numbers, and keeps their norms."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__(1.0)
        self.weights, self.norms = weights, weights

    def factors(self, norms: Tensor) -> Tensor:
        self.norms = norms
        return self.weights.to(norms).expand_as(norms)


def check_gradients(
    module: LightningModule,
    gradients: SampledGradients | KeptBackprops,
    names: Mapping[nn.Parameter, str],
    masks: Mapping[nn.Parameter, Tensor],
    losses_of: Callable[[Any], Tensor],
    batch: Any,
) -> None:
    """Raise where the gradients that DP-SGD takes of examples are not those of autograd, up to rounding.

    Compared are a weighted sum over the batch, and the norms of a few examples' gradients. Differences up to 1 % of a
    parameter's largest (10 % in lower precision) count as rounding, and what autograd's own rounding makes of them.
    The module's state, gradients and the caller's random state are left as they were.
    """
    with isolated_rng(module.device), visiting(module), _without_grad(module), _named_failure(gradients):
        try:
            gradients.watch()
            losses = losses_of(batch)
            if not losses.requires_grad:
                return
            if isinstance(gradients, SampledGradients):
                gradients.hooks.disable_hooks()
            weights = 1 / torch.arange(1.0, len(losses) + 1, device=losses.device, dtype=losses.dtype)
            own = _Autograd(losses, list(names), masks)
            wanted, few = own.of((weights * losses).sum()), range(min(_FEW, len(losses)))
            norms = torch.stack([_norms(own.of(losses[i])) for i in few], 1)
            # Scaled by a third, which is no power of two: what rounding changes.
            again = torch.stack([3 * _norms(own.of(losses[i] / 3)) for i in few], 1)
            if isinstance(gradients, SampledGradients):
                gradients.hooks.enable_hooks()
            weighing = _Weighing(weights)
            with torch.autocast(module.device.type, enabled=False):
                found = own.masked(gradients.sums(losses, _backward, weighing))
        finally:
            gradients.clear()
    low = is_low([losses])
    gaps = torch.stack([(f - w).abs().max() for f, w in zip(found, wanted, strict=True)])
    largest = torch.stack([w.abs().max() for w in wanted])
    seen = weighing.norms[:, : len(few)].to(norms)
    rounding = 3 * (again - norms).abs().max(1).values
    wrong = _beyond(gaps, largest, rounding, low) | _beyond(
        (seen - norms).abs().max(1).values, norms.max(1).values, rounding, low
    )
    _raise_for([name for name, bad in zip(names.values(), wrong.tolist(), strict=True) if bad])
    if isinstance(gradients, ReweightedLoss):
        coarse = _beyond(rounding / 3, norms.max(1).values, torch.zeros_like(rounding), low)
        _raise_for_rounding([name for name, bad in zip(names.values(), coarse.tolist(), strict=True) if bad])


@contextmanager
def _named_failure(gradients: SampledGradients | KeptBackprops) -> Iterator[None]:
    """Raise a MisconfigurationException for what fails in the hooks; the model alone has run on this batch before."""
    try:
        yield
    except (MisconfigurationException, torch.OutOfMemoryError):
        raise
    except Exception as error:
        plain = isinstance(gradients, SampledGradients) and not gradients.ghost
        without = "" if plain else " Or leave out ghost=True, which takes fewer models."
        raise MisconfigurationException(
            f"DP-SGD cannot take per-example gradients of this module ({type(error).__name__}: {error}). Give each "
            "layer weights of its own (tied ones work without ghost=True; torch.nn.utils.weight_norm does not, and its "
            "successor in torch.nn.utils.parametrizations does), and one input, as a positional argument, with the "
            f"examples in its first dimension.{without}"
        ) from error


def _backward(loss: Tensor, **arguments: Any) -> None:
    loss.backward(**arguments)  # type: ignore[no-untyped-call]


def _norms(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack([g.norm(2) for g in gradients])


def _beyond(gaps: Tensor, largest: Tensor, rounding: Tensor, low: bool) -> Tensor:
    """Which parameters' gaps are beyond rounding; one whose gradient is rounding alone is small among the others."""
    own, whole = (0.1, 0.05) if low else (0.01, 1e-5)
    return gaps > own * largest + whole * largest.max() + rounding


class _Autograd:
    """Gradients by autograd, zero at frozen weights."""

    def __init__(self, losses: Tensor, parameters: Sequence[nn.Parameter], masks: Mapping[nn.Parameter, Tensor]):
        self.parameters, self.masks = parameters, masks

    def of(self, loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        return self.masked(
            [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
        )

    def masked(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(self.parameters, gradients, strict=True)
        dense = [(p, g.to_dense() if g.is_sparse else g) for p, g in pairs]
        return [g.masked_fill(self.masks[p], 0) if p in self.masks else g for p, g in dense]


def _raise_for(wrong: list[str]) -> None:
    if wrong:
        raise MisconfigurationException(
            f"the per-example gradients that DP-SGD takes of {', '.join(wrong)} are not those of autograd, so clipping "
            "would not bound what an example adds. Use each weight in its own layer alone: not by F.linear, nor tied "
            "to a layer of another kind, nor in checkpointing."
        )


def _raise_for_rounding(coarse: list[str]) -> None:
    if coarse:
        raise MisconfigurationException(
            f"the gradients of {', '.join(coarse)} are small differences of large numbers, which two backward passes "
            "round differently, so ghost clipping would not bound what an example adds. Standardize the inputs, or "
            "leave out ghost=True."
        )


@contextmanager
def _without_grad(module: nn.Module) -> Iterator[None]:
    kept = {p: p.grad for p in module.parameters()}
    try:
        for p in kept:
            p.grad = None
        yield
    finally:
        for p, grad in kept.items():
            p.grad = grad


def check_state(module: LightningModule, losses_of: Callable[[Any], Tensor], batch: Any) -> None:
    """Raise where a forward pass in training writes what depends on the examples into a parameter or a buffer.

    Such state is neither clipped nor noisy. The passes have the same random numbers, over the batch and over the batch
    with half of its examples overwritten, so state that moves without the data (a counter) is let through.
    """
    changed: list[dict[str, Tensor]] = []
    with isolated_rng(module.device):
        seed = int(torch.randint(2**31, ()))
        size = 0
        for copied in (False, False, True):
            with visiting(module) as kept:
                torch.manual_seed(seed)
                size = len(losses_of(other_rows(batch, size) if copied else batch))
                now = dict(parameters_and_buffers(module))
                changed.append({n: now[n].detach().clone() for n in changed_since(kept, module) if n in now})
    first, same, other = changed
    wrong = [
        name
        for name in dict.fromkeys([*first, *other])
        if _gap(first.get(name), other.get(name)) > 10 * _gap(first.get(name), same.get(name))
    ]
    if wrong:
        raise MisconfigurationException(
            f"the forward pass in training writes what it sees of the examples into {', '.join(wrong)}, without "
            "clipping or noise, so ε would not cover it. Look for running statistics (track_running_stats, moving "
            "averages) or weights that are rescaled in place (max_norm), and leave them out."
        )


def _gap(a: Tensor | None, b: Tensor | None) -> float:
    """The largest difference; NaN is equal to NaN."""
    if a is None or b is None or a.shape != b.shape:
        return 0.0 if a is b else float("inf")
    if torch.equal(a, b):
        return 0.0
    gap = (a.detach().double() - b.detach().double()).abs()
    gap = gap[~(a.isnan() & b.isnan())]
    return float(gap.nan_to_num(float("inf")).max()) if gap.numel() else 0.0
