"""What an audit found: typed, printed, saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_cwrf._deprecated import renamed
from lightning_cwrf._version import __version__
from lightning_cwrf.auditing.saved import read_json, write_json
from lightning_cwrf.checks import check_integer
from lightning_cwrf.metrics import Interval
from lightning_cwrf.metrics.functional import membership_auroc, resolvable_auc

FPR = 1e-3
"""The false positive rate that tables show."""

# The printed columns: a line has no space for more, and the others follow from these or need very many examples.
_SHOWN = ("auroc", f"tpr_at_fpr_{FPR:g}", "advantage", "epsilon_lower_bound")
_FORMAT = "lightning_cwrf.AuditResult/2"
_RAW = ("scores", "is_member", "targets", "losses")
_JSON_NAMES = {"estimates": "attacks", "model_metrics": "model"}


@dataclass(frozen=True)
class Estimate:
    """A value, its confidence interval, its p-value against chance, and a note on the limits of the sample size.

    ``interval`` is for these very shadow models; ``shadow_interval``, if requested, also covers the choice of shadow
    models.
    """

    value: float
    interval: Interval
    note: str | None = None
    p_value: float | None = None
    shadow_interval: Interval | None = None

    def __str__(self) -> str:
        # A lower bound is an interval of its own.
        if math.isinf(self.interval.high) and math.isfinite(self.interval.low):
            return f"≥ {self.value:.3f}"
        return f"{self.value:.3f} [{self.interval.low:.3f}, {self.interval.high:.3f}]"


class Exposed(NamedTuple):
    """A member that an attack finds: its index among the members, its class and its score.

    ``false_positive_rate`` is the share of non-members with at least this score.
    """

    member: int
    target: int
    score: float
    false_positive_rate: float


@renamed(model="model_metrics")
@dataclass(frozen=True)
class AuditResult:
    """What an audit found, raw scores included; ``print`` shows a table.

    Attributes:
        scores: each attack's score of every audited example, ``(n,)``, members first.
        is_member: bool ``(n,)``.
        targets: class indices ``(n,)``.
        losses: cross-entropy of each, ``(n,)``.
        estimates: ``estimates[attack][metric]``.
        model_metrics: of the model itself: train_accuracy, test_accuracy, train_loss, test_loss, loss_gap.
        confidence: of every interval.
        failures: attacks that could not run, with the reason; the other attacks are valid.
        overlap: for ``"nonmembers"`` and ``"population"``, the indices (in the given data) of examples that are on
            another side too.
        overlap_policy: what was done with those: ``"drop"`` or ``"allow"``; ``"error"`` if there are none.
        remarks: probable mistakes in the audited data.
    """

    scores: dict[str, Tensor] = field(repr=False)
    is_member: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    losses: Tensor = field(repr=False)
    estimates: dict[str, dict[str, Estimate]]
    model_metrics: dict[str, Estimate]
    confidence: float
    failures: dict[str, str] = field(default_factory=dict)
    overlap: dict[str, list[int]] = field(default_factory=dict, repr=False)
    overlap_policy: str = field(default="error", repr=False)
    remarks: list[str] = field(default_factory=list, repr=False)

    def values(self) -> dict[str, float]:
        """Every value under ``<attack>/<metric>``, and the model's metrics under their names."""
        flat = {f"{attack}/{name}": e.value for attack, found in self.estimates.items() for name, e in found.items()}
        return {**{name: estimate.value for name, estimate in self.model_metrics.items()}, **flat}

    def notes(self, metrics: Sequence[str] | None = None) -> list[str]:
        """The limits of these metrics (None: of all), remarks, and the attacks that failed; each once."""
        notes = [*self.remarks, *self._overlaps()]
        notes += [
            f"{name}: {e.note}"
            for found in self.estimates.values()
            for name, e in found.items()
            if e.note and (metrics is None or name in metrics)
        ]
        if metrics is None or "auroc" in metrics:
            notes += self._below_chance()
            notes.append(self._resolution())
        return [f"the {name} attack failed: {why}" for name, why in self.failures.items()] + list(dict.fromkeys(notes))

    def exposed(self, attack: str = "lira", count: int = 20, target: int | None = None) -> list[Exposed]:
        """The members that an attack finds most surely, the most exposed first.

        Args:
            attack: its name in this audit.
            count: how many at most.
            target: members of this class only; None: all. False positive rates are over all non-members in both cases.

        Raises:
            TypeError: a count or class that is not an integer.
            ValueError: an attack that is not in this audit; a negative count.
        """
        check_integer("count", count, low=0)
        if target is not None:
            check_integer("target", target)
        scores = self._scores(attack)
        members, nonmembers = scores[self.is_member], scores[~self.is_member].sort().values
        order = members.argsort(descending=True, stable=True)
        if target is not None:
            order = order[self.targets[self.is_member][order] == target]
        order = order[:count]
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
        """Save as one JSON file: every number, for people and programs, and the raw scores at its end.

        The file is written completely or not at all, at exactly this path. It holds a digest, by which :meth:`load`
        rejects a file that was changed.

        Args:
            path: of the file, usually ``….json``.

        Raises:
            ValueError: the path has a suffix of weight files (``.safetensors``, ``.ckpt``, ``.pt``).
        """
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        raw = {name: own.pop(name) for name in _RAW}
        numbers = {_JSON_NAMES.get(name, name): value for name, value in own.items()}
        head = {"format": _FORMAT, "version": __version__}
        return write_json({**head, **numbers, "notes": self.notes(), "raw": raw}, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> AuditResult:
        """Load what :meth:`save` saved.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not an audit, is damaged, was changed, or has the format of another version.
        """
        content = read_json(path, _FORMAT)
        content |= content.pop("raw")
        content["estimates"] = {
            attack: {name: _estimate_of(e) for name, e in found.items()} for attack, found in content["attacks"].items()
        }
        content["model_metrics"] = {name: _estimate_of(e) for name, e in content["model"].items()}
        # Fields of later versions have defaults, so that a file without them can be loaded.
        return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})

    def __str__(self) -> str:
        members, nonmembers = self._sizes()
        lines = [f"{members} members, {nonmembers} non-members"]
        lines += [f"{name.replace('_', ' ')}: {estimate}" for name, estimate in self.model_metrics.items()]
        every = list(dict.fromkeys(name for found in self.estimates.values() for name in found))
        columns = [name for name in _SHOWN if name in every]
        rows = [["attack", *columns, "p (AUC)"]]
        for attack, found in self.estimates.items():
            p = found["auroc"].p_value
            rows.append([attack, *(str(found[name]) for name in columns), "" if p is None else f"{p:.2g}"])
        lines += ["", *aligned(rows), *self._over_shadows(), ""]
        lines.append(f"In brackets: {percent(self.confidence)} confidence interval.")
        rest = [name for name in every if name not in _SHOWN]
        lines += [f"Not shown, but in the estimates and the saved file: {', '.join(rest)}."] if rest else []
        return "\n".join([*lines, *self.notes(_SHOWN)])

    def _sizes(self) -> tuple[int, int]:
        members = int(self.is_member.sum())
        return members, len(self.is_member) - members

    def _resolution(self) -> str:
        """What can be resolved with so many examples."""
        members, nonmembers = self._sizes()
        least = resolvable_auc(members, nonmembers, self.confidence)
        auc = f"an AUC of at least {least:.3f}" if math.isfinite(least) else "no AUC"
        return (
            f"{members} members and {nonmembers} non-members: {auc} is significantly better than chance (one-sided, at "
            f"{percent(self.confidence)} confidence); the smallest FPR that can be seen is {1 / nonmembers:.2g}"
        )

    def _below_chance(self) -> list[str]:
        """A line for each attack whose AUC is below 1/2 by more than twice the upper half of its interval."""
        found = {name: estimates["auroc"] for name, estimates in self.estimates.items() if "auroc" in estimates}
        return [
            f"{name}: an AUC of {e.value:.3f} is below chance, which no real attack should give: are members and "
            "non-members swapped, or is the membership of the shadow models inverted?"
            for name, e in found.items()
            if 0.5 - e.value > 2 * (e.interval.high - e.value)
        ]

    def _overlaps(self) -> list[str]:
        done = {"drop": "were left out", "allow": "were kept"}.get(self.overlap_policy, "were found")
        return [
            f"{len(places)} examples of {name} are also in another set; they {done}"
            for name, places in self.overlap.items()
        ]

    def _over_shadows(self) -> list[str]:
        """A line for each attack with intervals over the choice of shadow models."""
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
    """Rows of cells as lines with aligned columns.

    >>> aligned([["a", "b"], ["long", "c"]])
    ['a     b', 'long  c']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def percent(share: float) -> str:
    """A share as a percentage; 0.999 must not become 100%.

    >>> percent(0.95), percent(0.999)
    ('95%', '99.9%')
    """
    return f"{100 * share:.4g}%"


def _estimate_of(content: dict[str, Any]) -> Estimate:
    interval, over_shadows = (
        None if bounds is None else Interval(*map(float, bounds))
        for bounds in (content["interval"], content["shadow_interval"])
    )
    assert interval is not None
    p_value = content["p_value"]
    return Estimate(
        float(content["value"]),
        interval,
        content["note"],
        None if p_value is None else float(p_value),
        over_shadows,
    )
