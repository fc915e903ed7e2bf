"""Estimates of the metrics of an attack and of a model, with intervals over examples and over shadow models."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_cwrf.attacks import Attack, Evidence, example_losses
from lightning_cwrf.attacks.resampling import check_pairs, shadow_bootstrap
from lightning_cwrf.auditing.values import Estimate
from lightning_cwrf.metrics import AuditContext, Interval, LossGap, MembershipMetric
from lightning_cwrf.metrics.base import METRICS
from lightning_cwrf.metrics.functional import clopper_pearson, mean_interval
from lightning_cwrf.metrics.functional.intervals import normal_quantile
from lightning_cwrf.metrics.functional.roc import counted_once
from lightning_cwrf.metrics.membership import FPRS as FPRS
from lightning_cwrf.outputs import ModelOutputs


def attack_metrics(
    accuracy: float,
    seed: int = 0,
    confidence: float = 0.95,
    *,
    accuracy_examples: int | None = None,
    bounds: bool = True,
    classes: Iterable[type[MembershipMetric]] | None = None,
) -> dict[str, MembershipMetric]:
    """Every registered metric as an audit uses it for one attack, by the name of the estimate.

    Args:
        accuracy: the model's test accuracy, for P1.
        seed: of the metrics that draw at random.
        confidence: of the metrics that are bounds.
        accuracy_examples: the number of examples that the accuracy was measured on. None: it is exact.
        bounds: also those that are bounds, which have a confidence of their own and cannot be averaged.
        classes: of the metrics. None: all that are registered.

    Raises:
        ValueError: two metrics give an estimate of the same name.
    """
    context = AuditContext(accuracy, accuracy_examples, confidence, seed)
    found: dict[str, MembershipMetric] = {}
    classes = METRICS if classes is None else classes
    for each in (each for each in classes if bounds or each.has_shadow_interval):
        metrics = each.for_audit(context)
        if twice := sorted(found.keys() & metrics.keys()):
            raise ValueError(f"{each.__name__}.for_audit gives {', '.join(twice)}, a name that another metric has.")
        found |= metrics
    return found


def depends_on_shadows(attack: Attack, evidence: Evidence, scores: Tensor) -> bool:
    """Whether an attack needs the shadow models, or its scores change without them."""
    if any(need.startswith("shadow") for need in attack.needs):
        return True
    return not torch.equal(attack(evidence.without_shadows()), scores)


def with_shadow_intervals(
    found: dict[str, Estimate],
    attack: Attack,
    evidence: Evidence,
    is_member: Tensor,
    metrics: dict[str, MembershipMetric],
    confidence: float,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Add intervals over other shadow models to an attack's estimates.

    Examples and shadow models are two sources of error, whose distances from the value add in quadrature: that of the
    bound over the examples, and z standard deviations of the replicates over the shadow models alone, scaled by
    √(pairs / (pairs − 1)). A bound on ε has no such interval: it has a confidence of its own.
    """
    measured = {name: metric for name, metric in metrics.items() if metric.has_shadow_interval}
    statistics = {name: metric.value_of for name, metric in measured.items()}
    with counted_once():
        replicates = shadow_bootstrap(attack, evidence, is_member, statistics, resamples, examples=False, seed=seed)
    pairs = check_pairs(evidence.membership, resamples)
    reach = normal_quantile(confidence) * math.sqrt(pairs / (pairs - 1))
    done = dict(found)
    for name, metric in measured.items():
        (low, high), value = found[name].interval, found[name].value
        spread = reach * float(replicates[name].std())
        bottom, top = metric.plot_lower_bound, metric.plot_upper_bound
        low, high = value - math.hypot(value - low, spread), value + math.hypot(high - value, spread)
        wide = Interval(low if bottom is None else max(bottom, low), high if top is None else min(top, high))
        done[name] = replace(found[name], shadow_interval=wide)
    return done


def estimates_of(
    metrics: dict[str, MembershipMetric], scores: Tensor, is_member: Tensor, confidence: float
) -> dict[str, Estimate]:
    """Every metric of an attack's scores, which are sorted once."""
    with counted_once():
        return {name: estimate(metric, scores, is_member, confidence) for name, metric in metrics.items()}


def estimate(metric: MembershipMetric, scores: Tensor, is_member: Tensor, confidence: float) -> Estimate:
    try:
        metric.update(scores, is_member)
        return Estimate(float(metric.compute()), metric.interval(confidence), metric.note, metric.p_value())
    except ValueError:  # which says what is wrong with the scores
        raise
    except Exception as error:  # a user's own metric may raise anything
        raise RuntimeError(f"the metric {type(metric).__name__} failed: {type(error).__name__}: {error}") from error


def model_estimates(
    members: ModelOutputs,
    unseen: list[ModelOutputs],
    losses: Tensor,
    is_member: Tensor,
    confidence: float,
    seed: int,
) -> dict[str, Estimate]:
    correct = torch.cat([part.correct for part in unseen])
    unseen_losses = torch.cat([example_losses(part.logits, part.targets) for part in unseen])
    train_losses = losses[is_member]
    gap = LossGap(seed=seed, sync_on_compute=False)
    flags = torch.arange(len(train_losses) + len(unseen_losses)) < len(train_losses)
    return {
        "train_accuracy": _proportion(members.correct, confidence),
        "test_accuracy": _proportion(correct, confidence),
        "train_loss": _mean(train_losses, confidence),
        "test_loss": _mean(unseen_losses, confidence),
        "loss_gap": estimate(gap, torch.cat([train_losses, unseen_losses]), flags, confidence),
    }


def _proportion(correct: Tensor, confidence: float) -> Estimate:
    hits = int(correct.sum())
    return Estimate(hits / len(correct), clopper_pearson(hits, len(correct), confidence))


def _mean(values: Tensor, confidence: float) -> Estimate:
    low, high = mean_interval(values, confidence)
    return Estimate(float(values.mean()), Interval(float(low), float(high)))
