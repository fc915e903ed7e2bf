"""An audit: the attacks run on one model's outputs, their measures with intervals, and what they were read from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_cwrf.attacks import (
    example_losses,
    lira,
    logit_signal,
    loss_threshold,
    rmia,
    true_class_probability,
)
from lightning_cwrf.data import check_disjoint
from lightning_cwrf.metrics import (
    AttackAdvantage,
    Interval,
    LossGap,
    MembershipAUROC,
    MembershipMetric,
    P1Score,
    TPRAtFPR,
)
from lightning_cwrf.metrics.functional import clopper_pearson
from lightning_cwrf.outputs import ModelOutputs
from lightning_cwrf.shadows.train import ShadowSignals

FPR = 1e-3


@dataclass(frozen=True)
class Estimate:
    """A value, its confidence interval, and what the sample size cannot show (or None)."""

    value: float
    interval: Interval
    note: str | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.interval.low:.3f}, {self.interval.high:.3f}]"


@dataclass(frozen=True)
class AuditResult:
    """What an audit found. It holds the raw scores, so that nothing must be computed again.

    Attributes:
        scores: each attack's score of every audited example, ``(n,)``, members first.
        is_member: bool ``(n,)``.
        losses: cross-entropy of each, ``(n,)``.
        estimates: ``estimates[attack][metric]``.
        model: measures of the model itself: train_accuracy, test_accuracy, train_loss, test_loss, loss_gap.
        confidence: of every interval.
        failures: attacks that could not run, with the reason; the others stand.
    """

    scores: dict[str, Tensor] = field(repr=False)
    is_member: Tensor = field(repr=False)
    losses: Tensor = field(repr=False)
    estimates: dict[str, dict[str, Estimate]]
    model: dict[str, Estimate]
    confidence: float
    failures: dict[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Every value under ``<attack>/<metric>``, and the model's own under their names."""
        flat = {f"{attack}/{name}": e.value for attack, found in self.estimates.items() for name, e in found.items()}
        return {**{name: estimate.value for name, estimate in self.model.items()}, **flat}

    def notes(self) -> list[str]:
        """What the numbers cannot show, each said once, and the attacks that failed."""
        said = [f"{name}: {e.note}" for found in self.estimates.values() for name, e in found.items() if e.note]
        return list(dict.fromkeys(said)) + [f"the {name} attack failed: {why}" for name, why in self.failures.items()]


def audit_outputs(
    members: ModelOutputs,
    nonmembers: ModelOutputs,
    *,
    shadows: ShadowSignals | None = None,
    population: ModelOutputs | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> AuditResult:
    """Run the attacks on a model's outputs: the loss attack, and with shadow models LiRA and (with a population) RMIA.

    Test accuracy and test loss are over every example the model never saw: the non-members and the population.

    Args:
        members: the audited model's outputs on its training examples.
        nonmembers: on examples it never saw.
        shadows: signals of shadow models whose pool holds every member and non-member.
        population: the audited model's outputs on ``shadows.population``.
        confidence: of the intervals.
        seed: of the bootstraps.

    Raises:
        ValueError: members and non-members overlap; an audited example is not in the shadow models' pool.
    """
    scores, failures = attack_scores(members, nonmembers, shadows=shadows, population=population)
    is_member = torch.arange(len(members) + len(nonmembers)) < len(members)
    losses = -scores["loss"]
    unseen = [nonmembers] if population is None else [nonmembers, population]
    model = _model_estimates(members, unseen, losses, is_member, confidence, seed)
    accuracy = model["test_accuracy"].value
    estimates = {
        attack: {
            name: _estimate(metric, score, is_member, confidence)
            for name, metric in attack_metrics(accuracy, seed).items()
        }
        for attack, score in scores.items()
    }
    return AuditResult(scores, is_member, losses, estimates, model, confidence, failures)


def attack_scores(
    members: ModelOutputs,
    nonmembers: ModelOutputs,
    *,
    shadows: ShadowSignals | None = None,
    population: ModelOutputs | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every attack's scores of the members and then the non-members, and the reasons of attacks that failed.

    Arguments and errors are those of :func:`audit_outputs`.
    """
    check_disjoint(members.digests, nonmembers.digests, "nonmembers")
    outputs = ModelOutputs(
        torch.cat([members.logits, nonmembers.logits]),
        torch.cat([members.targets, nonmembers.targets]),
        members.digests + nonmembers.digests,
    )
    scores = {"loss": loss_threshold(example_losses(outputs.logits, outputs.targets))}
    failures: dict[str, str] = {}
    if shadows is None:
        return scores, failures
    columns = _columns(outputs, shadows)
    for name in ("lira", "rmia"):
        try:
            scores[name] = _shadow_attack(name, outputs, shadows, columns, population)
        except ValueError as error:
            failures[name] = str(error)
    return scores, failures


def attack_metrics(accuracy: float, seed: int = 0) -> dict[str, MembershipMetric]:
    """The metrics of one attack, by the name they are logged under."""
    return {
        "auroc": MembershipAUROC(seed=seed),
        f"tpr_at_fpr_{FPR:g}": TPRAtFPR(FPR, seed=seed),
        "advantage": AttackAdvantage(seed=seed),
        "p1": P1Score(accuracy, seed=seed),
    }


def _shadow_attack(
    name: str, outputs: ModelOutputs, shadows: ShadowSignals, columns: Tensor, population: ModelOutputs | None
) -> Tensor:
    logits, membership = shadows.logits[:, columns], shadows.membership[:, columns]
    if name == "lira":
        target = logit_signal(outputs.logits, outputs.targets)
        return lira(target, logit_signal(logits, outputs.targets), membership)
    if population is None or shadows.population_logits is None:
        raise ValueError("RMIA needs a population; pass population= to train_shadows.")
    return rmia(
        true_class_probability(outputs.logits, outputs.targets),
        true_class_probability(logits, outputs.targets),
        membership,
        true_class_probability(population.logits, population.targets),
        true_class_probability(shadows.population_logits, population.targets),
    )


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


def _estimate(metric: MembershipMetric, scores: Tensor, is_member: Tensor, confidence: float) -> Estimate:
    metric.update(scores, is_member)
    return Estimate(float(metric.compute()), metric.interval(confidence), metric.note)


def _model_estimates(
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
    gap = LossGap(seed=seed)
    flags = torch.arange(len(train_losses) + len(unseen_losses)) < len(train_losses)
    return {
        "train_accuracy": _proportion(members.correct, confidence),
        "test_accuracy": _proportion(correct, confidence),
        "train_loss": _mean(train_losses, confidence),
        "test_loss": _mean(unseen_losses, confidence),
        "loss_gap": _estimate(gap, torch.cat([train_losses, unseen_losses]), flags, confidence),
    }


def _proportion(correct: Tensor, confidence: float) -> Estimate:
    hits = int(correct.sum())
    return Estimate(hits / len(correct), clopper_pearson(hits, len(correct), confidence))


def _mean(values: Tensor, confidence: float) -> Estimate:
    """A mean with its normal interval."""
    mean, error = float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("inf")
    reach = error * float(torch.special.ndtri(torch.tensor((1 + confidence) / 2, dtype=torch.float64)))
    return Estimate(mean, Interval(mean - reach, mean + reach))
