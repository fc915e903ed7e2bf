"""What an audit of a recipe found: means over its models, with what the errors are estimated from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_cwrf._version import __version__
from lightning_cwrf.auditing.attack_settings import settings_differ
from lightning_cwrf.auditing.findings import RAW, Findings
from lightning_cwrf.auditing.saved import read_json, write_json
from lightning_cwrf.auditing.values import Estimate, estimate_of
from lightning_cwrf.metrics.functional import CrossedJackknife, Interval

_FORMAT = "lightning_cwrf.RecipeAudit/1"


@dataclass(frozen=True)
class Difference:
    """How much more one recipe has of a measure than another, over the same pool and membership.

    ``p_value`` is two-sided: the probability of so large a difference, in either direction, if there is none.
    """

    value: float
    interval: Interval
    p_value: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.interval.low:+.3f}, {self.interval.high:+.3f}], p = {self.p_value:.2g}"


@dataclass(frozen=True)
class RecipeAudit(Findings):
    """How a way of training leaks: every measure as a mean over models that were trained by it.

    Intervals cover other models of the same recipe on another pool of the same kind and size.

    Attributes:
        scores: each attack's scores ``(k, n)``: of every example of the pool, for each of the k models.
        is_member: bool ``(k, n)``.
        targets: class indices ``(n,)``.
        losses: cross-entropy ``(k, n)``.
        estimates: ``estimates[attack][metric]``, means over the models.
        model_metrics: train_accuracy, test_accuracy, train_loss, test_loss, loss_gap, likewise.
        confidence: of every interval.
        jackknives: what each error is estimated from, under the names of :meth:`values`.
        failures: attacks that could not run, with the reason.
        remarks: probable mistakes.
        data: a digest of the pool with its labels and membership, the population and the groups of examples. Recipes
            whose audits have the same are compared in pairs.
        attack_settings: how each attack was run, with all its settings, as text; empty in audits that were saved
            without it.
    """

    scores: dict[str, Tensor] = field(repr=False)
    is_member: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    losses: Tensor = field(repr=False)
    estimates: dict[str, dict[str, Estimate]]
    model_metrics: dict[str, Estimate]
    confidence: float
    jackknives: dict[str, CrossedJackknife] = field(repr=False)
    failures: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list, repr=False)
    data: str = field(default="", repr=False)
    attack_settings: dict[str, str] = field(default_factory=dict, repr=False)

    _audited = "mean over models"

    def __len__(self) -> int:
        return len(self.is_member)

    def minus(self, other: RecipeAudit, measure: str = "lira/auroc") -> Difference:
        """The paired difference of a measure, such as ``"lira/auroc"`` or ``"test_accuracy"``, from another recipe's.

        What both share, the pool and who is a member, cancels, so the interval is narrower than those of the two.

        Raises:
            TypeError: ``other`` is not a RecipeAudit.
            ValueError: another pool, membership, population or number of models; a measure that one of them lacks; an
                attack with other settings.
        """
        if not isinstance(other, RecipeAudit):
            raise TypeError(f"a recipe can be compared with a RecipeAudit, not with a {type(other).__name__}.")
        if len(self) != len(other):
            raise ValueError(
                f"the two recipes cannot be compared in pairs: one has {len(self)} models and the other {len(other)}. "
                "Audit both with as many."
            )
        if self.data != other.data:
            raise ValueError(
                "the two recipes cannot be compared in pairs: their shadow models have another pool, population or "
                "seed (labels count too), or the audits another seed or version. Train and audit both with the same."
            )
        if self.confidence != other.confidence:
            raise ValueError(
                f"the two audits have intervals of different confidence, {self.confidence:g} and {other.confidence:g}: "
                "audit both at one."
            )
        for audit in (self, other):
            if measure not in audit.jackknives:
                raise ValueError(f"there is no measure {measure!r}; there are {', '.join(audit.jackknives)}.")
        attack = measure.rpartition("/")[0]
        if settings_differ(self.attack_settings, other.attack_settings, [attack]):
            raise ValueError(
                f"the two audits ran different attacks under one name, {self.attack_settings[attack]} and "
                f"{other.attack_settings[attack]}: audit both with the same."
            )
        mine, others = self.jackknives[measure], other.jackknives[measure]
        difference = mine - others
        if 0 in (mine.error, others.error):
            return self._without_spread(other, measure, difference)
        return Difference(difference.value, difference.interval(self.confidence), difference.two_sided_p_value())

    def _without_spread(self, other: RecipeAudit, measure: str, difference: CrossedJackknife) -> Difference:
        """Of a measure that is the same in all models of a recipe, which does not say how far it is from the mean.

        The interval is from one estimate's end to the other's, both of which allow for that. Where it does not hold 0,
        the two estimates' intervals do not overlap, and the p-value is at most 1 − confidence; else nothing is shown.
        """
        mine, others = self.estimate(measure).interval, other.estimate(measure).interval
        interval = Interval(mine.low - others.high, mine.high - others.low)
        p = 1.0 if interval.low <= 0 <= interval.high else 1 - self.confidence
        return Difference(difference.value, interval, p)

    def notes(self, metrics: Sequence[str] | None = None) -> list[str]:
        """The limits of these metrics (None: of all), remarks, and the attacks that failed; each once."""
        notes = [*self._failed(), *self.remarks, *self._metric_notes(metrics)]
        if metrics is None or "auroc" in metrics:
            notes += self._below_chance_notes("is the membership of the models inverted?")
        return list(dict.fromkeys(notes))

    def save(self, path: str | PathLike[str]) -> Path:
        """Save as one JSON file: every number, and the raw scores at its end; as :meth:`AuditResult.save` does."""
        return write_json({"format": _FORMAT, "version": __version__, **self.content()}, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RecipeAudit:
        """Load what :meth:`save` saved.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not an audit of a recipe, is damaged, was changed, or is of another version.
        """
        return cls.of_content(read_json(path, _FORMAT))

    def content(self) -> dict[str, Any]:
        """The fields and notes as they are saved, raw scores last."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        raw = {name: own.pop(name) for name in RAW}
        return {**own, "notes": self.notes(), "raw": raw}

    @classmethod
    def of_content(cls, content: Mapping[str, Any]) -> RecipeAudit:
        """The audit of what :meth:`content` gave, as read from a file."""
        found = {**content, **content["raw"]}
        found["estimates"] = {
            attack: {name: estimate_of(e) for name, e in each.items()} for attack, each in found["estimates"].items()
        }
        found["model_metrics"] = {name: estimate_of(e) for name, e in found["model_metrics"].items()}
        found["jackknives"] = {
            name: CrossedJackknife(float(each["value"]), each["without_pair"], each["cells"])
            for name, each in found["jackknives"].items()
        }
        return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})

    def _size_line(self) -> str:
        models, examples = self.is_member.shape
        return (
            f"{models} models of one recipe, on halves of a pool of {examples}; each is attacked with the "
            f"{models - 2} others that are not of its pair"
        )
