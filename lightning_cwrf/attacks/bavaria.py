"""BaVarIA: LiRA with a prior on each example's mean and variance (Brännvall 2026, arXiv:2603.11799)."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_cwrf.attacks.base import Evidence, register_attack
from lightning_cwrf.attacks.lira import VARIANCE_FLOOR, Moments, in_and_out_moments, pooled_variance
from lightning_cwrf.attacks.signals import check_coverage, check_shadows, logit_signal
from lightning_cwrf.checks import check_choice, check_flag, check_number


def bavaria(
    target: Tensor,
    shadows: Tensor,
    membership: Tensor,
    *,
    online: bool = True,
    predictive: Literal["t", "normal"] = "t",
    prior_models: float = 2.0,
) -> Tensor:
    """Score each example by the ratio of its posterior predictive densities under IN and under OUT.

    Few shadow models estimate an example's variance poorly; LiRA has to choose between one variance per example and
    one for all. Here mean and variance have a normal-inverse-gamma prior, for IN and OUT separately, with parameters
    from all examples: for the mean, the mean over examples, which counts as
    ``κ₀ = within-example variance / between-example variance`` models; for the variance, the pooled within-example
    variance, which counts as ``prior_models`` models. With c models of mean x̄ and sum of squared deviations S:

    ``κ = κ₀ + c``, ``ν = ν₀ + c``, ``m = (κ₀ m₀ + c x̄) / κ``, ``s² = (ν₀ σ₀² + S + κ₀ c (x̄ − m₀)² / κ) / ν``.

    The predictive density is Student-t with ν degrees of freedom, location m and squared scale ``s² (κ + 1) / κ``, or
    a normal density with this mean and variance. Offline: the log of its distribution function under OUT, one-sided.
    These empirical prior parameters are ours; the paper's were not available.

    Args:
        target: φ of the audited model, shape ``(n,)`` (:func:`~lightning_cwrf.attacks.logit_signal`).
        shadows: φ of the k shadow models, ``(k, n)``.
        membership: bool ``(k, n)``, True where that shadow model was trained with that example.
        online: use IN and OUT models; False: OUT models only.
        predictive: ``"t"`` or ``"normal"``.
        prior_models: ν₀ > 0, the number of models that the pooled variance counts as.

    Returns:
        float64 scores of shape ``(n,)``.

    Raises:
        ValueError: wrong shapes or settings; NaN or infinite signals; too few IN or OUT models.

    >>> shadows = torch.tensor([[3.0, 0.0], [3.2, 0.1], [1.0, 2.0], [1.2, 2.1]])
    >>> membership = torch.tensor([[True, False], [True, False], [False, True], [False, True]])
    >>> (bavaria(torch.tensor([3.1, 0.0]), shadows, membership) > 0).tolist()
    [True, False]
    """
    check_bavaria(online=online, predictive=predictive, prior_models=prior_models)
    target, shadows, membership = check_shadows(target, shadows, membership)
    check_coverage(membership, least_in=int(online), least_out=1)
    models_in, models_out = in_and_out_moments(shadows, membership)
    outside = _posterior(models_out, prior_models)
    if not online:
        z = (target - outside.location) / outside.scale
        offline: Tensor = torch.special.log_ndtr(z) if predictive == "normal" else log_t_cdf(z, outside.freedom)
        return offline
    inside = _posterior(models_in, prior_models)
    return _log_density(target, inside, predictive) - _log_density(target, outside, predictive)


def check_bavaria(*, online: bool = True, predictive: Literal["t", "normal"] = "t", prior_models: float = 2.0) -> None:
    """Raise if a setting of :func:`bavaria` is invalid."""
    check_flag("online", online)
    check_choice("predictive", predictive, ("t", "normal"))
    check_number("prior_models", prior_models, low=0, low_open=True)


class _Predictive(NamedTuple):
    location: Tensor
    scale: Tensor
    freedom: Tensor


def _posterior(moments: Moments, prior_models: float) -> _Predictive:
    count, mean, squares = moments
    within = float(pooled_variance(squares, count))
    centre = mean.mean()
    # The variance of the means is that between examples plus that within them, over the number of models.
    scatter = float((mean - centre).square().mean()) if len(mean) > 1 else 0.0
    between = max(scatter - within * float((1 / count).mean()), VARIANCE_FLOOR)
    weight = within / between
    count = count.to(mean.dtype)
    kappa, nu = weight + count, prior_models + count
    location = (weight * centre + count * mean) / kappa
    shift = weight * count / kappa * (mean - centre).square()
    variance = (prior_models * within + squares + shift) / nu
    return _Predictive(location, (variance * (kappa + 1) / kappa).sqrt(), nu)


def _log_density(x: Tensor, at: _Predictive, predictive: str) -> Tensor:
    z = (x - at.location) / at.scale
    if predictive == "normal":
        return -0.5 * (z.square() + math.log(2 * math.pi)) - at.scale.log()
    nu = at.freedom
    constant = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * (nu * math.pi).log()
    return constant - at.scale.log() - (nu + 1) / 2 * torch.log1p(z.square() / nu)


def log_t_cdf(z: Tensor, nu: Tensor) -> Tensor:
    """Log of Student's CDF, by Hill's (1970) transformation of t to a normal deviate.

    It is monotone in z; for ν ≥ 2.5 its error is below 0.003 down to z = −5.
    """
    a = nu - 0.5
    b = 48 * a * a
    y = a * torch.log1p(z.square() / nu)
    root = y.clamp_min(torch.finfo(z.dtype).tiny).sqrt()
    correction = (((-0.4 * y - 3.3) * y - 24) * y - 85.5) / (0.8 * y * y + 100 + b) + y + 3
    log_cdf: Tensor = torch.special.log_ndtr(torch.sign(z) * root * (correction / b + 1))
    return log_cdf


@register_attack("bavaria", "shadows", settings_of=bavaria, check=check_bavaria)
def _attack(evidence: Evidence, **settings: Any) -> Tensor:
    signals = evidence.signal(logit_signal), evidence.shadow_signals(logit_signal)
    return bavaria(*signals, evidence.require("membership"), **settings)
