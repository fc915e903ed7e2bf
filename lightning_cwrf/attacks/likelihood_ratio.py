"""The likelihood ratio Pr(x|θ) / Pr(x) of RMIA, and the choice of its settings on shadow models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_cwrf.attacks.signals import check_finite, check_membership, count_models
from lightning_cwrf.checks import check_flag, check_integer, check_number
from lightning_cwrf.metrics.functional.roc import membership_auroc

PUBLISHED_A, PUBLISHED_TEMPERATURE = 0.3, 1.0
"""What the papers use offline, and the softmax as it is."""

CANDIDATES_A = tuple(step / 10 for step in range(11))
"""What ``offline_a`` is chosen from."""

BLOCK = 1024
"""Examples per block of a mean, so that the temporaries stay in the cache."""


def likelihood_ratio(name: str, probability: Tensor, mean: Tensor) -> Tensor:
    """``probability / mean`` of ``(..., n)`` each; with leading dimensions, the views, what more than half exceed.

    More than half of q ratios reach a threshold exactly if their lower median does, so the median is RMIA's vote.

    >>> likelihood_ratio("target", torch.tensor([[0.2], [0.4], [0.9]]), torch.tensor([[0.4], [0.4], [0.3]]))
    tensor([1.])
    """
    empty = torch.unique((mean == 0).nonzero()[:, -1]).tolist()
    if empty:
        raise ValueError(
            f"{name}: examples {empty[:10]} have probability 0 under every shadow model, so their ratio is undefined; "
            "compute the probabilities in float64 (lightning_cwrf.attacks.true_class_probability does), or at a higher "
            "temperature."
        )
    ratio = probability / mean
    return ratio.median(0).values if ratio.ndim == 2 else ratio


def mean_probability(shadows: Tensor, chosen: Tensor | None, trim: float) -> Tensor:
    """The mean over the models (the last but one dimension), without the lowest and highest ⌊trim · count⌋ of each.

    Args:
        shadows: ``(..., k, n)``.
        chosen: bool ``(k, n)``, the models that count for each example. None: all.
        trim: share cut from each end, below 1/2.

    >>> mean_probability(torch.tensor([[0.0], [0.5], [0.7], [1.0]]), None, 0.25)
    tensor([0.6000])
    """
    if chosen is None:
        models = shadows.shape[-2]
        ends = int(trim * models)
        return (shadows.sort(-2).values[..., ends : models - ends, :] if ends else shadows).mean(-2)
    count, _ = count_models(chosen)
    if trim == 0:
        blocks = zip(torch.split(shadows, BLOCK, -1), torch.split(chosen, BLOCK, -1), strict=True)
        return torch.cat([(block * own).sum(-2) for block, own in blocks], -1) / count
    ordered = shadows.masked_fill(~chosen, torch.inf).sort(-2).values  # those that do not count come last
    cut = (trim * count.double()).long()
    rank = torch.arange(len(chosen), device=chosen.device)[:, None]
    inner = (rank >= cut) & (rank < count - cut)
    return torch.where(inner, ordered, 0.0).sum(-2) / inner.sum(0)


def offline_mean(mean_out: Tensor, a: float) -> Tensor:
    """``½·[(1 + a)·P_out + (1 − a)]``: Pr(x) without IN models (Zarifzadeh et al. 2024, Appendix B.2.2)."""
    return ((1 + a) * mean_out + (1 - a)) / 2


def tune_rmia(
    probabilities: Mapping[float, Tensor],
    membership: Tensor,
    *,
    online: bool = False,
    offline_a: float | None = None,
    trim: float = 0.0,
    models: int = 4,
) -> tuple[float, float]:
    """The temperature and the a of RMIA that work best on shadow models; nothing of the audited model is used.

    Each of some shadow models, whose membership is known, is attacked with the others, and the pair with the highest
    mean AUC is chosen; of equals the first. The attacked model's own copies and the other half of its pair are not
    among the others: with it, members would have fewer IN models than non-members. Examples without an OUT model
    (online: or an IN model) among the others cannot be scored and do not count. γ and the population are not needed:
    the order of RMIA's scores is that of the ratio.

    Args:
        probabilities: for each temperature to choose from, the shadow models' true-class probabilities, ``(k, n)``, or
            ``(q, k, n)`` for q views.
        membership: bool ``(k, n)``.
        online: whether Pr(x) is over IN and OUT models, for which a has no meaning.
        offline_a: a; None chooses among 0, 0.1, ..., 1.
        trim: as for :func:`~lightning_cwrf.attacks.rmia`.
        models: the number of shadow models to attack.

    Returns:
        The temperature and a.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: a setting out of range; too few shadow models.

    >>> from lightning_cwrf.shadows import balanced_membership
    >>> membership = balanced_membership(6, 40)
    >>> weak, strong = torch.rand(6, 40) / 2, (torch.rand(6, 40) + membership) / 2
    >>> tune_rmia({1.0: weak, 2.0: strong}, membership, offline_a=0.3)
    (2.0, 0.3)
    """
    check_integer("models", models, low=1)
    check_flag("online", online)
    check_number("trim", trim, low=0, high=0.5, high_open=True)
    if not probabilities:
        raise ValueError("probabilities must have at least one temperature to choose from; there is none.")
    found = {temperature: check_finite("probabilities", each) for temperature, each in probabilities.items()}
    for each in found.values():
        check_membership(membership, tuple(each.shape[-2:]))
    if offline_a is not None:
        check_number("offline_a", offline_a, low=0, high=1)
        candidates: tuple[float, ...] = (offline_a,)
    else:
        candidates = (PUBLISHED_A,) if online else CANDIDATES_A
    membership = membership.to(next(iter(found.values())).device)
    cases = [_held_out(membership, i, online) for i in range(min(models, len(membership)))]
    best, best_auc = None, -1.0
    for temperature, shadows in found.items():
        means = [
            mean_probability(shadows[..., rows, :][..., kept], None if online else chosen, trim)
            for rows, kept, chosen in cases
        ]
        for a in candidates:
            wholes = means if online else [offline_mean(mean, a) for mean in means]
            if any(bool((whole == 0).any()) for whole in wholes):
                continue  # a ratio is undefined
            aucs = [
                membership_auroc(likelihood_ratio("shadows", shadows[..., i, :][..., kept], whole), membership[i, kept])
                for i, ((_, kept, _), whole) in enumerate(zip(cases, wholes, strict=True))
            ]
            auc = float(torch.stack(aucs).mean())
            if auc > best_auc + 1e-12:  # not by rounding alone
                best, best_auc = (temperature, a), auc
    if best is None:
        raise ValueError(
            "no setting can be tuned: at each, an example has probability 0 under every shadow model. Compute the "
            "probabilities in float64, or at a higher temperature."
        )
    return best


def _held_out(membership: Tensor, i: int, online: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The models to attack model i with, the examples they can score, ``(n',)``, and which are OUT, ``(k', n')``."""
    own = membership[i]
    rows = ((membership != own).any(1) & (membership == own).any(1)).nonzero().flatten()
    inside, outside = count_models(membership[rows])
    kept = ((outside > 0) & ((inside > 0) | (not online))).nonzero().flatten()
    if len(kept) == 0 or bool(own[kept].all()) or not bool(own[kept].any()):
        raise ValueError(
            f"the settings of RMIA cannot be tuned on {len(membership)} shadow models and {membership.shape[1]} "
            f"examples: without shadow model {i} and the other half of its pair, no member or no non-member of it has "
            f"an OUT model{' and an IN model' if online else ''}. Train at least 4 shadow models with balanced "
            f"membership, or pass temperature={PUBLISHED_TEMPERATURE} and offline_a={PUBLISHED_A}."
        )
    return rows, kept, ~membership[rows][:, kept]
