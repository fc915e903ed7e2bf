"""Per-example signals, computed in float64 from logits, and the checks of attacks' inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

BLOCK = 1 << 17
"""Logits per block: the float64 copies take a few MB, whatever the number of models."""


def logit_signal(logits: Tensor, targets: Tensor) -> Tensor:
    """LiRA's signal φ = log p_y − log(1 − p_y), computed stably as z_y − logsumexp of the other logits.

    Args:
        logits: shape ``(..., n, K)``.
        targets: class indices of shape ``(n,)``.

    Returns:
        float64 of shape ``(..., n)``; finite for finite logits (Carlini et al. 2022, §IV-C).

    Raises:
        TypeError: logits that are not floats, targets that are not integers.
        ValueError: shapes that do not match; targets that are not classes.

    >>> logit_signal(torch.tensor([[0.0, 0.0], [1000.0, 0.0]]), torch.tensor([0, 0]))
    tensor([   0., 1000.], dtype=torch.float64)
    """

    def signal(z: Tensor, y: Tensor) -> Tensor:
        return z.gather(-1, y).squeeze(-1) - z.scatter(-1, y, -torch.inf).logsumexp(-1)

    return per_example(signal, logits, targets)


def true_class_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """RMIA's signal p_y, the softmax probability of the true class; shapes and errors as in :func:`logit_signal`.

    >>> true_class_probability(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    tensor([0.5000], dtype=torch.float64)
    """
    return example_losses(logits, targets).neg_().exp_()


@cache
def tempered_probability(temperature: float, step: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    """The signal softmax(logits / temperature)_y, of every ``step``-th example; the same function for the same values.

    At temperature 1 and step 1 it is :func:`true_class_probability`. A high temperature compares logits, a low one
    looks at the most probable classes alone.

    >>> tempered_probability(2.0)(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    tensor([0.7311], dtype=torch.float64)
    """
    if temperature == 1 and step == 1:
        return true_class_probability

    def log_probability(z: Tensor, y: Tensor) -> Tensor:
        return (z / temperature).log_softmax(-1).gather(-1, y).squeeze(-1)

    def signal(logits: Tensor, targets: Tensor) -> Tensor:
        check_targets(logits, targets)
        return per_example(log_probability, logits[..., ::step, :], targets[::step]).exp_()

    signal.__name__ = f"probability at temperature {temperature:g}, step {step}"
    return signal


def example_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy ℓ of each example; shapes and errors as in :func:`logit_signal`.

    >>> example_losses(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    tensor([0.6931], dtype=torch.float64)
    """
    return per_example(lambda z, y: -z.log_softmax(-1).gather(-1, y).squeeze(-1), logits, targets)


def per_example(signal: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """``signal`` of every example, float64 ``(..., n)``, in blocks: memory does not grow with the number of classes.

    ``signal`` is a function of logits ``(b, K)`` in float64 and targets ``(b, 1)`` that returns ``(b,)``.
    """
    targets = check_targets(logits, targets).unsqueeze(-1)
    logits = logits.detach()
    found = torch.empty(logits.shape[:-1], dtype=torch.float64, device=logits.device)
    rows = max(1, BLOCK // logits.shape[-1])
    for place in product(*map(range, logits.shape[:-2])):
        blocks = zip(*(torch.split(part, rows) for part in (found[place], logits[place], targets)), strict=True)
        for into, z, y in blocks:
            into.copy_(signal(z.to(torch.float64), y))
    return found


def check_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return ``targets`` ``(n,)``, checked to be classes of ``logits`` ``(..., n, K)``, in int64 on their device."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a tensor of floats, not {_kind(logits)}.")
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be a tensor of class indices (integers), not {_kind(targets)}.")
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError(f"logits must have shape (..., n, K) with K >= 2 classes, not {tuple(logits.shape)}.")
    if targets.shape != logits.shape[-2:-1]:
        raise ValueError(
            f"targets must have shape {tuple(logits.shape[-2:-1])}, one per example of logits of shape "
            f"{tuple(logits.shape)}, not {tuple(targets.shape)}."
        )
    classes = logits.shape[-1]
    wrong = ((targets < 0) | (targets >= classes)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"targets must be classes from 0 to {classes - 1}; {_listed(wrong)} have others (the first is "
            f"{int(targets[wrong[0]])})."
        )
    return targets.to(logits.device, torch.int64)


def check_finite(name: str, values: Tensor) -> Tensor:
    """Return ``values`` in float64, or raise a ValueError that names the examples with a NaN or infinite value."""
    if not isinstance(values, Tensor) or values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{name} must be a tensor of numbers, not {_kind(values)}.")
    values = values.detach().to(torch.float64)
    # One NaN or infinity makes the sum one. The sum takes a tenth of the time of isfinite on every value.
    if not torch.isfinite(values.sum()) and (bad := ~torch.isfinite(values)).any():
        examples = torch.unique(bad.nonzero()[:, -1]).tolist()
        raise ValueError(f"{name} has NaN or infinite values at {_listed(examples)}.")
    return values


def check_logits(name: str, logits: Tensor, targets: Tensor) -> None:
    """Raise a ValueError that names the examples with a NaN or infinite logit."""
    check_finite(name, per_example(lambda z, y: z.sum(-1), logits, targets))


def check_membership(membership: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless ``membership`` is bool and has that shape."""
    if not isinstance(membership, Tensor) or membership.shape != shape or membership.dtype != torch.bool:
        of = f" of shape {tuple(membership.shape)}" if isinstance(membership, Tensor) else ""
        raise ValueError(f"membership must be bool of shape {tuple(shape)}, not {_kind(membership)}{of}.")


def check_shadows(target: Tensor, shadows: Tensor, membership: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check the signals of an attack, ``(n,)``, ``(k, n)`` and bool ``(k, n)``, and return them in float64."""
    target, shadows = check_finite("target", target), check_finite("shadows", shadows)
    if target.ndim != 1:
        raise ValueError(f"target must have shape (n,), not {tuple(target.shape)}.")
    if shadows.ndim != 2 or shadows.shape[1] != len(target):
        raise ValueError(f"shadows must have shape (k, {len(target)}), not {tuple(shadows.shape)}.")
    check_membership(membership, tuple(shadows.shape))
    return target, shadows, membership.to(shadows.device)


def count_models(membership: Tensor) -> tuple[Tensor, Tensor]:
    """The number of IN and of OUT models of each example, int64 ``(n,)`` each."""
    # Sums in bytes, of so few models that none overflows, are twenty times as fast as sums in wider integers.
    parts = torch.split(membership.view(torch.uint8), 255)
    inside = torch.stack([part.sum(0, dtype=torch.uint8).long() for part in parts]).sum(0)
    return inside, len(membership) - inside


def check_coverage(membership: Tensor, *, least_in: int, least_out: int) -> None:
    """Raise a ValueError if an example has too few IN or too few OUT shadow models."""
    inside, outside = count_models(membership)
    for name, counts, least in (("IN", inside, least_in), ("OUT", outside, least_out)):
        short = (counts < least).nonzero().flatten().tolist()
        if short:
            raise ValueError(
                f"{len(short)} examples (first {short[:5]}) have fewer than {least} {name} shadow models; each needs "
                f"{least_in} IN and {least_out} OUT: train at least {2 * max(least_in, least_out)} shadow models "
                "with balanced membership (lightning_cwrf.shadows.balanced_membership)."
            )


def _listed(examples: list[int]) -> str:
    more = ", …" if len(examples) > 10 else ""
    return f"examples {examples[:10]}{more} ({len(examples)} in all)"


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"
