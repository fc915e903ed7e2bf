"""An audit: the attacks run on one model's outputs, and measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.attacks import Attack, Evidence, create_attacks, example_losses
from lightning_cwrf.attacks.resampling import check_pairs
from lightning_cwrf.auditing.attack_settings import settings_told
from lightning_cwrf.auditing.audited import AuditedData, warn_of_draws
from lightning_cwrf.auditing.estimates import (
    attack_metrics,
    depends_on_shadows,
    estimates_of,
    model_estimates,
    with_shadow_intervals,
)
from lightning_cwrf.auditing.evidence import evidence_of
from lightning_cwrf.auditing.result import AuditResult
from lightning_cwrf.auditing.sides import apart, examples_digest, suspicions
from lightning_cwrf.checks import check_confidence, check_integer
from lightning_cwrf.data import Batches, Key, Overlap
from lightning_cwrf.data.examples import ExampleId
from lightning_cwrf.metrics import MembershipMetric
from lightning_cwrf.outputs import ModelOutputs
from lightning_cwrf.shadows.outputs import ShadowOutputs
from lightning_cwrf.weights.copies import weights_digest


def audit(
    model: nn.Module,
    *,
    members: Batches,
    nonmembers: Batches,
    shadows: ShadowOutputs | None = None,
    population: Batches | None = None,
    attacks: Sequence[str | Attack] | None = None,
    views: Sequence[Callable[[Tensor], Tensor]] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    shadow_resamples: int = 0,
    key: Key | None = None,
    overlap: Overlap = "error",
) -> AuditResult:
    """Audit a finished classifier, a LightningModule or a plain module: run attacks and measure what they find.

    The model is neither trained nor changed.

    Args:
        model: returns logits, in one of the forms of :mod:`lightning_cwrf.classification`.
        members: training examples, without augmentation: a data set, a loader or a list of batches. Of a loader, those
            that its sampler can draw (:func:`~lightning_cwrf.data.sampling.support`).
        nonmembers: examples that the model never saw, likewise.
        shadows: outputs of shadow models that were trained as this model was, on a pool that holds every member and
            non-member (:func:`~lightning_cwrf.shadows.train_shadows`).
        population: further examples that the model never saw, neither members nor non-members, for Attack P and
            quantile regression; None: that of the shadow models. Test accuracy and test loss are over non-members and
            population.
        attacks: names, or results of :func:`~lightning_cwrf.attacks.create_attack`. None: the loss attack, and with
            shadow models LiRA and RMIA.
        views: for the attacks that query augmented views: functions of a batch of inputs. None: those of the shadow
            models, else small rotations and translations.
        confidence: of the intervals.
        seed: of the split behind the bound on ε, and of the draws of shadow models.
        shadow_resamples: replicates, better 100 or more, of a bootstrap over the choice of shadow models for
            :attr:`Estimate.shadow_interval`; each runs every attack with shadow models again. 0: none.
        key: returns the id of one example, which is passed as it is in its batch: ``(x[i], y[i])``, or
            ``{"ids": ids[i], "label": y[i]}``. None: examples are identified by the content of their inputs and label.
        overlap: what to do with a non-member or an example of the population that is a member too, or that the model
            has seen as reference data of its scoring or as its defense's non-members: ``"error"``; ``"drop"`` it; or
            ``"allow"`` it, if different examples share their content. :attr:`AuditResult.overlap` has their indices.

    Raises:
        ValueError: an unknown attack, or one that lacks what it needs; sides that overlap; data that read differently
            each time; an audited example that is not in the shadow models' pool, or has another label there; outputs
            that are not logits; ``shadow_resamples`` with fewer than 8 shadow models, or without complementary pairs.
        TypeError: ``model`` is not a module, or data that are not a data set, loader or list of batches.

    >>> from torch.utils.data import TensorDataset
    >>> examples = TensorDataset(torch.randn(40, 4), torch.arange(40) % 3)
    >>> inside, outside = torch.utils.data.random_split(examples, [20, 20])
    >>> result = audit(nn.Linear(4, 3), members=inside, nonmembers=outside, attacks=["loss", "entropy"])
    >>> sorted(result.estimates)
    ['entropy', 'loss']
    """
    _check_arguments(model, shadows)
    _check_numbers(confidence, seed, shadow_resamples, shadows)
    chosen = chosen_attacks(attacks, with_shadows=shadows is not None)
    if shadows is not None and shadows.population is not None:
        if population is not None:
            raise ValueError("the shadow models have a population of their own, which is used; leave population out.")
        population = shadows.population
    data = AuditedData(members, nonmembers, population, key, overlap)
    data.check()
    warn_of_draws(members)
    extra = data.extra(model, chosen, shadows, views)
    result = audit_outputs(
        **data.outputs(model),
        shadows=shadows,
        attacks=chosen if attacks is not None else None,
        confidence=confidence,
        seed=seed,
        extra=extra,
        shadow_resamples=shadow_resamples,
        remarks=unlike_shadows(model, shadows),
        weights=weights_digest(model),
    )
    for remark in result.remarks:
        warnings.warn(remark, stacklevel=2)
    return result


def unlike_shadows(model: nn.Module, shadows: ShadowOutputs | None) -> list[str]:
    """A remark if the shadow models were visibly not trained as the audited model was."""
    found = [] if shadows is None else shadows.differences(model)
    if not found:
        return []
    return [
        f"the shadow models were not trained as this model was: {'; '.join(found)}. The attacks that use them are "
        "weaker than an attacker who knows the training: train shadow models by its recipe (ShadowRecipe.like)."
    ]


def _check_arguments(model: Any, shadows: Any) -> None:
    if not isinstance(model, nn.Module):
        is_class = isinstance(model, type)
        what = f"the class {model.__name__}; make one, and train it" if is_class else type(model).__name__
        raise TypeError(f"audit needs a finished module, not {what}. Of another engine: audit_logits.")
    check_shadows(shadows)
    if shadows is not None:
        shadows.check_inputs()


def check_shadows(shadows: Any) -> None:
    """Raise a TypeError for anything but shadow models' outputs, or None."""
    if shadows is not None and not isinstance(shadows, ShadowOutputs):
        raise TypeError(f"shadows must be what train_shadows returns, not a {type(shadows).__name__}.")


def audit_outputs(
    members: ModelOutputs,
    nonmembers: ModelOutputs,
    *,
    shadows: ShadowOutputs | None = None,
    population: ModelOutputs | None = None,
    attacks: Sequence[str | Attack] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    extra: dict[str, Tensor] | None = None,
    shadow_resamples: int = 0,
    seen: Mapping[str, Collection[ExampleId]] | None = None,
    overlap: Overlap = "error",
    remarks: Sequence[str] = (),
    weights: str = "",
) -> AuditResult:
    """Run the attacks on a model's outputs: the loss attack, and with shadow models LiRA and (with a population) RMIA.

    Test accuracy and test loss are over every example that the model never saw: non-members and population.

    Args:
        members: the audited model's outputs on its training examples.
        nonmembers: on examples that it never saw.
        shadows: outputs of shadow models whose pool holds every member and non-member.
        population: the audited model's outputs on ``shadows.population``.
        attacks: names or attacks; None: as above.
        confidence: as for :func:`audit`.
        seed: as for :func:`audit`.
        extra: further fields of :class:`~lightning_cwrf.attacks.Evidence`, members before non-members.
        shadow_resamples: as for :func:`audit`.
        seen: what else the model has seen (:func:`~lightning_cwrf.data.seen.seen_by`).
        overlap: as for :func:`audit`.
        remarks: further :attr:`AuditResult.remarks`.
        weights: the model's :func:`~lightning_cwrf.weights.weights_digest`; empty: unknown.

    Raises:
        ValueError: sides that overlap; an audited example is not in the shadow models' pool, or has another label
            there; an attack that was asked for by name lacks what it needs; ``shadow_resamples`` as for :func:`audit`.
    """
    _check_numbers(confidence, seed, shadow_resamples, shadows)
    sides = apart(members, nonmembers, population, seen=seen or {}, overlap=overlap)
    evidence = evidence_of(sides, shadows, extra)
    chosen = chosen_attacks(attacks, with_shadows=shadows is not None)
    scores, failures = run_attacks(chosen, evidence, asked=attacks is not None)
    is_member = torch.arange(len(evidence.targets)) < len(sides.members)
    losses = example_losses(evidence.logits, evidence.targets)
    unseen = [side for side in (sides.nonmembers, sides.population) if side is not None]
    model = model_estimates(sides.members, unseen, losses, is_member, confidence, seed)

    def metrics() -> dict[str, MembershipMetric]:
        accuracy, examples = model["test_accuracy"].value, sum(map(len, unseen))
        return attack_metrics(accuracy, seed, confidence, accuracy_examples=examples)

    estimates = {attack: estimates_of(metrics(), score, is_member, confidence) for attack, score in scores.items()}
    for attack in chosen if shadow_resamples else ():
        if attack.name in scores and depends_on_shadows(attack, evidence, scores[attack.name]):
            estimates[attack.name] = with_shadow_intervals(
                estimates[attack.name], attack, evidence, is_member, metrics(), confidence, shadow_resamples, seed
            )
    return AuditResult(
        scores,
        is_member,
        evidence.targets,
        losses,
        estimates,
        model,
        confidence,
        failures,
        overlap=sides.overlap,
        overlap_policy=overlap,
        remarks=[*remarks, *suspicions(sides, model, overlap)],
        examples=examples_digest(sides),
        weights=weights,
        attack_settings={attack.name: settings_told(attack) for attack in chosen},
    )


def chosen_attacks(attacks: Sequence[str | Attack] | None, *, with_shadows: bool) -> list[Attack]:
    """The attacks of an audit; None: the loss attack, and with shadow models LiRA and RMIA."""
    if attacks is None:
        attacks = ["loss", "lira", "rmia"] if with_shadows else ["loss"]
    return create_attacks(attacks)


class WrittenEvidence(ValueError):
    """An attack wrote into the evidence, which other attacks see too."""


def failure_of(error: Exception) -> str:
    """Why an attack failed, in words."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def run_attacks(attacks: list[Attack], evidence: Evidence, *, asked: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Scores of the attacks, and the reasons of those that failed.

    If the user ``asked`` for them by name, one that lacks evidence is an error. One that writes into it always is.
    """
    if asked:
        for attack in attacks:
            attack.check(evidence)
    scores, failures = {}, {}
    untouched = evidence.writes()
    for attack in attacks:
        try:
            scores[attack.name] = attack(evidence)
        except Exception as error:  # a user's own attack may raise anything
            if len(attacks) == 1:
                raise
            failures[attack.name] = failure_of(error)
        changed = [name for name, count in evidence.writes().items() if count != untouched.get(name, 0)]
        if changed:
            raise WrittenEvidence(
                f"the {attack.name} attack changed the evidence's {', '.join(changed)} in place, which other attacks "
                "see too; let it work on a copy (.clone())."
            )
    return scores, failures


def attack_scores(
    members: ModelOutputs,
    nonmembers: ModelOutputs,
    *,
    shadows: ShadowOutputs | None = None,
    population: ModelOutputs | None = None,
    attacks: Sequence[str | Attack] | None = None,
    extra: dict[str, Tensor] | None = None,
    seen: Mapping[str, Collection[ExampleId]] | None = None,
    overlap: Overlap = "error",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every attack's scores of the members and then the non-members, and the reasons of attacks that failed.

    Arguments and errors are those of :func:`audit_outputs`.
    """
    sides = apart(members, nonmembers, population, seen=seen or {}, overlap=overlap)
    evidence = evidence_of(sides, shadows, extra)
    chosen = chosen_attacks(attacks, with_shadows=shadows is not None)
    return run_attacks(chosen, evidence, asked=attacks is not None)


def _check_numbers(confidence: float, seed: int, resamples: int, shadows: ShadowOutputs | None) -> None:
    check_confidence(confidence)
    check_integer("seed", seed, low=0)
    check_integer("shadow_resamples", resamples, low=0)
    if resamples:
        check_pairs(None if shadows is None else shadows.membership, resamples)
