"""An audit of a recipe: each shadow model is the target once, attacked with others of the same recipe."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_cwrf.attacks import Attack
from lightning_cwrf.attacks.resampling import check_pairs
from lightning_cwrf.auditing.attack_settings import settings_told
from lightning_cwrf.auditing.estimates import attack_metrics, depends_on_shadows
from lightning_cwrf.auditing.recipe_result import RecipeAudit
from lightning_cwrf.auditing.recipe_targets import Measures, RecipeTargets, in_groups, jackknives_of
from lightning_cwrf.auditing.run import WrittenEvidence, chosen_attacks, failure_of, run_attacks
from lightning_cwrf.auditing.values import Estimate
from lightning_cwrf.checks import check_confidence, check_flag, check_integer
from lightning_cwrf.metrics import Interval, MembershipMetric
from lightning_cwrf.metrics.base import METRICS
from lightning_cwrf.metrics.functional import CrossedJackknife, clopper_pearson
from lightning_cwrf.metrics.functional.roc import counted_once
from lightning_cwrf.shadows.outputs import ShadowOutputs


def audit_recipe(
    shadows: ShadowOutputs,
    *,
    attacks: Sequence[str | Attack] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> RecipeAudit:
    """Audit a way of training rather than one model: the mean of every measure over the models that it trained.

    Each shadow model is the target once. It is attacked with all others but the one that was trained on the other half
    of the pool: without both, every example is IN for exactly half of the models. With that one, members have one IN
    model less than non-members; without any leak, LiRA then has an AUC below 1/2.

    Nothing is trained. The errors cover the choice of the models and of the pool
    (:class:`~lightning_cwrf.metrics.functional.CrossedJackknife`); for them, every attack that uses shadow models runs
    again without each pair, about k² / 2 times. Bounds on ε have a confidence of their own and are left out.

    Args:
        shadows: what :func:`~lightning_cwrf.shadows.train_shadows` returns, at least 8 models. A part of the pool is
            audited as ``audit_recipe(shadows.part(examples))``.
        attacks: names, or results of :func:`~lightning_cwrf.attacks.create_attack`; those that need inputs cannot run.
            None: the loss attack, LiRA, and with a population RMIA.
        confidence: of the intervals.
        seed: of the groups of examples that the jackknife leaves out.
        progress: show a progress bar.

    Raises:
        TypeError: ``shadows`` is not what ``train_shadows`` returns.
        ValueError: fewer than 8 models; a pool that is too small; an attack that lacks what it needs.

    >>> audit_recipe([])
    Traceback (most recent call last):
    TypeError: shadows must be what train_shadows returns, not a list.
    """
    if not isinstance(shadows, ShadowOutputs):
        raise TypeError(f"shadows must be what train_shadows returns, not a {type(shadows).__name__}.")
    check_confidence(confidence)
    check_integer("seed", seed, low=0)
    check_flag("progress", progress)
    check_pairs(shadows.membership, 2)
    default = ["loss", "lira", "rmia"] if shadows.population is not None else ["loss", "lira"]
    chosen = chosen_attacks(default if attacks is None else attacks, with_shadows=True)
    targets = RecipeTargets.of(shadows, seed)
    scores: dict[str, Tensor] = {}
    jackknives = targets.of_models()
    measures: dict[str, MembershipMetric] = {}
    failures: dict[str, str] = {}
    for attack in chosen:
        attack.check(targets.evidence(0))
    with tqdm(total=len(chosen) * len(targets), desc="audit of the recipe", unit="attack", disable=not progress) as bar:
        for attack in chosen:
            try:
                scores[attack.name], found, metrics = _attacked(attack, targets, seed, bar.update)
            except WrittenEvidence:
                raise
            except Exception as error:  # a user's own attack may raise anything
                if len(chosen) == 1:
                    raise
                failures[attack.name] = failure_of(error)
                continue
            jackknives |= {f"{attack.name}/{name}": each for name, each in found.items()}
            measures |= {f"{attack.name}/{name}": each for name, each in metrics.items()}
    nonmembers = (~targets.membership).sum(1).tolist()
    estimates = {n: _estimate(n, each, confidence, measures.get(n), nonmembers) for n, each in jackknives.items()}
    result = RecipeAudit(
        scores=scores,
        is_member=targets.membership,
        targets=targets.targets,
        losses=targets.losses[:, : len(targets.targets)],
        estimates={
            a: {n.removeprefix(f"{a}/"): e for n, e in estimates.items() if n.startswith(f"{a}/")} for a in scores
        },
        model_metrics={name: each for name, each in estimates.items() if "/" not in name},
        confidence=confidence,
        jackknives=jackknives,
        failures=failures,
        remarks=targets.remarks(),
        data=targets.digest(),
        attack_settings={attack.name: settings_told(attack) for attack in chosen},
    )
    for remark in result.remarks:
        warnings.warn(remark, stacklevel=2)
    return result


def leak_metrics() -> list[str]:
    """The metrics that an audit of a recipe has for each attack, and that are lower the less a model leaks."""
    return [name for name, metric in _metrics(0.5, 0).items() if not metric.higher_is_better]


def _attacked(
    attack: Attack, targets: RecipeTargets, seed: int, on_done: Callable[[], Any]
) -> tuple[Tensor, dict[str, CrossedJackknife], dict[str, MembershipMetric]]:
    """The scores of one attack on every target, its measures, and the metrics that gave those of the first one."""
    pairs, examples = len(targets) // 2, len(targets.targets)
    every = torch.ones_like(targets.groups, dtype=torch.bool)
    scores, found = [], []
    without_pair: list[list[Measures]] = [[] for _ in range(pairs)]
    metrics = _Metrics(seed)
    for i in range(len(targets)):
        evidence = targets.evidence(i)
        given = evidence.with_models(targets.against(i))
        whole = run_attacks([attack], given, asked=True)[0][attack.name]

        def measured(kept: Tensor, scored: Tensor = whole, i: int = i) -> Measures:
            chosen = kept[:examples]
            return _values(metrics(targets.accuracy(i, kept)), scored[chosen], targets.membership[i][chosen])

        scores.append(whole)
        found.append(in_groups(measured, targets.groups))
        uses_shadows = depends_on_shadows(attack, given, whole)
        for pair in range(pairs):
            if pair == i // 2:
                continue
            less = attack(evidence.with_models(targets.against(i, pair))) if uses_shadows else whole
            without_pair[pair].append(measured(every, less) if uses_shadows else found[-1].whole)
        on_done()
    first = _metrics(targets.accuracy(0, every), seed)
    for metric in first.values():  # so that its interval and note are of these scores
        metric.update(scores[0], targets.membership[0])
    return torch.stack(scores), jackknives_of(found, without_pair), first


def _values(metrics: Mapping[str, MembershipMetric], scores: Tensor, is_member: Tensor) -> Measures:
    with counted_once():
        return {name: float(metric.value_of(scores, is_member)) for name, metric in metrics.items()}


def _metrics(accuracy: float, seed: int) -> dict[str, MembershipMetric]:
    return attack_metrics(accuracy, seed, bounds=False)


class _Metrics:
    """The metrics of an attack by the accuracy of the attacked model; those that do not use it are made once."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.known: dict[float, dict[str, MembershipMetric]] = {}
        self.first = _metrics(0.5, seed)

    def __call__(self, accuracy: float) -> dict[str, MembershipMetric]:
        if accuracy not in self.known:
            classes = [each for each in METRICS if each.uses_accuracy]
            own = attack_metrics(accuracy, self.seed, bounds=False, classes=classes)
            self.known[accuracy] = {name: own.get(name, metric) for name, metric in self.first.items()}
        return self.known[accuracy]


def _estimate(
    name: str, jackknife: CrossedJackknife, confidence: float, metric: MembershipMetric | None, nonmembers: list[int]
) -> Estimate:
    """``nonmembers``: of each model."""
    low, high = jackknife.interval(confidence)
    if metric is None:
        if not name.endswith("accuracy"):
            return Estimate(jackknife.value, Interval(low, high))
        if jackknife.error == 0:  # every model is right on all examples, or on none: as of one model
            fewest = min(nonmembers)
            low, high = clopper_pearson(round(jackknife.value * fewest), fewest, confidence)
        return Estimate(jackknife.value, _within(low, high, 0.0, 1.0))
    if jackknife.error == 0:  # every model has the same value, which shows no spread: as in the audit of one of them
        low, high = metric.interval(confidence)
    chances = [chance for each in nonmembers if (chance := metric.chance(each)) is not None]
    p = jackknife.p_value(sum(chances) / len(chances)) if chances else None
    return Estimate(
        jackknife.value, _within(low, high, metric.plot_lower_bound, metric.plot_upper_bound), metric.note, p
    )


def _within(low: float, high: float, bottom: float | None, top: float | None) -> Interval:
    return Interval(low if bottom is None else max(bottom, low), high if top is None else min(top, high))
