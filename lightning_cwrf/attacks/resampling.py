"""Replicates of an attack over other shadow models and other examples, drawn with replacement from those there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_cwrf.attacks.evidence import Evidence, PerModel
from lightning_cwrf.checks import check_flag, check_integer

FEWEST_PAIRS = 4
"""Complementary pairs of shadow models below which drawing among them tells nothing of others."""


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
    """Replicates of statistics of an attack, over the choice of the shadow models and of the examples.

    Each time, as many complementary pairs of shadow models as there are, are drawn with replacement, the attack is run
    with them, and the statistics are taken on members and non-members that are drawn with replacement too. A draw of
    one pair alone is drawn again: it has no spread. With the same seed, every attack meets the same draws.

    Models that were drawn twice tell less than as many different ones, so the replicates lie below the attack with
    all models: use their spread, not their quantiles, times √(pairs / (pairs − 1)), since draws are centred at the
    pairs there are. As in every bootstrap over rows and columns (Owen 2007, "The
    pigeonhole bootstrap"), noise of single examples in single models counts more than once, so the spread errs upwards.

    Args:
        attack: evidence in, scores ``(n,)`` out: what :func:`~lightning_cwrf.attacks.create_attack` gives, or a
            function.
        evidence: with shadow models whose rows ``2i`` and ``2i + 1`` of membership are complements. Every field whose
            name begins with ``shadow_`` has them along its first axis.
        is_member: bool ``(n,)``.
        statistics: functions of ``(scores, is_member)`` that give a scalar, by name.
        resamples: number of replicates.
        examples: draw the examples too; False: over the shadow models alone, on all examples.
        seed: of a generator of its own; the caller's random state is not touched.

    Returns:
        For each name a float64 tensor ``(resamples,)``.

    Raises:
        TypeError: ``resamples`` or ``seed`` is no integer, ``examples`` no bool.
        ValueError: what :func:`check_pairs` says; a field that has not the shadow models along its first axis.

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
        scores = attack(_with_models(evidence, _draw_models(pairs, generator)))
        drawn = [_draw(part, generator) if examples else part for part in (inside, outside)]
        rows = torch.cat(drawn)
        for name, statistic in statistics.items():
            found[name].append(float(statistic(scores[rows], is_member[rows])))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def check_pairs(membership: Tensor | None, resamples: int) -> int:
    """The number of complementary pairs of shadow models, where drawing among them can tell something.

    Raises:
        TypeError: ``resamples`` is no integer.
        ValueError: fewer than 2 resamples; no shadow models, fewer than 8, or ones that do not come in pairs.

    >>> check_pairs(torch.tensor([[True, False], [False, True]] * 5), resamples=100)
    5
    """
    check_integer("resamples", resamples)
    if resamples < 2:
        raise ValueError(f"shadow models must be resampled twice at least, better 100 times, not {resamples} times.")
    if membership is None:
        raise ValueError("resampling shadow models needs shadow models: pass shadows= (lightning_cwrf.train_shadows).")
    models = len(membership)
    if models < 2 * FEWEST_PAIRS:
        raise ValueError(
            f"{models} shadow models are too few to draw among: train at least {2 * FEWEST_PAIRS} "
            f"({FEWEST_PAIRS} complementary pairs), or leave shadow_resamples at 0."
        )
    if models % 2 or not torch.equal(membership[0::2], ~membership[1::2]):
        raise ValueError(
            "membership must come in complementary pairs, rows 2i and 2i + 1, so that every example stays IN for half "
            "of the models that are drawn; make it by lightning_cwrf.shadows.balanced_membership."
        )
    return models // 2


def without_shadows(evidence: Evidence) -> Evidence:
    """The evidence of an attacker who has no shadow models."""
    nothing: dict[str, Any] = dict.fromkeys(_of_shadows(evidence))
    return replace(evidence, **nothing)


def _draw(places: Tensor, generator: torch.Generator) -> Tensor:
    return places[torch.randint(len(places), (len(places),), generator=generator)]


def _draw_models(pairs: int, generator: torch.Generator) -> Tensor:
    """Rows of the models of ``pairs`` pairs, drawn with replacement, at least two of them different."""
    while True:
        drawn = torch.randint(pairs, (pairs,), generator=generator)
        if bool((drawn != drawn[0]).any()):
            return torch.stack([2 * drawn, 2 * drawn + 1], 1).flatten()


def _with_models(evidence: Evidence, rows: Tensor) -> Evidence:
    chosen: dict[str, Any] = {}
    for name, value in _of_shadows(evidence).items():
        if len(value) != len(rows):
            raise ValueError(f"the evidence's {name} must have the {len(rows)} shadow models along its first axis.")
        chosen[name] = value[rows.to(value.device)]
    return replace(evidence, **chosen)


def _of_shadows(evidence: Evidence) -> dict[str, Tensor | PerModel]:
    """The fields that shadow models gave."""
    # Not by getattr: a PerModel is drawn from without a copy of its outputs.
    return {
        name: value
        for name, value in vars(evidence).items()
        if value is not None and (name == "membership" or name.startswith("shadow_"))
    }
