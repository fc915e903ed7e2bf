"""What an audit found: typed, printed, saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cwrf._deprecated import renamed
from lightning_cwrf._version import __version__
from lightning_cwrf.auditing.decision import judged_measures, resolution
from lightning_cwrf.auditing.names import attack_name, metric_name
from lightning_cwrf.auditing.saved import read_json, write_json
from lightning_cwrf.auditing.tables import aligned as aligned
from lightning_cwrf.auditing.tables import html_table, markdown_table, markdown_text
from lightning_cwrf.auditing.tables import percent as percent
from lightning_cwrf.auditing.values import FPR as FPR
from lightning_cwrf.auditing.values import Estimate as Estimate
from lightning_cwrf.auditing.values import Exposed as Exposed
from lightning_cwrf.auditing.values import estimate_of
from lightning_cwrf.checks import check_integer
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.metrics.functional.intervals import normal_quantile

# The printed columns: a line has no space for more, and the others follow from these or need very many examples.
_SHOWN = ("auroc", f"tpr_at_fpr_{FPR:g}", "advantage", "epsilon_lower_bound")
_FORMAT = "lightning_cwrf.AuditResult/2"
_RAW = ("scores", "is_member", "targets", "losses")
_JSON_NAMES = {"estimates": "attacks", "model_metrics": "model"}


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
        examples: a digest of the audited examples, as they were read; empty in audits that were saved without it.
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

    def values(self) -> dict[str, float]:
        """Every value under ``<attack>/<metric>``, and the model's metrics under their names."""
        flat = {f"{attack}/{name}": e.value for attack, found in self.estimates.items() for name, e in found.items()}
        return {**{name: estimate.value for name, estimate in self.model_metrics.items()}, **flat}

    def bounds(self) -> dict[str, float]:
        """The finite bounds of every interval, under the names of :meth:`values` with ``_low`` and ``_high`` appended.

        A value that is itself a lower bound, such as that on ε, has none.
        """
        found = [("", self.model_metrics), *((f"{attack}/", each) for attack, each in self.estimates.items())]
        return {
            f"{prefix}{name}_{side}": bound
            for prefix, estimates in found
            for name, estimate in estimates.items()
            for side, bound in zip(("low", "high"), estimate.interval, strict=True)
            if math.isfinite(bound) and not estimate.is_lower_bound
        }

    def notes(self, metrics: Sequence[str] | None = None) -> list[str]:
        """The limits of these metrics (None: of all), remarks, and the attacks that failed; each once."""
        notes = [*self.remarks, *self._overlaps()]
        notes += [
            f"{metric_name(name)}: {e.note}"
            for found in self.estimates.values()
            for name, e in found.items()
            if e.note and (metrics is None or name in metrics)
        ]
        if metrics is None or "auroc" in metrics:
            notes += [
                f"{attack_name(name)}: an AUC of {self.estimates[name]['auroc'].value:.3f} is below chance, interval "
                "included: are members and non-members swapped, or is the membership of the shadow models inverted? By "
                f"chance alone, an audit has this in at most about {percent((1 - self.confidence) / 2)} of cases"
                for name in self.below_chance()
            ]
            notes.append(resolution(*self._sizes(), self.confidence, len(judged_measures(self.estimates))))
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
            ValueError: the path has a suffix of weight files (``.safetensors``, ``.ckpt``, ``.pt``), or is a folder.
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
            attack: {name: estimate_of(e) for name, e in found.items()} for attack, found in content["attacks"].items()
        }
        content["model_metrics"] = {name: estimate_of(e) for name, e in content["model"].items()}
        # Fields of later versions have defaults, so that a file without them can be loaded.
        return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})

    def to_markdown(self) -> str:
        """What ``print`` shows, as Markdown: two tables, and the notes as a list."""
        lines = [f"{self._size_line()}.", "", *markdown_table(self._model_rows()), "", *markdown_table(self._rows())]
        lines += ["", *(f"- {markdown_text(line)}" for line in self._below_table())]
        return "\n".join(lines) + "\n"

    def to_pandas(self) -> Any:
        """Every estimate as a row of a ``pandas.DataFrame``.

        The columns are attack (None for the metrics of the model itself), metric, value, low, high, p_value,
        shadow_low, shadow_high and note.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas.") from error
        found = [(None, self.model_metrics), *self.estimates.items()]
        none = (math.nan, math.nan)
        rows = [
            (attack, name, e.value, *e.interval, e.p_value, *(e.shadow_interval or none), e.note)
            for attack, estimates in found
            for name, e in estimates.items()
        ]
        columns = ["attack", "metric", "value", "low", "high", "p_value", "shadow_low", "shadow_high", "note"]
        frame = pd.DataFrame(rows, columns=columns)
        return frame.astype(dict.fromkeys(columns[2:-1], "float64"))

    def _repr_html_(self) -> str:
        """The tables and notes of ``print`` for a notebook, in its own colours."""
        notes = "".join(f"<li>{escape(line)}</li>" for line in self._below_table())
        tables = "".join(html_table(rows) for rows in (self._model_rows(), self._rows()))
        return f"<div><p>{self._size_line()}</p>{tables}<ul>{notes}</ul></div>"

    def __str__(self) -> str:
        lines = [self._size_line(), *(f"{name}: {estimate}" for name, estimate in self._model_rows()[1:])]
        return "\n".join([*lines, "", *aligned(self._rows()), *self._over_shadows(), "", *self._legend()])

    def _size_line(self) -> str:
        members, nonmembers = self._sizes()
        return f"{members} members, {nonmembers} non-members"

    def _model_rows(self) -> list[list[str]]:
        named = ([name.replace("_", " "), str(estimate)] for name, estimate in self.model_metrics.items())
        return [["the model", "value"], *named]

    def _rows(self) -> list[list[str]]:
        """A row per attack."""
        columns = [name for name in _SHOWN if name in self._metrics()]
        rows = [["attack", *map(metric_name, columns), "p (AUC)"]]
        for attack, found in self.estimates.items():
            p = found["auroc"].p_value if "auroc" in found else None
            cells = (str(found.get(name, "not measured")) for name in columns)
            rows.append([attack_name(attack), *cells, "" if p is None else f"{p:.2g}"])
        return rows

    def _legend(self) -> list[str]:
        """How to read the rows, and the notes."""
        lines = [f"In brackets: {percent(self.confidence)} confidence interval."]
        rest = [name for name in self._metrics() if name not in _SHOWN]
        lines += [f"Not shown, but in the estimates and the saved file: {', '.join(rest)}."] if rest else []
        return [*lines, *self.notes(_SHOWN)]

    def _below_table(self) -> list[str]:
        return [line for line in (*self._over_shadows(), *self._legend()) if line]

    def _metrics(self) -> list[str]:
        return list(dict.fromkeys(name for found in self.estimates.values() for name in found))

    def _sizes(self) -> tuple[int, int]:
        members = int(self.is_member.sum())
        return members, len(self.is_member) - members

    def below_chance(self) -> list[str]:
        """The attacks whose AUC has an interval below 1/2; of several attacks, one widened by Bonferroni's rule.

        Where no attack has any signal, about (1 − confidence) / 2 of audits, at most, have such an attack by chance.
        """
        found = {name: estimates["auroc"] for name, estimates in self.estimates.items() if "auroc" in estimates}
        widened = normal_quantile(1 - (1 - self.confidence) / max(len(found), 1)) / normal_quantile(self.confidence)
        return [name for name, e in found.items() if 0.5 - e.value > widened * (e.interval.high - e.value)]

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
                f"{metric_name(name)} {Estimate(e.value, e.shadow_interval)}"
                for name, e in found.items()
                if e.shadow_interval is not None and name in _SHOWN
            ]
            lines += [f"{attack_name(attack)} over shadow models too: {', '.join(shown)}"] if shown else []
        return ["", *lines] if lines else []

    def _scores(self, attack: str) -> Tensor:
        if attack not in self.scores:
            raise ValueError(f"this audit has no attack {attack!r}; it has {', '.join(self.scores)}.")
        return self.scores[attack]
