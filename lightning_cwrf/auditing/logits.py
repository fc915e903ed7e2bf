"""An audit of outputs alone, of any engine."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lightning_cwrf.arrays import read_outputs
from lightning_cwrf.attacks import Attack
from lightning_cwrf.auditing.result import AuditResult
from lightning_cwrf.auditing.run import audit_outputs, check_shadows
from lightning_cwrf.outputs import ModelOutputs
from lightning_cwrf.shadows.outputs import ShadowOutputs


def audit_logits(
    *,
    members: tuple[Any, Any],
    nonmembers: tuple[Any, Any],
    shadows: ShadowOutputs | None = None,
    population: tuple[Any, Any] | None = None,
    attacks: Sequence[str | Attack] | None = None,
    places: tuple[Any, Any] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    shadow_resamples: int = 0,
) -> AuditResult:
    """Audit a classifier of any engine by its outputs: scikit-learn, XGBoost, a remote API.

    The same attacks and numbers as of :func:`~lightning_cwrf.audit`. Inputs are not seen, so nothing can be said about
    examples on two sides: keep members, non-members and population disjoint. Attacks that query further inputs
    (``augmentation``, attacks on views, ``quantile_regression``) cannot run.

    Args:
        members: the audited model's logits ``(n, K)`` on its training examples and their class indices ``(n,)``, as
            tensors or arrays. One logit z for each example, ``(n,)``, is that of class 1 of two: the logits are 0 and
            z. Of probabilities: :func:`~lightning_cwrf.arrays.probabilities_to_logits`.
        nonmembers: the same on examples that it never saw.
        shadows: outputs of shadow models that were trained as this model was: of any engine
            (:meth:`ShadowOutputs.from_arrays <lightning_cwrf.shadows.ShadowOutputs.from_arrays>`), or those of
            :func:`~lightning_cwrf.train_shadows`.
        population: the audited model's logits ``(m, K)`` on the shadow models' population, in its order, and the
            targets; or on any examples that it never saw, for attacks without shadow models.
        attacks: as for :func:`~lightning_cwrf.audit`.
        places: where in the shadow models' pool the members are, and where the non-members, as two lists of indices.
            None: the pool is the members followed by the non-members.
        confidence: as for :func:`~lightning_cwrf.audit`.
        seed: as for :func:`~lightning_cwrf.audit`.
        shadow_resamples: as for :func:`~lightning_cwrf.audit`.

    Raises:
        TypeError: no pairs, no numbers, or ``shadows`` that are no :class:`~lightning_cwrf.shadows.ShadowOutputs`.
        ValueError: shapes or numbers of classes that do not fit; logits that are not finite, or are probabilities;
            multi-label targets; a pool, places or a population that do not fit the shadow models, labels included; an
            attack that lacks what it needs.

    >>> inside, outside = torch.randn(20, 3), torch.randn(30, 3)
    >>> result = audit_logits(members=(inside, inside.argmax(1)), nonmembers=(outside, torch.arange(30) % 3))
    >>> sorted(result.estimates)
    ['loss']
    """
    check_shadows(shadows)
    sides = [read_outputs(members, "members"), read_outputs(nonmembers, "nonmembers")]
    sizes = (len(sides[0][1]), len(sides[1][1]))
    if shadows is None:
        if places is not None:
            raise ValueError("places are those in the pool of shadow models; pass shadows= too, or leave places out.")
        numbers = _in_order(sizes)
    else:
        numbers = _in_order(sizes, len(shadows.targets)) if places is None else _places(places, sizes, shadows)
        # By number rather than by content: copies of an example in the pool are told apart.
        shadows = replace(shadows, digests=[_name(i) for i in range(len(shadows.targets))])
    inside, outside = (
        ModelOutputs(z, y, [_name(i) for i in found]) for (z, y), found in zip(sides, numbers, strict=True)
    )
    result = audit_outputs(
        inside,
        outside,
        shadows=shadows,
        population=None if population is None else _population(population, shadows),
        attacks=attacks,
        confidence=confidence,
        seed=seed,
        shadow_resamples=shadow_resamples,
    )
    for remark in result.remarks:
        warnings.warn(remark, stacklevel=2)
    return replace(result, examples="")  # which inputs these were is not known


def _name(place: int) -> bytes:
    return f"example {place}".encode()


def _in_order(sizes: tuple[int, int], pool: int | None = None) -> list[list[int]]:
    members, total = sizes[0], sum(sizes)
    if pool is not None and pool != total:
        raise ValueError(
            f"the shadow models' pool has {pool} examples, members and non-members together are {total}. Pass places=, "
            "where in the pool the members are, and where the non-members."
        )
    return [list(range(members)), list(range(members, total))]


def _places(given: Any, sizes: tuple[int, int], shadows: ShadowOutputs) -> list[list[int]]:
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError("places must be a pair: the members' indices in the pool, and the non-members'.")
    pool = len(shadows.targets)
    found = []
    for name, each, size in zip(("members", "nonmembers"), given, sizes, strict=True):
        places = np.asarray(each)
        if places.dtype.kind not in "iu" or places.shape != (size,):
            raise ValueError(
                f"places of the {name} must be {size} indices in the pool, one for each example, not {places.dtype} of "
                f"shape {places.shape}."
            )
        if places.min() < 0 or places.max() >= pool:
            raise ValueError(f"places of the {name} must lie between 0 and {pool - 1}, as the pool has {pool}.")
        found.append(places.tolist())
    if len({*found[0], *found[1]}) < sum(sizes):
        raise ValueError("places must be different: an example of the pool is given twice.")
    return found


def _population(given: Any, shadows: ShadowOutputs | None) -> ModelOutputs:
    z, y = read_outputs(given, "population")
    if shadows is not None and shadows.population is not None:
        known, _ = shadows.read_population()
        if not torch.equal(known, y):
            raise ValueError(
                f"the population has {len(y)} examples, that of the shadow models has {len(known)}, or their labels "
                "differ: pass the audited model's outputs on the very same examples in the same order."
            )
    return ModelOutputs(z, y, [f"population {i}".encode() for i in range(len(y))])
