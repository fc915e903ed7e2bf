"""The bootstrap of an attack over shadow models and examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_cwrf.attacks.base import Evidence
from lightning_cwrf.checks import check_flag, check_integer

FEWEST_PAIRS = 4
"""The fewest complementary pairs of shadow models to draw from."""


def shadow_bootstrap(
    attack: Callable[[Evidence], Tensor],
    evidence: Evidence,
    is_member: Tensor,
    statistics: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    resamples: int,
    *,
    examples: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Bootstrap replicates of statistics of an attack, over the choice of the shadow models and of the examples.

    Each replicate draws complementary pairs of shadow models with replacement, as many as there are, runs the attack
    with them, and computes the statistics on members and non-members drawn with replacement too. A draw that repeats
    one single pair has no spread and is drawn again. With the same seed, every attack gets the same draws.

    Repeated models are worth less than as many different ones, so the replicates are biased towards a weaker attack:
    use their spread, not their quantiles, times √(pairs / (pairs − 1)), as draws are centred at the given pairs.
    As in every bootstrap over rows and columns (Owen 2007, "The pigeonhole bootstrap"), noise of single examples in
    single models counts more than once, so the spread is biased upwards.

    Args:
        attack: a function from evidence to scores ``(n,)``, such as :func:`~lightning_cwrf.attacks.create_attack`
            returns.
        evidence: with shadow models whose rows ``2i`` and ``2i + 1`` of membership are complements. Every field whose
            name begins with ``shadow_`` has one entry per shadow model along its first axis.
        is_member: bool ``(n,)``.
        statistics: functions of ``(scores, is_member)`` that return a scalar, by name.
        resamples: number of replicates.
        examples: draw the examples too. False: draw the shadow models only.
        seed: of a generator of its own; the caller's random state is not touched.

    Returns:
        For each name a float64 tensor ``(resamples,)``.

    Raises:
        TypeError: ``resamples`` or ``seed`` is not an integer, ``examples`` not a bool.
        ValueError: fewer than 2 resamples; fewer than 8 shadow models, or ones that are not complementary pairs; a
            field without one entry per shadow model.

    >>> membership = torch.tensor([[True, False] * 10, [False, True] * 10] * 4)
    >>> logits = torch.randn(9, 20, 3)
    >>> evidence = Evidence(logits[0], torch.arange(20) % 3, shadow_logits=logits[1:], membership=membership)
    >>> def against_mean(evidence):
    ...     return evidence.logits[:, 0] - evidence.shadow_logits.mean(0)[:, 0]
    >>> share = {"above 0": lambda scores, is_member: (scores > 0).double().mean()}
    >>> shadow_bootstrap(against_mean, evidence, torch.arange(20) < 10, share, 50)["above 0"].shape
    torch.Size([50])
    """
    pairs = check_pairs(evidence.membership, resamples)
    check_flag("examples", examples)
    check_integer("seed", seed)
    inside, outside = (flag.nonzero().flatten() for flag in (is_member, ~is_member))
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {name: [] for name in statistics}
    for _ in range(resamples):
        scores = attack(evidence.with_models(_draw_models(pairs, generator)))
        drawn = [
            part[torch.randint(len(part), (len(part),), generator=generator)] if examples else part
            for part in (inside, outside)
        ]
        rows = torch.cat(drawn)
        for name, statistic in statistics.items():
            found[name].append(float(statistic(scores[rows], is_member[rows])))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def check_pairs(membership: Tensor | None, resamples: int) -> int:
    """The number of complementary pairs of shadow models, checked to be enough to draw from.

    >>> check_pairs(torch.tensor([[True, False], [False, True]] * 5), resamples=100)
    5
    """
    check_integer("resamples", resamples)
    if resamples < 2:
        raise ValueError(f"shadow models must be resampled at least twice, better 100 times, not {resamples} times.")
    if membership is None:
        raise ValueError("resampling shadow models needs shadow models: pass shadows= (lightning_cwrf.train_shadows).")
    models = len(membership)
    if models < 2 * FEWEST_PAIRS:
        raise ValueError(
            f"{models} shadow models are too few to draw from: train at least {2 * FEWEST_PAIRS} "
            f"({FEWEST_PAIRS} complementary pairs). An audit of one model can leave shadow_resamples at 0."
        )
    if models % 2 or not torch.equal(membership[0::2], ~membership[1::2]):
        raise ValueError(
            "membership must come in complementary pairs, rows 2i and 2i + 1, so that every example is IN for half of "
            "the drawn models; lightning_cwrf.shadows.balanced_membership makes them."
        )
    return models // 2


def _draw_models(pairs: int, generator: torch.Generator) -> Tensor:
    """Rows of the models of ``pairs`` pairs, drawn with replacement, at least two of them distinct."""
    while True:
        drawn = torch.randint(pairs, (pairs,), generator=generator)
        if bool((drawn != drawn[0]).any()):
            return torch.stack([2 * drawn, 2 * drawn + 1], 1).flatten()
