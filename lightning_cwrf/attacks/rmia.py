"""RMIA, the robust membership inference attack (Zarifzadeh et al. 2024), and BASE, its equivalent."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_cwrf.attacks.base import Evidence, register_attack
from lightning_cwrf.attacks.likelihood_ratio import (
    PUBLISHED_TEMPERATURE,
    likelihood_ratio,
    mean_probability,
    offline_mean,
    tune_rmia,
)
from lightning_cwrf.attacks.signals import (
    check_coverage,
    check_finite,
    check_membership,
    check_shadows,
    example_losses,
    tempered_probability,
)
from lightning_cwrf.checks import check_flag, check_number

TEMPERATURES = (1.0, 0.5, 2.0, 4.0, 8.0)
"""What ``temperature="tuned"`` chooses from; of equals the first."""

TUNED_ON = 5000
"""The most examples to tune on: of more, every second, third, ... is used."""


def rmia(
    target: Tensor,
    shadows: Tensor,
    membership: Tensor,
    population_target: Tensor,
    population_shadows: Tensor,
    *,
    online: bool = True,
    gamma: float = 2.0,
    offline_a: float | Literal["tuned"] = "tuned",
    trim: float = 0.0,
    break_ties: bool = True,
) -> Tensor:
    """Score each example by RMIA: the share of population points z with ratio(x) / ratio(z) ≥ γ.

    ``ratio(x) = Pr(x|θ) / Pr(x)``, where Pr(x) is the mean over all shadow models, IN and OUT (online; balanced
    membership weights both sides equally), or ``½·[(1 + a)·P_out(x) + (1 − a)]`` (offline). No shadow model has
    seen the population, so Pr(z) is the mean over all of them (offline: with the same affine correction as for x).

    The share is a step function of ratio(x): one sort of ratio(z) and a binary search per x compute it exactly, in
    O((n + m) log m) time and O(k·(n + m)) memory, the size of the input. So γ and the population decide where the
    steps are, and with ties broken they do not change the order of the examples.

    With several views of each example, x is said to dominate z if more than half of its views do (the paper's majority
    vote); z is as it is.

    Args:
        target: true-class probability under the audited model, shape ``(n,)``, at any temperature
            (:func:`~lightning_cwrf.attacks.true_class_probability`); or ``(q, n)``, for q views of each example.
        shadows: the same under the k shadow models, ``(k, n)`` or ``(q, k, n)``.
        membership: bool ``(k, n)``, True where that shadow model was trained with that example.
        population_target: the same for m population points, ``(m,)``, which no model was trained on.
        population_shadows: ``(k, m)``.
        online: use IN and OUT models; False: OUT models only.
        gamma: γ ≥ 1. The paper uses 2; some implementations 1.
        offline_a: a in [0, 1], used offline. ``"tuned"``: by :func:`~lightning_cwrf.attacks.tune_rmia`, on the shadow
            models, of which it needs 4. The paper: about 0.3 for CIFAR-10.
        trim: the share of the models that enter Pr cut from each end, in [0, 1/2): a trimmed mean, as in the authors'
            code (0.2 there).
        break_ties: order examples with the same share by ratio(x): the score is
            ``(m · share + ratio / (1 + ratio)) / (m + 1)``. False: the share itself, as published.

    Returns:
        float64 scores in [0, 1] of shape ``(n,)``, multiples of 1/m without tie-breaking.

    Raises:
        ValueError: wrong shapes or settings; values that are not probabilities (which examples); too few shadow
            models; an example with probability 0 under every model.

    >>> shadows = torch.tensor([[0.9, 0.2], [0.3, 0.8]])
    >>> membership = torch.tensor([[True, False], [False, True]])
    >>> population = torch.tensor([0.3, 0.5, 0.6, 0.9])
    >>> population = (population, population.expand(2, 4))
    >>> rmia(torch.tensor([0.9, 0.1]), shadows, membership, *population, gamma=1.0, break_ties=False)
    tensor([1., 0.], dtype=torch.float64)
    """
    check_rmia(online=online, gamma=gamma, offline_a=offline_a, trim=trim, break_ties=break_ties)
    target, shadows, membership = _check_signals(target, shadows, membership)
    z = _check_population(population_target, population_shadows, len(membership))
    for name, values in (("target", target), ("shadows", shadows)):
        _check_probabilities(name, values)
    check_coverage(membership, least_in=int(online), least_out=1)
    mean_x = mean_probability(shadows, None if online else ~membership, trim)
    mean_z = mean_probability(z[1], None, trim)
    if not online:
        if isinstance(offline_a, str):
            some = slice(None, None, _step(membership))
            _, offline_a = tune_rmia({PUBLISHED_TEMPERATURE: shadows[..., some]}, membership[:, some], trim=trim)
        mean_x, mean_z = offline_mean(mean_x, offline_a), offline_mean(mean_z, offline_a)
    ratio_x = likelihood_ratio("target", target, mean_x)
    ratio_z = likelihood_ratio("population_target", z[0], mean_z)
    # ratio(x)/ratio(z) ≥ γ  ⇔  γ·ratio(z) ≤ ratio(x): count the sorted right sides that do not exceed it.
    bounds = (gamma * ratio_z).sort().values
    below = torch.searchsorted(bounds, ratio_x, right=True).to(torch.float64)
    if not break_ties:
        return below / len(bounds)
    within = torch.where(ratio_x.isinf(), 1.0, ratio_x / (1 + ratio_x))
    return (below + within) / (len(bounds) + 1)


def base_attack(losses: Tensor, shadow_losses: Tensor, membership: Tensor) -> Tensor:
    """Score each example by BASE (Lassila, Östman & Ngo 2025), with the losses of IN and OUT shadow models.

    The score is ``−ℓ − log mean_k exp(−ℓ_k)``, the logarithm of the ratio of :func:`rmia`
    online at temperature 1. RMIA's share of the population is a step function of this ratio, and breaks its ties by it:
    both attacks order the examples in the same way, and so have the same AUC and ROC. BASE needs no population.

    Args:
        losses: of the audited model, shape ``(n,)`` (:func:`~lightning_cwrf.attacks.example_losses`).
        shadow_losses: of the k shadow models, ``(k, n)``.
        membership: bool ``(k, n)``, True where that shadow model was trained with that example.

    Returns:
        float64 scores ``(n,)``; above 0 where the audited model is more certain than the shadow models.

    Raises:
        ValueError: wrong shapes; NaN or infinite losses; an example without an IN or an OUT shadow model.

    >>> shadow_losses = torch.tensor([[0.1, 1.0], [0.9, 0.2]])
    >>> membership = torch.tensor([[True, False], [False, True]])
    >>> base_attack(torch.tensor([0.1, 1.5]), shadow_losses, membership).sign()
    tensor([ 1., -1.], dtype=torch.float64)
    """
    losses, shadow_losses, membership = check_shadows(losses, shadow_losses, membership)
    check_coverage(membership, least_in=1, least_out=1)
    return math.log(len(shadow_losses)) - losses - (-shadow_losses).logsumexp(0)


def check_rmia(
    *,
    online: bool = True,
    temperature: float | Literal["auto", "tuned"] = "auto",
    gamma: float = 2.0,
    offline_a: float | Literal["tuned"] = "tuned",
    trim: float = 0.0,
    break_ties: bool = True,
) -> None:
    """Raise if a setting of :func:`rmia`, or of the attack over evidence, is invalid."""
    check_flag("online", online)
    if temperature not in ("auto", "tuned"):
        check_number("temperature", temperature, low=0, low_open=True, hint='"tuned" tunes it on the shadow models.')
    check_number("gamma", gamma, low=1)
    if offline_a != "tuned":
        check_number("offline_a", offline_a, low=0, high=1, hint='"tuned" tunes it on the shadow models.')
    check_number("trim", trim, low=0, high=0.5, high_open=True)
    check_flag("break_ties", break_ties)


def _check_signals(target: Tensor, shadows: Tensor, membership: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of one query or of several views, in float64."""
    if not isinstance(target, Tensor) or target.ndim != 2:
        return check_shadows(target, shadows, membership)
    target, shadows = check_finite("target", target), check_finite("shadows", shadows)
    if shadows.ndim != 3 or len(target) == 0 or (len(shadows), shadows.shape[2]) != tuple(target.shape):
        raise ValueError(
            f"target must have shape (n,); or, with q views, target (q, n) and shadows (q, k, n). They have "
            f"{tuple(target.shape)} and {tuple(shadows.shape)}."
        )
    check_membership(membership, tuple(shadows.shape[1:]))
    return target, shadows, membership.to(shadows.device)


def _check_population(target: Tensor, shadows: Tensor, models: int) -> tuple[Tensor, Tensor]:
    target, shadows = check_finite("population_target", target), check_finite("population_shadows", shadows)
    if target.ndim != 1 or len(target) == 0:
        raise ValueError(f"population_target must have shape (m,) with m >= 1, not {tuple(target.shape)}.")
    if shadows.shape != (models, len(target)):
        raise ValueError(f"population_shadows must have shape {(models, len(target))}, not {tuple(shadows.shape)}.")
    _check_probabilities("population_target", target)
    _check_probabilities("population_shadows", shadows)
    return target, shadows


def _check_probabilities(name: str, values: Tensor) -> None:
    if values.numel() == 0:
        return
    low, high = values.aminmax()
    if low < 0 or high > 1 + 1e-6:
        wrong = (values < 0) | (values > 1 + 1e-6)
        examples = torch.unique(wrong.nonzero()[:, -1]).tolist()
        raise ValueError(f"{name} must hold probabilities; examples {examples[:10]} lie outside [0, 1].")


@register_attack("rmia", "shadows", "shadow_population", "population", settings_of=check_rmia, check=check_rmia)
def _rmia(evidence: Evidence, **settings: Any) -> Tensor:
    return _attack(evidence, "examples", **settings)


@register_attack(
    "rmia_views",
    *("shadows", "shadow_population", "population", "views", "shadow_views"),
    settings_of=check_rmia,
    check=check_rmia,
)
def _rmia_views(evidence: Evidence, **settings: Any) -> Tensor:
    return _attack(evidence, "views", **settings)


@register_attack("base", "shadows")
def _base(evidence: Evidence) -> Tensor:
    losses, shadow_losses = evidence.signal(example_losses), evidence.shadow_signals(example_losses)
    return base_attack(losses, shadow_losses, evidence.require("membership"))


def _attack(
    evidence: Evidence,
    of: Literal["examples", "views"],
    *,
    online: bool = True,
    temperature: float | Literal["auto", "tuned"] = "auto",
    offline_a: float | Literal["tuned"] = "tuned",
    trim: float = 0.0,
    **settings: Any,
) -> Tensor:
    """:func:`rmia` of the softmax at a temperature, which is tuned together with a."""
    membership = evidence.require("membership")
    if temperature == "auto":
        temperature = PUBLISHED_TEMPERATURE if online else "tuned"
    if temperature == "tuned" or (offline_a == "tuned" and not online):
        step = _step(membership)
        choices = TEMPERATURES if isinstance(temperature, str) else (float(temperature),)
        temperature, offline_a = tune_rmia(
            {t: _by_view(evidence.shadow_signals(tempered_probability(t, step), of)) for t in choices},
            membership[:, ::step],
            online=online,
            offline_a=None if isinstance(offline_a, str) else offline_a,
            trim=trim,
        )
    signal = tempered_probability(float(temperature))
    return rmia(
        evidence.signal(signal, of),
        _by_view(evidence.shadow_signals(signal, of)),
        membership,
        evidence.signal(signal, "population"),
        evidence.shadow_signals(signal, "population"),
        online=online,
        offline_a=offline_a,
        trim=trim,
        **settings,
    )


def _step(membership: Tensor) -> int:
    """Every how many-th example is tuned on."""
    return max(1, -(-membership.shape[1] // TUNED_ON))


def _by_view(signals: Tensor) -> Tensor:
    """Signals ``(k, n)`` as they are, those of views as ``(q, k, n)``."""
    return signals if signals.ndim == 2 else signals.transpose(0, 1)
