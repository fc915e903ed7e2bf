"""What an audit found: typed, printed, saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from lightning_cwrf._deprecated import renamed
from lightning_cwrf._version import __version__
from lightning_cwrf.auditing.decision import judged_measures, resolution
from lightning_cwrf.auditing.findings import RAW, Findings
from lightning_cwrf.auditing.saved import read_json, write_json
from lightning_cwrf.auditing.tables import aligned as aligned
from lightning_cwrf.auditing.tables import percent as percent
from lightning_cwrf.auditing.values import FPR as FPR
from lightning_cwrf.auditing.values import Estimate as Estimate
from lightning_cwrf.auditing.values import Exposed as Exposed
from lightning_cwrf.auditing.values import estimate_of
from lightning_cwrf.checks import check_integer
from lightning_cwrf.metrics.functional import membership_auroc

_FORMAT = "lightning_cwrf.AuditResult/2"
_JSON_NAMES = {"estimates": "attacks", "model_metrics": "model"}


@renamed(model="model_metrics")
@dataclass(frozen=True)
class AuditResult(Findings):
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
        examples: a digest of the audited examples, as they were read; empty in audits that were saved without it.
        weights: a digest of the audited weights (:func:`~lightning_cwrf.weights.weights_digest`); empty where it is not
            known, as in audits that were saved without it.
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
    examples: str = field(default="", repr=False)
    weights: str = field(default="", repr=False)

    def notes(self, metrics: Sequence[str] | None = None) -> list[str]:
        """The limits of these metrics (None: of all), remarks, and the attacks that failed; each once."""
        notes = [*self.remarks, *self._overlaps()]
        notes += self._metric_notes(metrics)
        if metrics is None or "auroc" in metrics:
            notes += self._below_chance_notes(
                "are members and non-members swapped, or is the membership of the shadow models inverted?"
            )
            notes.append(resolution(*self._sizes(), self.confidence, len(judged_measures(self.estimates))))
        return self._failed() + list(dict.fromkeys(notes))

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
            ValueError: the path has a suffix of weight files (``.safetensors``, ``.ckpt``, ``.pt``), or is a folder.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        raw = {name: own.pop(name) for name in RAW}
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
            attack: {name: estimate_of(e) for name, e in found.items()} for attack, found in content["attacks"].items()
        }
        content["model_metrics"] = {name: estimate_of(e) for name, e in content["model"].items()}
        # Fields of later versions have defaults, so that a file without them can be loaded.
        return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})

    def _size_line(self) -> str:
        members, nonmembers = self._sizes()
        return f"{members} members, {nonmembers} non-members"

    def _sizes(self) -> tuple[int, int]:
        members = int(self.is_member.sum())
        return members, len(self.is_member) - members

    def _overlaps(self) -> list[str]:
        done = {"drop": "were left out", "allow": "were kept"}.get(self.overlap_policy, "were found")
        return [
            f"{len(places)} examples of {name} are also in another set; they {done}"
            for name, places in self.overlap.items()
        ]

    def _scores(self, attack: str) -> Tensor:
        if attack not in self.scores:
            raise ValueError(f"this audit has no attack {attack!r}; it has {', '.join(self.scores)}.")
        return self.scores[attack]
