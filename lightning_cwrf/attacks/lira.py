"""LiRA, the likelihood ratio attack (Carlini et al. 2022)."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_cwrf.attacks.base import Evidence, register_attack
from lightning_cwrf.attacks.signals import (
    check_coverage,
    check_finite,
    check_membership,
    check_shadows,
    count_models,
    logit_signal,
)
from lightning_cwrf.checks import check_choice, check_flag

Variance = Literal["auto", "pooled", "per_example", "reference_code"]

ENOUGH = 32
"""The fewest IN and OUT models per example for which ``variance="auto"`` is per example (the paper: 64 in all)."""

VARIANCE_FLOOR = 1e-12
"""Added to every variance, in squared units of φ, so that it is not 0 where all shadow models agree."""

BLOCK = 1024
"""Examples per block of the moments, so that the temporaries stay in the cache."""


def check_lira(*, online: bool = True, variance: Variance = "auto") -> None:
    """Raise if a setting of :func:`lira` is invalid."""
    check_flag("online", online)
    check_choice("variance", variance, get_args(Variance))


def lira(
    target: Tensor, shadows: Tensor, membership: Tensor, *, online: bool = True, variance: Variance = "auto"
) -> Tensor:
    """Score each example by LiRA.

    Online: ``log N(φ; μ_in, σ_in²) − log N(φ; μ_out, σ_out²)``. Offline: ``log Φ((φ − μ_out) / σ_out)``, one-sided:
    the score increases with the signal. The means are per example.

    Args:
        target: φ of the audited model, shape ``(n,)`` (:func:`~lightning_cwrf.attacks.logit_signal`); or ``(q, n)``,
            for q queries per example (augmented views): the score is the mean of the q log ratios.
        shadows: φ of the k shadow models, shape ``(k, n)`` or ``(q, k, n)``.
        membership: bool ``(k, n)``, True where that shadow model was trained with that example.
        online: use IN and OUT models; False: OUT models only.
        variance: ``"per_example"``; ``"pooled"``, one within-example variance for IN and one for OUT; ``"auto"``,
            per example if every example has at least 32 IN and 32 OUT models, else pooled; ``"reference_code"``, what
            the authors' code computes with ``fix_variance=True``, see :func:`_reference_code`.

    Returns:
        float64 scores of shape ``(n,)``.

    Raises:
        TypeError: a setting, or a signal, of the wrong type.
        ValueError: wrong shapes or settings; NaN or infinite signals (which examples); too few IN or OUT models.

    >>> shadows = torch.tensor([[3.0, 0.0], [3.2, 0.1], [1.0, 2.0], [1.2, 2.1]])
    >>> membership = torch.tensor([[True, False], [True, False], [False, True], [False, True]])
    >>> (lira(torch.tensor([3.1, 0.0]), shadows, membership) > 0).tolist()
    [True, False]
    """
    check_lira(online=online, variance=variance)
    target, shadows = check_finite("target", target), check_finite("shadows", shadows)
    if target.ndim == 2:
        if shadows.ndim != 3 or len(shadows) != len(target) or len(target) == 0:
            raise ValueError(
                f"target must have shape (n,); or, with q queries, target (q, n) and shadows (q, k, n). They have "
                f"{tuple(target.shape)} and {tuple(shadows.shape)}."
            )
        if variance == "reference_code":
            return _reference_code(target, shadows, membership, online)
        pairs = zip(target, shadows, strict=True)
        return torch.stack([lira(t, s, membership, online=online, variance=variance) for t, s in pairs]).mean(0)
    target, shadows, membership = check_shadows(target, shadows, membership)
    if variance == "reference_code":
        return _reference_code(target[None], shadows[None], membership, online)
    if variance == "auto":
        inside, outside = count_models(membership)
        fewest = int((torch.minimum(inside, outside) if online else outside).min()) if len(target) else ENOUGH
        variance = "per_example" if fewest >= ENOUGH else "pooled"
    least = 2 if variance == "per_example" else 1
    check_coverage(membership, least_in=least if online else 0, least_out=least)
    models_in, models_out = in_and_out_moments(shadows, membership)
    variance_out = _variance(models_out, variance)
    if not online:
        offline: Tensor = torch.special.log_ndtr((target - models_out.mean) / variance_out.sqrt())
        return offline
    log_in = _log_normal(target, models_in.mean, _variance(models_in, variance))
    return log_in - _log_normal(target, models_out.mean, variance_out)


def pooled_variance(squares: Tensor, count: Tensor) -> Tensor:
    """The within-example variance pooled over all examples: the sum of squares over its degrees of freedom."""
    freedom = int((count - 1).sum())
    if freedom == 0:
        raise ValueError(
            "the pooled variance needs an example with at least 2 IN and one with at least 2 OUT shadow models: train "
            "at least 4 shadow models with balanced membership (2 OUT models for the offline attack)."
        )
    return squares.sum() / freedom + VARIANCE_FLOOR


class Moments(NamedTuple):
    """Of each example on one side: the number of models, their mean signal, the sum of squared deviations; ``(n,)``."""

    models: Tensor
    mean: Tensor
    squares: Tensor


def in_and_out_moments(signals: Tensor, membership: Tensor) -> tuple[Moments, Moments]:
    """Of the IN and of the OUT models, of signals ``(k, n)``. An example without an IN model has a mean of 0 there."""
    inside, outside = count_models(membership)

    def block(signals: Tensor, membership: Tensor, inside: Tensor, outside: Tensor) -> tuple[Tensor, ...]:
        weight = membership.to(signals.dtype)
        product = signals * weight
        mean_in = product.sum(0) / inside.clamp_min(1)
        mean_out = torch.sub(signals, product, out=product).sum(0) / outside.clamp_min(1)
        centre = torch.lerp(mean_out.expand_as(signals), mean_in.expand_as(signals), weight)
        squares = torch.sub(signals, centre, out=centre).square_()
        squares_in = torch.mul(squares, weight, out=product).sum(0)
        return mean_in, squares_in, mean_out, squares.sub_(product).sum(0)

    blocks = zip(*(torch.split(part, BLOCK, -1) for part in (signals, membership, inside, outside)), strict=True)
    mean_in, squares_in, mean_out, squares_out = map(torch.cat, zip(*(block(*each) for each in blocks), strict=True))
    return Moments(inside, mean_in, squares_in), Moments(outside, mean_out, squares_out)


def _variance(moments: Moments, variance: Variance) -> Tensor:
    """Per example, or one for all."""
    if variance == "per_example":
        return moments.squares / (moments.models - 1) + VARIANCE_FLOOR
    return pooled_variance(moments.squares, moments.models)


def _reference_code(target: Tensor, shadows: Tensor, membership: Tensor, online: bool) -> Tensor:
    """LiRA as the authors' code computes it, up to the sign: ``privacy/research/mi_lira_2021/plot.py``.

    That is ``generate_ours`` and ``generate_ours_offline`` with ``fix_variance=True``. The mean of an example is the
    median of its signals. One standard deviation serves all examples, all queries and both sides: that of all IN
    signals (offline: all OUT signals) around their common mean, so it includes the spread between examples. Every
    example uses the same number of models, its first ones. Offline the score is ``−log N(φ)`` under OUT, which is
    two-sided: an example with an unusually low signal counts as a member too.
    """
    check_membership(membership, tuple(shadows.shape[1:]))
    membership = membership.to(shadows.device)
    check_coverage(membership, least_in=int(online), least_out=1)
    outside = _first_models(shadows, ~membership)
    fixed = (_first_models(shadows, membership) if online else outside).std(correction=0)
    variance = (fixed + 1e-30).square()
    log_out = _log_normal(target, _median(outside), variance)
    if not online:
        return -log_out.mean(0)
    log_in = _log_normal(target, _median(_first_models(shadows, membership)), variance)
    return (log_in - log_out).mean(0)


def _first_models(shadows: Tensor, chosen: Tensor) -> Tensor:
    """Signals ``(q, c, n)`` of the first c chosen models of each example; every example has at least c."""
    least = int(chosen.sum(0).min())
    rows = (~chosen).to(torch.uint8).sort(dim=0, stable=True).indices[:least]
    return shadows.gather(1, rows.expand(len(shadows), -1, -1))


def _median(signals: Tensor) -> Tensor:
    """Over models, ``(q, n)``; for an even number the mean of the middle two, as in NumPy."""
    ordered = signals.sort(1).values
    count = ordered.shape[1]
    return (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2


def _log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * ((x - mean).square() / variance + variance.log() + math.log(2 * math.pi))


@register_attack("lira", "shadows", settings_of=lira, check=check_lira)
def _attack(evidence: Evidence, **settings: Any) -> Tensor:
    signals = evidence.signal(logit_signal), evidence.shadow_signals(logit_signal)
    return lira(*signals, evidence.require("membership"), **settings)


@register_attack("lira_views", "shadows", "views", "shadow_views", settings_of=lira, check=check_lira)
def _views_attack(evidence: Evidence, **settings: Any) -> Tensor:
    shadows = evidence.shadow_signals(logit_signal, "views").transpose(0, 1)
    return lira(evidence.signal(logit_signal, "views"), shadows, evidence.require("membership"), **settings)
