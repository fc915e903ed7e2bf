"""What every kind of audit shows: estimates by attack and metric, as values, tables, Markdown, HTML and pandas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, ClassVar

from lightning_cwrf.auditing.names import attack_name, failure_note, metric_name
from lightning_cwrf.auditing.tables import aligned, html_table, markdown_table, markdown_text, percent
from lightning_cwrf.auditing.values import FPR, Estimate
from lightning_cwrf.metrics.functional.intervals import normal_quantile

# The printed columns: a line has no space for more, and the others follow from these or need very many examples.
SHOWN = ("auroc", f"tpr_at_fpr_{FPR:g}", "advantage", "epsilon_lower_bound")


RAW = ("scores", "is_member", "targets", "losses")
"""The fields that are saved at the end of a file."""


class Findings:
    """Base of the results of audits; a subclass says what was audited, and what limits the numbers.

    Attributes:
        estimates: ``estimates[attack][metric]``.
        model_metrics: of the model itself, or the mean over models: train_accuracy, test_accuracy, train_loss,
            test_loss, loss_gap.
        confidence: of every interval.
        failures: attacks that could not run, with the reason; the other attacks are valid.
        attack_settings: how each attack was run, as text.
    """

    estimates: dict[str, dict[str, Estimate]]
    model_metrics: dict[str, Estimate]
    confidence: float
    failures: dict[str, str]
    attack_settings: dict[str, str]
    _audited: ClassVar[str] = "the model"

    def notes(self, metrics: Sequence[str] | None = None) -> list[str]:
        """The limits of these metrics (None: of all), remarks, and the attacks that failed; each once."""
        raise NotImplementedError

    def estimate(self, measure: str) -> Estimate:
        """One estimate by its name in :meth:`values`, such as ``"lira/auroc"`` or ``"test_accuracy"``."""
        attack, _, metric = measure.rpartition("/")
        return self.estimates[attack][metric] if attack else self.model_metrics[metric]

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
        raise NotImplementedError

    def _metric_notes(self, metrics: Sequence[str] | None) -> list[str]:
        """The notes of the estimates of these metrics (None: of all)."""
        return [
            f"{metric_name(name)}: {e.note}"
            for found in self.estimates.values()
            for name, e in found.items()
            if e.note and (metrics is None or name in metrics)
        ]

    def below_chance(self) -> list[str]:
        """The attacks whose AUC has an interval below 1/2; of several attacks, one widened by Bonferroni's rule.

        Where no attack has any signal, about (1 − confidence) / 2 of audits, at most, have such an attack by chance.
        """
        found = {name: estimates["auroc"] for name, estimates in self.estimates.items() if "auroc" in estimates}
        widened = normal_quantile(1 - (1 - self.confidence) / max(len(found), 1)) / normal_quantile(self.confidence)
        return [name for name, e in found.items() if 0.5 - e.value > widened * (e.interval.high - e.value)]

    def _below_chance_notes(self, question: str) -> list[str]:
        return [
            f"{attack_name(name)}: an AUC of {self.estimates[name]['auroc'].value:.3f} is below chance, interval "
            f"included: {question} By chance alone, an audit has this in at most about "
            f"{percent((1 - self.confidence) / 2)} of cases"
            for name in self.below_chance()
        ]

    def _failed(self) -> list[str]:
        return [failure_note(name, why) for name, why in self.failures.items()]

    def _model_rows(self) -> list[list[str]]:
        named = ([name.replace("_", " "), str(estimate)] for name, estimate in self.model_metrics.items())
        return [[self._audited, "value"], *named]

    def _rows(self) -> list[list[str]]:
        """A row per attack."""
        columns = [name for name in SHOWN if name in self._metrics()]
        rows = [["attack", *map(metric_name, columns), "p (AUC)"]]
        for attack, found in self.estimates.items():
            p = found["auroc"].p_value if "auroc" in found else None
            cells = (str(found.get(name, "not measured")) for name in columns)
            rows.append([attack_name(attack), *cells, "" if p is None else f"{p:.2g}"])
        return rows

    def _legend(self) -> list[str]:
        """How to read the rows, and the notes."""
        lines = [f"In brackets: {percent(self.confidence)} confidence interval."]
        rest = [name for name in self._metrics() if name not in SHOWN]
        lines += [f"Not shown, but in the estimates and the saved file: {', '.join(rest)}."] if rest else []
        return [*lines, *self.notes(SHOWN)]

    def _below_table(self) -> list[str]:
        return [line for line in (*self._over_shadows(), *self._legend()) if line]

    def _metrics(self) -> list[str]:
        return list(dict.fromkeys(name for found in self.estimates.values() for name in found))

    def _over_shadows(self) -> list[str]:
        """A line for each attack with intervals over the choice of shadow models."""
        lines = []
        for attack, found in self.estimates.items():
            shown = [
                f"{metric_name(name)} {Estimate(e.value, e.shadow_interval)}"
                for name, e in found.items()
                if e.shadow_interval is not None and name in SHOWN
            ]
            lines += [f"{attack_name(attack)} over shadow models too: {', '.join(shown)}"] if shown else []
        return ["", *lines] if lines else []
