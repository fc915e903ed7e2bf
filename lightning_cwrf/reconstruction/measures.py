"""How much of a pool of members and non-members reconstructions give back, and how much chance would."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.metrics.functional.significance import hypergeometric_cdf


def distances(reconstructions: Tensor, pool: Tensor) -> Tensor:
    """Euclidean distances, float64 ``(r, p)``, by differences: products would lose the small ones."""
    if reconstructions.shape[1:] != pool.shape[1:]:
        raise ValueError(
            f"reconstructions and pool must have inputs of one shape, not {tuple(reconstructions.shape[1:])} and "
            f"{tuple(pool.shape[1:])}."
        )
    first, second = (each.detach().cpu().double().flatten(1) for each in (reconstructions, pool))
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def reconstruction_scores(reconstructions: Tensor, pool: Tensor) -> Tensor:
    """``−min_r ‖x − r‖₂`` of each example x of a pool: a membership score, higher = more likely a member.

    Args:
        reconstructions: ``(r, ...)``; without any, every score is −∞.
        pool: members and non-members, ``(p, ...)``.

    Returns:
        float64 ``(p,)``.

    >>> reconstruction_scores(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([-5., -1.], dtype=torch.float64)
    """
    found = distances(reconstructions, pool)
    return -found.amin(0) if len(found) else torch.full((len(pool),), -torch.inf, dtype=torch.float64)


def claims(reconstructions: Tensor, pool: Tensor, ratio: float = 0.5) -> Tensor:
    """The examples of a pool that reconstructions claim, each once: ``d₁ ≤ ratio · d₂``.

    d₁ and d₂ are a reconstruction's distances to the nearest and the second nearest example. The average of two
    examples is as far from both, so it claims neither; a point far from all of them claims none.

    Args:
        reconstructions: ``(r, ...)``.
        pool: at least two examples, all different, ``(p, ...)``.
        ratio: in (0, 1).

    Returns:
        Indices of the pool, in order, int64.

    >>> pool = torch.tensor([[0.0], [1.0], [5.0]])
    >>> claims(torch.tensor([[0.1], [0.5], [0.2], [100.0]]), pool)
    tensor([0])
    """
    check_number("ratio", ratio, low=0, high=1, low_open=True, high_open=True)
    if len(pool) < 2:
        raise ValueError(f"a claim compares two examples, and the pool has {len(pool)}.")
    nearest, place = distances(reconstructions, pool).topk(2, dim=1, largest=False)
    return place[nearest[:, 0] <= ratio * nearest[:, 1], 0].bincount(minlength=len(pool)).nonzero().flatten()


def hits_p_value(members_claimed: int, nonmembers_claimed: int, members: int, nonmembers: int) -> float:
    """How often chance claims so many members: ``P(A ≥ a)``, A ~ Hypergeometric(n + k, n, a + b), exact.

    Members and non-members that are exchangeable before the training are equally likely to be claimed if the
    reconstructions tell nothing about the training, whatever the prior and the distances.

    Args:
        members_claimed: a.
        nonmembers_claimed: b.
        members: n.
        nonmembers: k.

    Raises:
        TypeError, ValueError: counts that are no integers, or out of range.

    >>> hits_p_value(0, 0, 20, 20), round(hits_p_value(1, 0, 20, 20), 6)
    (1.0, 0.5)
    """
    check_integer("members", members, low=1)
    check_integer("nonmembers", nonmembers, low=1)
    check_integer("members_claimed", members_claimed, low=0, high=members)
    check_integer("nonmembers_claimed", nonmembers_claimed, low=0, high=nonmembers)
    drawn = members_claimed + nonmembers_claimed
    return hypergeometric_cdf(nonmembers_claimed, members, nonmembers, drawn) if members_claimed else 1.0


def relative_distances(scores: Tensor, pool: Tensor) -> Tensor:
    """Each example's distance to the nearest reconstruction over that to the nearest other example, ``(p,)``.

    >>> relative_distances(torch.tensor([-1.0, -4.0]), torch.tensor([[0.0], [2.0]]))
    tensor([0.5000, 2.0000], dtype=torch.float64)
    """
    between = distances(pool, pool).fill_diagonal_(torch.inf)
    return -scores.double() / between.amin(1)
