"""RMIA, the robust membership inference attack (Zarifzadeh et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_cwrf.attacks.base import Evidence, register_attack
from lightning_cwrf.attacks.signals import check_coverage, check_finite, check_shadows, true_class_probability
from lightning_cwrf.checks import check_flag, check_integer, check_number
from lightning_cwrf.metrics.functional.roc import membership_auroc


def rmia(
    target: Tensor,
    shadows: Tensor,
    membership: Tensor,
    population_target: Tensor,
    population_shadows: Tensor,
    *,
    online: bool = True,
    gamma: float = 2.0,
    offline_a: float | None = 0.3,
    break_ties: bool = True,
) -> Tensor:
    """Score each example by RMIA: the share of population points z with ratio(x) / ratio(z) ≥ γ.

    ``ratio(x) = Pr(x|θ) / Pr(x)``, where Pr(x) is the mean over all shadow models, IN and OUT (online; balanced
    membership weights both sides equally), or ``½·[(1 + a)·P_out(x) + (1 − a)]`` (offline). No shadow model has
    seen the population, so Pr(z) is the mean over all of them (offline: with the same affine correction as for x).

    The share is a step function of ratio(x): one sort of ratio(z) and a binary search per x compute it exactly, in
    O((n + m) log m) time and O(k·(n + m)) memory, the size of the input.

    Args:
        target: true-class probability under the audited model, shape ``(n,)``.
        shadows: the same under the k shadow models, ``(k, n)``.
        membership: bool ``(k, n)``, True where that shadow model was trained with that example.
        population_target: the same for m population points, ``(m,)``, which no model was trained on.
        population_shadows: ``(k, m)``.
        online: use IN and OUT models; False: OUT models only.
        gamma: γ ≥ 1. The paper uses 2; some implementations 1.
        offline_a: a in [0, 1], used offline. The paper: about 0.3 for CIFAR-10. None: :func:`tune_offline_a`.
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
    check_rmia(online=online, gamma=gamma, offline_a=offline_a, break_ties=break_ties)
    target, shadows, membership = check_shadows(target, shadows, membership)
    population_target = check_finite("population_target", population_target)
    population_shadows = check_finite("population_shadows", population_shadows)
    if population_target.ndim != 1 or len(population_target) == 0:
        raise ValueError(f"population_target must have shape (m,) with m >= 1, not {tuple(population_target.shape)}.")
    if population_shadows.shape != (len(shadows), len(population_target)):
        raise ValueError(
            f"population_shadows must have shape {(len(shadows), len(population_target))}, "
            f"not {tuple(population_shadows.shape)}."
        )
    for name, values in (("target", target), ("shadows", shadows)):
        _check_probabilities(name, values)
        _check_probabilities(f"population_{name}", population_target if name == "target" else population_shadows)
    check_coverage(membership, least_in=int(online), least_out=1)
    mean_x, mean_z = shadows.mean(0), population_shadows.mean(0)
    if not online:
        if offline_a is None:
            offline_a = tune_offline_a(shadows, membership, population_shadows, gamma=gamma)
        outside = (~membership).to(shadows.dtype)
        mean_out = (shadows * outside).sum(0) / outside.sum(0)
        mean_x, mean_z = (((1 + offline_a) * mean + (1 - offline_a)) / 2 for mean in (mean_out, mean_z))
    ratio_x = _ratio("target", target, mean_x)
    ratio_z = _ratio("population_target", population_target, mean_z)
    # ratio(x)/ratio(z) ≥ γ  ⇔  γ·ratio(z) ≤ ratio(x): count the sorted right sides that do not exceed it.
    bounds = (gamma * ratio_z).sort().values
    below = torch.searchsorted(bounds, ratio_x, right=True).to(torch.float64)
    if not break_ties:
        return below / len(bounds)
    return (below + ratio_x / (1 + ratio_x)) / (len(bounds) + 1)


def check_rmia(
    *, online: bool = True, gamma: float = 2.0, offline_a: float | None = 0.3, break_ties: bool = True
) -> None:
    """Raise if a setting of :func:`rmia` is invalid."""
    check_flag("online", online)
    check_number("gamma", gamma, low=1)
    if offline_a is not None:
        check_number("offline_a", offline_a, low=0, high=1, hint="None tunes it on the shadow models.")
    check_flag("break_ties", break_ties)


def tune_offline_a(
    shadows: Tensor, membership: Tensor, population_shadows: Tensor, *, gamma: float = 2.0, models: int = 4
) -> float:
    """The a of offline RMIA that works best on the shadow models; the audited model is not used.

    Each of some shadow models, whose membership is known, is attacked with the others as shadow models; of 0, 0.1, ...,
    1 the value with the highest mean AUC is chosen (of equals the smallest).

    Args:
        shadows: true-class probabilities ``(k, n)``.
        membership: bool ``(k, n)``.
        population_shadows: ``(k, m)``.
        gamma: γ of the attack.
        models: the number of shadow models to attack.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: a setting out of range; too few shadow models without the attacked one.
    """
    check_integer("models", models, low=1)
    best, best_auc = 0.0, -1.0
    for a in torch.linspace(0, 1, 11, dtype=torch.float64).tolist():
        aucs = []
        for i, own in enumerate(shadows[:models]):
            others = torch.arange(len(shadows)) != i
            score = rmia(
                own,
                shadows[others],
                membership[others],
                population_shadows[i],
                population_shadows[others],
                online=False,
                gamma=gamma,
                offline_a=a,
            )
            aucs.append(membership_auroc(score, membership[i]))
        auc = float(torch.stack(aucs).mean())
        if auc > best_auc:
            best, best_auc = a, auc
    return best


def _check_probabilities(name: str, values: Tensor) -> None:
    if values.numel() == 0:
        return
    low, high = values.aminmax()
    if low < 0 or high > 1 + 1e-6:
        wrong = (values < 0) | (values > 1 + 1e-6)
        examples = torch.unique(wrong.nonzero()[:, -1]).tolist()
        raise ValueError(f"{name} must hold probabilities; examples {examples[:10]} lie outside [0, 1].")


def _ratio(name: str, probability: Tensor, mean: Tensor) -> Tensor:
    empty = (mean == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"{name}: examples {empty[:10]} have probability 0 under every shadow model, so their ratio is undefined; "
            "compute the probabilities in float64 (lightning_cwrf.attacks.true_class_probability does)."
        )
    return probability / mean


@register_attack("rmia", "shadows", "shadow_population", "population", settings_of=rmia, check=check_rmia)
def _attack(evidence: Evidence, **settings: Any) -> Tensor:
    return rmia(
        evidence.signal(true_class_probability),
        evidence.shadow_signals(true_class_probability),
        evidence.require("membership"),
        evidence.signal(true_class_probability, "population"),
        evidence.shadow_signals(true_class_probability, "population"),
        **settings,
    )
