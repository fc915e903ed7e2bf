"""An audit: the attacks run on one model's outputs, and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.attacks import Attack, Evidence, create_attacks, example_losses
from lightning_cwrf.attacks.augmentation import default_views
from lightning_cwrf.attacks.resampling import check_pairs
from lightning_cwrf.audit.estimates import (
    attack_metrics,
    estimate,
    hangs_on_shadows,
    model_estimates,
    with_shadow_intervals,
)
from lightning_cwrf.audit.result import AuditResult
from lightning_cwrf.checks import check_confidence, check_integer
from lightning_cwrf.data import Batches, check_disjoint
from lightning_cwrf.outputs import ModelOutputs, collect_inputs, collect_outputs, collect_view_logits
from lightning_cwrf.shadows.train import ShadowSignals


def audit(
    model: nn.Module,
    *,
    members: Batches,
    nonmembers: Batches,
    shadows: ShadowSignals | None = None,
    population: Batches | None = None,
    attacks: Sequence[str | Attack] | None = None,
    views: Sequence[Callable[[Tensor], Tensor]] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    shadow_resamples: int = 0,
) -> AuditResult:
    """Audit a finished classifier, a LightningModule or a plain module: run the attacks, measure what they find.

    The model is left as it was, and neither trained nor hardened.

    Args:
        model: gives logits; in which form, see :mod:`lightning_cwrf.classification`.
        members: training examples, without augmentation: a loader or a dataset.
        nonmembers: examples the model never saw.
        shadows: signals of shadow models that were trained as this model was, on a pool that holds every member and
            non-member (:func:`~lightning_cwrf.shadows.train_shadows`).
        population: further examples the model never saw, neither members nor non-members, for Attack P and quantile
            regression; with shadow models that have a population, it is theirs. Test accuracy and test loss are over
            the non-members and it.
        attacks: names, or what :func:`~lightning_cwrf.attacks.create_attack` gives. None: the loss attack, and with
            shadow models LiRA and RMIA.
        views: for the attacks that query augmented views: functions of a batch of inputs. None: those of the shadow
            models, else small rotations and translations.
        confidence: of the intervals.
        seed: of what is drawn at random: the split behind the bound on ε, and the draws of shadow models.
        shadow_resamples: replicates, better 100 or more, of a bootstrap over the choice of shadow models for
            :attr:`Estimate.shadow_interval`; each runs every attack with shadow models once more. 0: none.

    Raises:
        ValueError: an unknown attack, or one that lacks what it needs; members and non-members overlap; an audited
            example is not in the shadow models' pool; outputs that are no logits; ``shadow_resamples`` with fewer than
            8 shadow models, or ones that do not come in complementary pairs.

    >>> from torch.utils.data import TensorDataset
    >>> examples = TensorDataset(torch.randn(40, 4), torch.arange(40) % 3)
    >>> inside, outside = torch.utils.data.random_split(examples, [20, 20])
    >>> result = audit(nn.Linear(4, 3), members=inside, nonmembers=outside, attacks=["loss", "entropy"])
    >>> sorted(result.estimates)
    ['entropy', 'loss']
    """
    if shadows is not None and not isinstance(shadows, ShadowSignals):
        raise TypeError(f"shadows takes what train_shadows gave, not a {type(shadows).__name__}.")
    _check_numbers(confidence, seed, shadow_resamples, shadows)
    chosen = _attacks(attacks, shadows)
    if population is not None and shadows is not None and shadows.population is not None:
        raise ValueError("the shadow models have a population of their own, which is used; leave population out.")
    if population is None and shadows is not None:
        population = shadows.population
    needs = {need for attack in chosen for need in attack.needs}
    extra: dict[str, Tensor] = {}
    if "inputs" in needs:
        extra["inputs"] = torch.cat([collect_inputs(members), collect_inputs(nonmembers)])
        if population is not None:
            extra["population_inputs"] = collect_inputs(population)
    if "views" in needs:
        if shadows is not None and shadows.views:
            if views is not None:
                raise ValueError("the shadow models have views of their own, which are used; leave views out.")
            views = shadows.views
        views = default_views() if views is None else views
        extra["view_logits"] = torch.cat([collect_view_logits(model, d, views) for d in (members, nonmembers)], 1)
    return audit_outputs(
        collect_outputs(model, members, name="members"),
        collect_outputs(model, nonmembers, name="nonmembers"),
        shadows=shadows,
        population=None if population is None else collect_outputs(model, population, name="population"),
        attacks=chosen if attacks is not None else None,
        confidence=confidence,
        seed=seed,
        extra=extra,
        shadow_resamples=shadow_resamples,
    )


def audit_outputs(
    members: ModelOutputs,
    nonmembers: ModelOutputs,
    *,
    shadows: ShadowSignals | None = None,
    population: ModelOutputs | None = None,
    attacks: Sequence[str | Attack] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    extra: dict[str, Tensor] | None = None,
    shadow_resamples: int = 0,
) -> AuditResult:
    """Run the attacks on a model's outputs: the loss attack, and with shadow models LiRA and (with a population) RMIA.

    Test accuracy and test loss are over every example the model never saw: the non-members and the population.

    Args:
        members: the audited model's outputs on its training examples.
        nonmembers: on examples it never saw.
        shadows: signals of shadow models whose pool holds every member and non-member.
        population: the audited model's outputs on ``shadows.population``.
        attacks: names or attacks; None: as above.
        confidence: of the intervals.
        seed: of what is drawn at random: the split behind the bound on ε, and the draws of shadow models.
        extra: further fields of :class:`~lightning_cwrf.attacks.Evidence`, members before non-members.
        shadow_resamples: as for :func:`audit`.

    Raises:
        ValueError: members and non-members overlap; an audited example is not in the shadow models' pool; an attack
            that was asked for by name lacks what it needs; ``shadow_resamples`` as for :func:`audit`.
    """
    _check_numbers(confidence, seed, shadow_resamples, shadows)
    evidence = _evidence(members, nonmembers, shadows, population, extra)
    chosen = _attacks(attacks, shadows)
    scores, failures = _run(chosen, evidence, asked=attacks is not None)
    is_member = torch.arange(len(members) + len(nonmembers)) < len(members)
    losses = torch.cat([example_losses(part.logits, part.targets) for part in (members, nonmembers)])
    unseen = [nonmembers] if population is None else [nonmembers, population]
    model = model_estimates(members, unseen, losses, is_member, confidence, seed)
    accuracy, measured_on = model["test_accuracy"].value, sum(map(len, unseen))
    estimates = {
        attack: {
            name: estimate(metric, score, is_member, confidence)
            for name, metric in attack_metrics(accuracy, seed, confidence, accuracy_examples=measured_on).items()
        }
        for attack, score in scores.items()
    }
    if shadow_resamples:
        for run in chosen:
            if run.name in scores and hangs_on_shadows(run, evidence, scores[run.name]):
                measured = attack_metrics(accuracy, seed, confidence, accuracy_examples=measured_on)
                estimates[run.name] = with_shadow_intervals(
                    estimates[run.name], run, evidence, is_member, measured, confidence, shadow_resamples, seed
                )
    targets = torch.cat([members.targets, nonmembers.targets])
    return AuditResult(scores, is_member, targets, losses, estimates, model, confidence, failures)


def attack_scores(
    members: ModelOutputs,
    nonmembers: ModelOutputs,
    *,
    shadows: ShadowSignals | None = None,
    population: ModelOutputs | None = None,
    attacks: Sequence[str | Attack] | None = None,
    extra: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every attack's scores of the members and then the non-members, and the reasons of attacks that failed.

    Arguments and errors are those of :func:`audit_outputs`.
    """
    evidence = _evidence(members, nonmembers, shadows, population, extra)
    return _run(_attacks(attacks, shadows), evidence, asked=attacks is not None)


def _run(chosen: list[Attack], evidence: Evidence, *, asked: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Scores of the attacks, and the reasons of those that failed; one that was asked for must have what it needs."""
    if asked:
        for attack in chosen:
            attack.check(evidence)
    scores, failures = {}, {}
    for attack in chosen:
        try:
            scores[attack.name] = attack(evidence)
        except ValueError as error:
            if len(chosen) == 1:
                raise
            failures[attack.name] = str(error)
    return scores, failures


def _attacks(attacks: Sequence[str | Attack] | None, shadows: ShadowSignals | None) -> list[Attack]:
    if attacks is None:
        attacks = ["loss"] if shadows is None else ["loss", "lira", "rmia"]
    return create_attacks(attacks)


def _evidence(
    members: ModelOutputs,
    nonmembers: ModelOutputs,
    shadows: ShadowSignals | None,
    population: ModelOutputs | None,
    extra: dict[str, Tensor] | None,
) -> Evidence:
    """What the attacker sees of the members and then the non-members, which must be apart from all other data."""
    check_disjoint(members.digests, nonmembers.digests, "nonmembers")
    if population is not None:
        check_disjoint(members.digests, population.digests, "population")
        twice = len(set(nonmembers.digests).intersection(population.digests))
        if twice:
            raise ValueError(
                f"{twice} examples of the population are non-members too; it must be further data, or they count twice."
            )
    outputs = ModelOutputs(
        torch.cat([members.logits, nonmembers.logits]),
        torch.cat([members.targets, nonmembers.targets]),
        members.digests + nonmembers.digests,
    )
    given: dict[str, Any] = dict(extra or {})
    if shadows is not None:
        columns = _columns(outputs, shadows)
        given |= {
            "shadow_logits": shadows.logits[:, columns],
            "membership": shadows.membership[:, columns],
            "shadow_population_logits": shadows.population_logits,
        }
        if shadows.view_logits is not None:
            given["shadow_view_logits"] = shadows.view_logits[:, :, columns]
    if population is not None:
        given |= {"population_logits": population.logits, "population_targets": population.targets}
    return Evidence(outputs.logits, outputs.targets, **given)


def _columns(outputs: ModelOutputs, shadows: ShadowSignals) -> Tensor:
    """Where in the shadow models' pool each audited example is; the i-th copy of an example is the i-th in the pool."""
    places: dict[bytes, list[int]] = {}
    for column, digest in enumerate(shadows.digests):
        places.setdefault(digest, []).append(column)
    columns, lost = [], 0
    for digest in outputs.digests:
        found = places.get(digest)
        lost += not found
        columns.append(found.pop(0) if found else -1)
    if lost:
        raise ValueError(
            f"{lost} of the {len(columns)} audited examples are not in the pool of {len(shadows.digests)} that the "
            "shadow models were trained on (by content); train them on the members and the non-members, read without "
            "augmentation."
        )
    return torch.tensor(columns)


def _check_numbers(confidence: float, seed: int, resamples: int, shadows: ShadowSignals | None) -> None:
    check_confidence(confidence)
    check_integer("seed", seed)
    check_integer("shadow_resamples", resamples)
    if resamples:
        check_pairs(None if shadows is None else shadows.membership, resamples)
