"""An audit: the attacks run on one model's outputs, and measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_cwrf.attacks import Attack, Evidence, create_attacks, example_losses
from lightning_cwrf.attacks.augmentation import default_views
from lightning_cwrf.attacks.resampling import check_pairs
from lightning_cwrf.auditing.estimates import (
    attack_metrics,
    depends_on_shadows,
    estimate,
    model_estimates,
    with_shadow_intervals,
)
from lightning_cwrf.auditing.evidence import evidence_of
from lightning_cwrf.auditing.result import AuditResult
from lightning_cwrf.auditing.sides import apart, suspicions
from lightning_cwrf.checks import check_choice, check_confidence, check_integer
from lightning_cwrf.data import Batches, Key, Overlap, check_batches, check_reads_alike
from lightning_cwrf.data.examples import ExampleId
from lightning_cwrf.data.loading import iterates_itself
from lightning_cwrf.data.overlap import OVERLAPS
from lightning_cwrf.data.sampling import support
from lightning_cwrf.data.seen import seen_by
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
    key: Key | None = None,
    overlap: Overlap = "error",
) -> AuditResult:
    """Audit a finished classifier, a LightningModule or a plain module: run the attacks, measure what they find.

    The model is left as it was, and neither trained nor hardened.

    Args:
        model: gives logits; in which form, see :mod:`lightning_cwrf.classification`.
        members: training examples, without augmentation: a data set, a loader or a list of batches. Of a loader, those
            that its sampler can give (:func:`~lightning_cwrf.data.sampling.support`).
        nonmembers: examples the model never saw, likewise.
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
        key: gives the id of one example, which comes as it stands in its batch: ``(x[i], y[i])``, or
            ``{"ids": ids[i], "label": y[i]}``. None: examples are known by the content of their inputs and their label.
        overlap: what to do with a non-member or an example of the population that is a member too, or that the model
            has seen as reference data of its scoring or as its defense's non-members: ``"error"``; ``"drop"`` it; or
            ``"allow"`` it, where different examples share their content. :attr:`AuditResult.overlap` has the places.

    Raises:
        ValueError: an unknown attack, or one that lacks what it needs; sides that overlap; data that read differently
            each time; an audited example that is not in the shadow models' pool, or has another label there; outputs
            that are no logits; ``shadow_resamples`` with fewer than 8 shadow models, or ones that do not come in
            complementary pairs.
        TypeError: no module, or data that are no data set, loader or list of batches.

    >>> from torch.utils.data import TensorDataset
    >>> examples = TensorDataset(torch.randn(40, 4), torch.arange(40) % 3)
    >>> inside, outside = torch.utils.data.random_split(examples, [20, 20])
    >>> result = audit(nn.Linear(4, 3), members=inside, nonmembers=outside, attacks=["loss", "entropy"])
    >>> sorted(result.estimates)
    ['entropy', 'loss']
    """
    _check_arguments(model, shadows, overlap)
    _check_numbers(confidence, seed, shadow_resamples, shadows)
    chosen = _attacks(attacks, shadows)
    if population is not None and shadows is not None and shadows.population is not None:
        raise ValueError("the shadow models have a population of their own, which is used; leave population out.")
    if population is None and shadows is not None:
        population = shadows.population
    sides = {"members": members, "nonmembers": nonmembers}
    if population is not None:
        sides["population"] = population
    for name, data in sides.items():
        check_side(data, name)
    _warn_of_draws(members)
    extra = _extra(model, sides, chosen, shadows, views)
    outputs = {name: collect_outputs(model, data, name=name, key=key) for name, data in sides.items()}
    result = audit_outputs(
        **outputs,
        shadows=shadows,
        attacks=chosen if attacks is not None else None,
        confidence=confidence,
        seed=seed,
        extra=extra,
        shadow_resamples=shadow_resamples,
        seen=seen_by(model),
        overlap=overlap,
        remarks=unlike_shadows(model, shadows),
    )
    for remark in result.remarks:
        warnings.warn(remark, stacklevel=2)
    return result


def unlike_shadows(model: nn.Module, shadows: ShadowSignals | None) -> list[str]:
    """A remark where the shadow models were visibly trained in another way than the audited model."""
    found = [] if shadows is None else shadows.differences(model)
    if not found:
        return []
    return [
        f"the shadow models were not trained as this model was: {'; '.join(found)}. The attacks that use them are "
        "weaker than an attacker who knows the training: train shadow models by its recipe (ShadowRecipe.like)."
    ]


def check_side(data: Batches, name: str, transfer: Callable[[Any], Any] | None = None) -> None:
    """Raise where data cannot be audited: random augmentation, one-shot iterators, several loaders.

    Args:
        data: of one side.
        name: its argument's name.
        transfer: as for :func:`~lightning_cwrf.data.check_reads_alike`.
    """
    check_batches(data, name)
    if isinstance(data, Iterator):
        raise TypeError(
            f"{name}: a {type(data).__name__} can be read only once, and an audit reads data again; pass a list of its "
            "batches, a DataLoader or a data set."
        )
    if iterates_itself(data):
        warnings.warn(
            f"{name}: {type(data).__name__} has an __iter__ of its own, which an audit goes without: it reads the "
            "loader's data set with its collate function. If __iter__ changes the batches, pass a list of them.",
            stacklevel=3,
        )
    check_reads_alike(data, name, transfer)


def _warn_of_draws(members: Batches) -> None:
    """Say what is taken for members where a pass over their loader leaves many out; how many passes is not known."""
    if not isinstance(members, DataLoader) or isinstance(members.dataset, IterableDataset):
        return
    given = support(members)
    if given.unseen(1) > 0.1:
        warnings.warn(
            f"the members' loader draws examples at random, and a pass leaves out {given.unseen(1):.0%} of the "
            f"{len(given.places)} that it can give. All of these are taken for members, also those that the training "
            "never drew: pass members= the examples that it was trained on.",
            stacklevel=3,
        )


def _check_arguments(model: Any, shadows: Any, overlap: Any) -> None:
    if not isinstance(model, nn.Module):
        what = (
            f"the class {model.__name__}; make one, and train it" if isinstance(model, type) else type(model).__name__
        )
        raise TypeError(f"audit needs a finished module, not {what}.")
    if shadows is not None and not isinstance(shadows, ShadowSignals):
        raise TypeError(f"shadows takes what train_shadows gave, not a {type(shadows).__name__}.")
    check_choice("overlap", overlap, OVERLAPS)


def _extra(
    model: nn.Module,
    sides: Mapping[str, Batches],
    chosen: list[Attack],
    shadows: ShadowSignals | None,
    views: Sequence[Callable[[Tensor], Tensor]] | None,
) -> dict[str, Tensor]:
    """What some attacks need beyond outputs: inputs, and outputs on augmented views."""
    if views is not None and (not isinstance(views, Sequence) or not views or not all(map(callable, views))):
        raise TypeError("views must be a list of functions of a batch of inputs, one at least.")
    needs = {need for attack in chosen for need in attack.needs}
    both = [sides["members"], sides["nonmembers"]]
    extra: dict[str, Tensor] = {}
    if "inputs" in needs:
        extra["inputs"] = torch.cat([collect_inputs(data) for data in both])
        if "population" in sides:
            extra["population_inputs"] = collect_inputs(sides["population"])
    if "views" in needs:
        if shadows is not None and shadows.views:
            if views is not None:
                raise ValueError("the shadow models have views of their own, which are used; leave views out.")
            views = shadows.views
        views = default_views() if views is None else views
        extra["view_logits"] = torch.cat([collect_view_logits(model, data, views) for data in both], 1)
    return extra


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
    seen: Mapping[str, Collection[ExampleId]] | None = None,
    overlap: Overlap = "error",
    remarks: Sequence[str] = (),
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
        seen: what the model has seen besides its members (:func:`~lightning_cwrf.data.seen.seen_by`).
        overlap: as for :func:`audit`.
        remarks: further :attr:`AuditResult.remarks`.

    Raises:
        ValueError: sides that overlap; an audited example is not in the shadow models' pool, or has another label
            there; an attack that was asked for by name lacks what it needs; ``shadow_resamples`` as for :func:`audit`.
    """
    _check_numbers(confidence, seed, shadow_resamples, shadows)
    sides = apart(members, nonmembers, population, seen=seen or {}, overlap=overlap)
    members, nonmembers, population = sides.members, sides.nonmembers, sides.population
    evidence = evidence_of(sides, shadows, extra)
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
            if run.name in scores and depends_on_shadows(run, evidence, scores[run.name]):
                measured = attack_metrics(accuracy, seed, confidence, accuracy_examples=measured_on)
                estimates[run.name] = with_shadow_intervals(
                    estimates[run.name], run, evidence, is_member, measured, confidence, shadow_resamples, seed
                )
    targets = torch.cat([members.targets, nonmembers.targets])
    return AuditResult(
        scores,
        is_member,
        targets,
        losses,
        estimates,
        model,
        confidence,
        failures,
        overlap=sides.overlap,
        overlap_policy=overlap,
        remarks=[*remarks, *suspicions(sides, model, overlap)],
    )


def attack_scores(
    members: ModelOutputs,
    nonmembers: ModelOutputs,
    *,
    shadows: ShadowSignals | None = None,
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
    return _run(_attacks(attacks, shadows), evidence, asked=attacks is not None)


def _run(chosen: list[Attack], evidence: Evidence, *, asked: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Scores of the attacks, and the reasons of those that failed; one that was asked for must have what it needs."""
    if asked:
        for attack in chosen:
            attack.check(evidence)
    scores, failures = {}, {}
    untouched = _versions(evidence)
    for attack in chosen:
        try:
            scores[attack.name] = attack(evidence)
        except Exception as error:  # an attack of the user's own raises what it likes
            if len(chosen) == 1:
                raise
            failures[attack.name] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        changed = [name for name, version in _versions(evidence).items() if version != untouched[name]]
        if changed:
            raise ValueError(
                f"the {attack.name} attack changed the evidence's {', '.join(changed)} in place, which other attacks "
                "see too; let it work on a copy (.clone())."
            )
    return scores, failures


def _versions(evidence: Evidence) -> dict[str, int]:
    """How often each tensor of the evidence was written to."""
    tensors = {name: value for name, value in vars(evidence).items() if isinstance(value, Tensor)}
    return {name: value._version for name, value in tensors.items() if not value.is_inference()}


def _attacks(attacks: Sequence[str | Attack] | None, shadows: ShadowSignals | None) -> list[Attack]:
    if attacks is None:
        attacks = ["loss"] if shadows is None else ["loss", "lira", "rmia"]
    return create_attacks(attacks)


def _check_numbers(confidence: float, seed: int, resamples: int, shadows: ShadowSignals | None) -> None:
    check_confidence(confidence)
    check_integer("seed", seed, low=0)
    check_integer("shadow_resamples", resamples, low=0)
    if resamples:
        check_pairs(None if shadows is None else shadows.membership, resamples)
