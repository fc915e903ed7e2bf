"""An audit: the attacks run on one model's outputs, their measures with intervals, and what they were read from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_cwrf._version import __version__
from lightning_cwrf.attacks import Attack, Evidence, create_attacks, example_losses
from lightning_cwrf.attacks.augmentation import default_views
from lightning_cwrf.attacks.resampling import check_pairs, shadow_bootstrap, without_shadows
from lightning_cwrf.data import Batches, check_disjoint
from lightning_cwrf.metrics import (
    AttackAdvantage,
    BalancedAccuracy,
    EpsilonLowerBound,
    Interval,
    LossGap,
    MembershipAUROC,
    MembershipMetric,
    P1Score,
    TPRAtFPR,
)
from lightning_cwrf.metrics.functional import clopper_pearson, membership_auroc, resolvable_auc
from lightning_cwrf.outputs import ModelOutputs, collect_inputs, collect_outputs, collect_view_logits
from lightning_cwrf.shadows.train import ShadowSignals

FPR = 1e-3
"""The false positive rate that tables show."""

FPRS = (1e-3, 1e-5)
# The printed columns: more do not fit a line, and the others follow from these or need more examples than most have.
_SHOWN = ("auroc", f"tpr_at_fpr_{FPR:g}", "advantage", "epsilon_lower_bound")
_FORMAT = "lightning_cwrf.AuditResult/1"


@dataclass(frozen=True)
class Estimate:
    """A value, its confidence interval, its p-value against chance, and what the sample size cannot show (or None).

    ``interval`` takes the shadow models as given; ``shadow_interval``, where it was asked for, is over other sets of
    shadow models too.
    """

    value: float
    interval: Interval
    note: str | None = None
    p_value: float | None = None
    shadow_interval: Interval | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.interval.low:.3f}, {self.interval.high:.3f}]"


class Exposed(NamedTuple):
    """A member that an attack finds: its place among the members, its class, its score, and at what price.

    ``false_positive_rate`` is the share of non-members that score at least as high.
    """

    member: int
    target: int
    score: float
    false_positive_rate: float


@dataclass(frozen=True)
class AuditResult:
    """What an audit found. It holds the raw scores, so that nothing must be computed again; ``print`` shows a table.

    Attributes:
        scores: each attack's score of every audited example, ``(n,)``, members first.
        is_member: bool ``(n,)``.
        targets: class indices ``(n,)``.
        losses: cross-entropy of each, ``(n,)``.
        estimates: ``estimates[attack][metric]``.
        model: measures of the model itself: train_accuracy, test_accuracy, train_loss, test_loss, loss_gap.
        confidence: of every interval.
        failures: attacks that could not run, with the reason; the others stand.
    """

    scores: dict[str, Tensor] = field(repr=False)
    is_member: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    losses: Tensor = field(repr=False)
    estimates: dict[str, dict[str, Estimate]]
    model: dict[str, Estimate]
    confidence: float
    failures: dict[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Every value under ``<attack>/<metric>``, and the model's own under their names."""
        flat = {f"{attack}/{name}": e.value for attack, found in self.estimates.items() for name, e in found.items()}
        return {**{name: estimate.value for name, estimate in self.model.items()}, **flat}

    def notes(self, metrics: Sequence[str] | None = None) -> list[str]:
        """What the numbers (of these metrics; None: of all) cannot show, said once, and the attacks that failed."""
        said = [
            f"{name}: {e.note}"
            for found in self.estimates.values()
            for name, e in found.items()
            if e.note and (metrics is None or name in metrics)
        ]
        if metrics is None or "auroc" in metrics:
            said.append(self._resolution())
        return list(dict.fromkeys(said)) + [f"the {name} attack failed: {why}" for name, why in self.failures.items()]

    def exposed(self, attack: str = "lira", count: int = 20) -> list[Exposed]:
        """The members that an attack finds most surely, worst first.

        Raises:
            ValueError: the audit has no such attack.
        """
        scores = self._scores(attack)
        members, nonmembers = scores[self.is_member], scores[~self.is_member].sort().values
        order = members.argsort(descending=True, stable=True)[:count]
        at_least = len(nonmembers) - torch.searchsorted(nonmembers, members[order])
        rates = (at_least.double() / len(nonmembers)).tolist()
        targets = self.targets[self.is_member][order].tolist()
        return [
            Exposed(i, target, score, rate)
            for i, target, score, rate in zip(order.tolist(), targets, members[order].tolist(), rates, strict=True)
        ]

    def auc_by_class(self, attack: str = "lira") -> dict[int, float]:
        """An attack's AUC on the examples of each class that has both members and non-members."""
        scores = self._scores(attack)
        found = {}
        for c in sorted(set(self.targets.tolist())):
            chosen = self.targets == c
            inside = self.is_member[chosen]
            if inside.any() and not inside.all():
                found[c] = float(membership_auroc(scores[chosen], inside))
        return found

    def save(self, path: str | PathLike[str]) -> Path:
        """Save as JSON (every number, for people and programs) and, beside it, as safetensors (the raw scores).

        Args:
            path: of the JSON file; the other takes its name with the ending ``.safetensors``.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            raise ValueError(f"{path} is to be the JSON file; its scores take the name with the ending .safetensors.")
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"scores/{name}": score for name, score in self.scores.items()}
        tensors |= {"is_member": self.is_member, "targets": self.targets, "losses": self.losses}
        save_file(
            {n: t.contiguous() for n, t in tensors.items()}, path.with_suffix(".safetensors"), {"format": _FORMAT}
        )
        content = {
            "format": _FORMAT,
            "version": __version__,
            "scores_digest": _digest(path.with_suffix(".safetensors")),
            "confidence": self.confidence,
            "model": {name: _plain(estimate) for name, estimate in self.model.items()},
            "attacks": {a: {n: _plain(e) for n, e in found.items()} for a, found in self.estimates.items()},
            "failures": self.failures,
            "notes": self.notes(),
        }
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | PathLike[str]) -> AuditResult:
        """Load what :meth:`save` saved.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: the file is not an audit, is damaged, or its raw scores are another's.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged or no JSON: {error}.") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a saved audit; AuditResult.save writes one.")
        if _digest(path.with_suffix(".safetensors")) != content.get("scores_digest"):
            raise ValueError(f"{path.with_suffix('.safetensors')} is damaged, or belongs to another audit than {path}.")
        with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        attacks = content["attacks"]
        return cls(
            scores={name: tensors[f"scores/{name}"] for name in attacks},
            is_member=tensors["is_member"],
            targets=tensors["targets"],
            losses=tensors["losses"],
            estimates={a: {n: _estimate_of(e) for n, e in found.items()} for a, found in attacks.items()},
            model={name: _estimate_of(e) for name, e in content["model"].items()},
            confidence=content["confidence"],
            failures=content["failures"],
        )

    def __str__(self) -> str:
        members, nonmembers = self._sizes()
        lines = [f"{members} members, {nonmembers} non-members"]
        lines += [f"{name.replace('_', ' ')}: {estimate}" for name, estimate in self.model.items()]
        every = list(dict.fromkeys(name for found in self.estimates.values() for name in found))
        columns = [name for name in every if name in _SHOWN]
        rows = [["attack", *columns, "p (AUC)"]]
        for attack, found in self.estimates.items():
            p = found["auroc"].p_value
            rows.append([attack, *(str(found[name]) for name in columns), "" if p is None else f"{p:.2g}"])
        lines += ["", *aligned(rows), *self._over_shadows(), ""]
        lines.append(f"In brackets: {self.confidence:.0%} confidence interval.")
        rest = [name for name in every if name not in _SHOWN]
        lines += [f"Not shown, but in the estimates and the saved file: {', '.join(rest)}."] if rest else []
        return "\n".join([*lines, *self.notes(_SHOWN)])

    def _sizes(self) -> tuple[int, int]:
        members = int(self.is_member.sum())
        return members, len(self.is_member) - members

    def _resolution(self) -> str:
        """What so many examples can tell at all."""
        members, nonmembers = self._sizes()
        least = resolvable_auc(members, nonmembers, self.confidence)
        auc = f"from an AUC of {least:.3f} on" if math.isfinite(least) else "at no AUC"
        return (
            f"{members} members and {nonmembers} non-members: an attack is told from chance {auc} (one-sided, at "
            f"{self.confidence:.0%} confidence); the smallest FPR that can be seen is {1 / nonmembers:.2g}"
        )

    def _over_shadows(self) -> list[str]:
        """A line for each attack that has intervals over other sets of shadow models."""
        lines = []
        for attack, found in self.estimates.items():
            shown = [
                f"{name} {Estimate(e.value, e.shadow_interval)}"
                for name, e in found.items()
                if e.shadow_interval is not None and name in _SHOWN
            ]
            lines += [f"{attack} over shadow models too: {', '.join(shown)}"] if shown else []
        return ["", *lines] if lines else []

    def _scores(self, attack: str) -> Tensor:
        if attack not in self.scores:
            raise ValueError(f"this audit has no attack {attack!r}; it has {', '.join(self.scores)}.")
        return self.scores[attack]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines whose columns begin at the same place.

    >>> aligned([["a", "b"], ["long", "c"]])
    ['a     b', 'long  c']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


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
        seed: of the bootstraps.
        shadow_resamples: replicates, better 100 or more, of a bootstrap over the choice of shadow models and examples
            for :attr:`Estimate.shadow_interval`; each runs every attack with shadow models once more. 0: none.

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
    _check_resamples(shadow_resamples, shadows)
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
        seed: of the bootstraps.
        extra: further fields of :class:`~lightning_cwrf.attacks.Evidence`, members before non-members.
        shadow_resamples: as for :func:`audit`.

    Raises:
        ValueError: members and non-members overlap; an audited example is not in the shadow models' pool; an attack
            that was asked for by name lacks what it needs; ``shadow_resamples`` as for :func:`audit`.
    """
    _check_resamples(shadow_resamples, shadows)
    scores, failures = attack_scores(
        members, nonmembers, shadows=shadows, population=population, attacks=attacks, extra=extra
    )
    is_member = torch.arange(len(members) + len(nonmembers)) < len(members)
    losses = torch.cat([example_losses(part.logits, part.targets) for part in (members, nonmembers)])
    unseen = [nonmembers] if population is None else [nonmembers, population]
    model = _model_estimates(members, unseen, losses, is_member, confidence, seed)
    accuracy = model["test_accuracy"].value
    estimates = {
        attack: {
            name: _estimate(metric, score, is_member, confidence)
            for name, metric in attack_metrics(accuracy, seed, confidence).items()
        }
        for attack, score in scores.items()
    }
    if shadow_resamples:
        evidence = _evidence(members, nonmembers, shadows, population, extra or {})
        for run in _attacks(attacks, shadows):
            if run.name in scores and _hangs_on_shadows(run, evidence, scores[run.name]):
                measured = attack_metrics(accuracy, seed, confidence)
                estimates[run.name] = _with_shadow_intervals(
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
    check_disjoint(members.digests, nonmembers.digests, "nonmembers")
    if population is not None:
        check_disjoint(members.digests, population.digests, "population")
        twice = len(set(nonmembers.digests).intersection(population.digests))
        if twice:
            raise ValueError(
                f"{twice} examples of the population are non-members too; it must be further data, or they count twice."
            )
    evidence = _evidence(members, nonmembers, shadows, population, extra or {})
    chosen = _attacks(attacks, shadows)
    if attacks is not None:
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


def attack_metrics(accuracy: float, seed: int = 0, confidence: float = 0.95) -> dict[str, MembershipMetric]:
    """The metrics of one attack, by the name they are logged under.

    They do not gather: in a distributed training every process audits all examples.
    """
    settings: dict[str, Any] = {"seed": seed, "sync_on_compute": False}
    return {
        "auroc": MembershipAUROC(**settings),
        **{f"tpr_at_fpr_{fpr:g}": TPRAtFPR(fpr, **settings) for fpr in FPRS},
        "advantage": AttackAdvantage(**settings),
        "balanced_accuracy": BalancedAccuracy(**settings),
        "p1": P1Score(accuracy, **settings),
        "epsilon_lower_bound": EpsilonLowerBound(confidence=confidence, **settings),
    }


def _attacks(attacks: Sequence[str | Attack] | None, shadows: ShadowSignals | None) -> list[Attack]:
    if attacks is None:
        attacks = ["loss"] if shadows is None else ["loss", "lira", "rmia"]
    return create_attacks(attacks)


def _evidence(
    members: ModelOutputs,
    nonmembers: ModelOutputs,
    shadows: ShadowSignals | None,
    population: ModelOutputs | None,
    extra: dict[str, Tensor],
) -> Evidence:
    outputs = ModelOutputs(
        torch.cat([members.logits, nonmembers.logits]),
        torch.cat([members.targets, nonmembers.targets]),
        members.digests + nonmembers.digests,
    )
    given: dict[str, Any] = dict(extra)
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


def _check_resamples(resamples: int, shadows: ShadowSignals | None) -> None:
    if resamples:
        check_pairs(None if shadows is None else shadows.membership, resamples)


def _hangs_on_shadows(attack: Attack, evidence: Evidence, scores: Tensor) -> bool:
    """Whether an attack needs the shadow models, or gives other scores where they are taken away."""
    if any(need.startswith("shadow") for need in attack.needs):
        return True
    return not torch.equal(attack(without_shadows(evidence)), scores)


def _with_shadow_intervals(
    found: dict[str, Estimate],
    attack: Attack,
    evidence: Evidence,
    is_member: Tensor,
    metrics: dict[str, MembershipMetric],
    confidence: float,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Give an attack's estimates their intervals over other shadow models: the value ± z standard deviations.

    It holds the interval over the examples alone (of a TPR of 0, all replicates are 0), and stays in the metric's
    range. A bound on ε gets none: it is a statement with a confidence of its own.
    """
    measured = {name: m for name, m in metrics.items() if not isinstance(m, EpsilonLowerBound)}
    statistics = {name: _statistic(metric) for name, metric in measured.items()}
    replicates = shadow_bootstrap(attack, evidence, is_member, statistics, resamples, seed=seed)
    done = dict(found)
    for name, metric in measured.items():
        (low, high), value = found[name].interval, found[name].value
        reach = _z(confidence) * float(replicates[name].std())
        bottom, top = metric.plot_lower_bound, metric.plot_upper_bound
        low, high = min(low, value - reach), max(high, value + reach)
        wide = Interval(low if bottom is None else max(bottom, low), high if top is None else min(top, high))
        done[name] = replace(found[name], shadow_interval=wide)
    return done


def _statistic(metric: MembershipMetric) -> Callable[[Tensor, Tensor], Tensor]:
    def value(scores: Tensor, is_member: Tensor) -> Tensor:
        metric.reset()
        metric.update(scores, is_member)
        found: Tensor = metric.compute()
        return found

    return value


def _z(confidence: float) -> float:
    """How many standard deviations a two-sided normal interval reaches."""
    return float(torch.special.ndtri(torch.tensor((1 + confidence) / 2, dtype=torch.float64)))


def _estimate(metric: MembershipMetric, scores: Tensor, is_member: Tensor, confidence: float) -> Estimate:
    metric.update(scores, is_member)
    return Estimate(float(metric.compute()), metric.interval(confidence), metric.note, metric.p_value())


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
    gap = LossGap(seed=seed, sync_on_compute=False)
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
    reach = error * _z(confidence)
    return Estimate(mean, Interval(mean - reach, mean + reach))


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _plain(estimate: Estimate) -> dict[str, Any]:
    """Of numbers that JSON has: an infinite bound is the text "inf"."""
    content = asdict(estimate)
    for name in ("interval", "shadow_interval"):
        bounds: Interval | None = getattr(estimate, name)
        content[name] = None if bounds is None else [str(bound) if math.isinf(bound) else bound for bound in bounds]
    return content


def _estimate_of(content: dict[str, Any]) -> Estimate:
    interval, over_shadows = (
        None if bounds is None else Interval(*map(float, bounds))
        for bounds in (content["interval"], content.get("shadow_interval"))  # older files have one interval alone
    )
    assert interval is not None
    return Estimate(content["value"], interval, content["note"], content["p_value"], over_shadows)
