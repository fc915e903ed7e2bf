"""What attacks see of a model: per-example signals, computed in float64 from logits; and the checks on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def logit_signal(logits: Tensor, targets: Tensor) -> Tensor:
    """LiRA's signal φ = log p_y − log(1 − p_y), computed stably as z_y − logsumexp of the other logits.

    Args:
        logits: shape ``(..., n, K)``.
        targets: class indices of shape ``(n,)``.

    Returns:
        float64 of shape ``(..., n)``; finite for finite logits (Carlini et al. 2022, §IV-C).

    >>> logit_signal(torch.tensor([[0.0, 0.0], [1000.0, 0.0]]), torch.tensor([0, 0]))
    tensor([   0., 1000.], dtype=torch.float64)
    """
    logits, index = _float64(logits), _index(logits, targets)
    others = logits.scatter(-1, index, -torch.inf)
    return logits.gather(-1, index).squeeze(-1) - others.logsumexp(-1)


def true_class_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """RMIA's signal p_y, the softmax probability of the true class; shapes as in :func:`logit_signal`.

    >>> true_class_probability(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    tensor([0.5000], dtype=torch.float64)
    """
    return torch.exp(-example_losses(logits, targets))


def example_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy ℓ of each example; shapes as in :func:`logit_signal`.

    >>> example_losses(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    tensor([0.6931], dtype=torch.float64)
    """
    return -F.log_softmax(_float64(logits), dim=-1).gather(-1, _index(logits, targets)).squeeze(-1)


def check_finite(name: str, values: Tensor) -> Tensor:
    """Return ``values`` in float64, or raise a ValueError that names the examples whose value is NaN or infinite."""
    values = _float64(values)
    bad = ~torch.isfinite(values)
    if bad.any():
        examples = torch.unique(bad.nonzero()[:, -1]).tolist()
        more = ", …" if len(examples) > 10 else ""
        raise ValueError(
            f"{name} has NaN or infinite values at examples {examples[:10]}{more} ({len(examples)} in all)."
        )
    return values


def check_shadows(target: Tensor, shadows: Tensor, membership: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check the signals of one attack: shapes ``(n,)``, ``(k, n)``, ``(k, n)`` bool; return them in float64."""
    if target.ndim != 1:
        raise ValueError(f"target must have shape (n,), not {tuple(target.shape)}.")
    if shadows.ndim != 2 or shadows.shape[1] != len(target):
        raise ValueError(f"shadows must have shape (k, {len(target)}), not {tuple(shadows.shape)}.")
    if membership.shape != shadows.shape or membership.dtype != torch.bool:
        raise ValueError(
            f"membership must be bool of shape {tuple(shadows.shape)}, not {membership.dtype} of shape "
            f"{tuple(membership.shape)}."
        )
    return check_finite("target", target), check_finite("shadows", shadows), membership.to(shadows.device)


def check_coverage(membership: Tensor, *, least_in: int, least_out: int) -> None:
    """Raise a ValueError when an example has too few IN or too few OUT shadow models."""
    inside = membership.sum(0)
    for name, counts, least in (("IN", inside, least_in), ("OUT", len(membership) - inside, least_out)):
        short = (counts < least).nonzero().flatten().tolist()
        if short:
            raise ValueError(
                f"{len(short)} examples (first {short[:5]}) have fewer than {least} {name} shadow models; each needs "
                f"{least_in} IN and {least_out} OUT: train at least {2 * max(least_in, least_out)} shadow models "
                "with balanced membership (lightning_cwrf.shadows.balanced_membership)."
            )


def _float64(values: Tensor) -> Tensor:
    return values.detach().to(torch.float64)


def _index(logits: Tensor, targets: Tensor) -> Tensor:
    return targets.to(logits.device).expand(logits.shape[:-1]).unsqueeze(-1)
