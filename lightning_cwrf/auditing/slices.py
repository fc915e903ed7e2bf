"""An attack on parts of the audited data: by class, by loss, or by a column of one's own."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_cwrf.arrays import labels_of
from lightning_cwrf.auditing.decision import joint_level
from lightning_cwrf.auditing.estimates import estimate
from lightning_cwrf.auditing.names import attack_name, metric_name
from lightning_cwrf.auditing.tables import aligned, html_table, markdown_table, markdown_text, percent
from lightning_cwrf.auditing.values import Estimate
from lightning_cwrf.checks import check_number
from lightning_cwrf.metrics import MembershipAUROC, TPRAtFPR
from lightning_cwrf.metrics.functional import holm
from lightning_cwrf.metrics.functional.roc import counted_once


class Column(NamedTuple):
    """The distinct values of a column, in order, and which of them each example has, ``(n,)``."""

    name: str
    values: list[Any]
    groups: Tensor


@dataclass(frozen=True)
class Slice:
    """An attack on one part of the data.

    Attributes:
        value: of the column.
        members: their number.
        nonmembers: their number.
        estimates: ``auroc`` and ``tpr_at_fpr_…``, with intervals that hold for all slices together, and p-values that
            are adjusted for all tests. Empty where there are no members or no non-members.
    """

    value: Any
    members: int
    nonmembers: int
    estimates: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Slices:
    """An attack on each part of the data; ``print`` shows a table, and a sequence of :class:`Slice` is iterated."""

    by: str
    attack: str
    slices: list[Slice]
    confidence: float
    metrics: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, i: int) -> Slice:
        return self.slices[i]

    def leaking(self) -> list[Any]:
        """The values of the slices in which the attack beats guessing, by either measure, after the correction."""
        level = 1 - self.confidence
        return [s.value for s in self.slices if any(_p(e) <= level for e in s.estimates.values())]

    def to_pandas(self) -> Any:
        """A row per slice and metric of a ``pandas.DataFrame``; missing numbers are NaN.

        The columns are slice, members, nonmembers, metric, value, low, high, p_value (adjusted) and note.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas.") from error
        rows = []
        for each in self.slices:
            for name in self.metrics:
                e = each.estimates.get(name)
                numbers = (math.nan,) * 4 if e is None else (e.value, *e.interval, e.p_value)
                note = "no members or no non-members" if e is None else e.note
                rows.append((each.value, each.members, each.nonmembers, name, *numbers, note))
        columns = ["slice", "members", "nonmembers", "metric", "value", "low", "high", "p_value", "note"]
        return pd.DataFrame(rows, columns=columns)

    def to_markdown(self) -> str:
        """What ``print`` shows, as Markdown."""
        return "\n".join([*markdown_table(self._rows()), "", *(f"- {markdown_text(n)}" for n in self._notes())]) + "\n"

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{escape(note)}</li>" for note in self._notes())
        return f"<div>{html_table(self._rows())}<ul>{notes}</ul></div>"

    def __str__(self) -> str:
        return "\n".join([*aligned(self._rows()), "", *self._notes()])

    def _rows(self) -> list[list[str]]:
        heads = [head for name in self.metrics for head in (metric_name(name), "p")]
        rows = [[self.by, "members", "non-members", *heads]]
        for each in self.slices:
            row = [str(each.value), str(each.members), str(each.nonmembers)]
            for name in self.metrics:
                e = each.estimates.get(name)
                row += ["not measured", ""] if e is None else [str(e), f"{_p(e):.2g}"]
            rows.append(row)
        return rows

    def _notes(self) -> list[str]:
        measured = sum(bool(each.estimates) for each in self.slices)
        found = self.leaking()
        lines = [
            f"{attack_name(self.attack)} on slices by {self.by}. In brackets: intervals that hold for all {measured} "
            f"slices together at {percent(self.confidence)} (Bonferroni); p: against guessing, adjusted for all "
            f"{measured * len(self.metrics)} tests (Holm).",
            f"Better than guessing: {', '.join(map(str, found)) or 'in no slice'}.",
        ]
        return lines + list(dict.fromkeys(e.note for s in self.slices for e in s.estimates.values() if e.note))[:3]


def slices_of(
    scores: Tensor, is_member: Tensor, column: Column, *, attack: str, confidence: float, fpr: float
) -> Slices:
    """The slices by a column (:func:`column_of`) of an attack's scores."""
    check_number("fpr", fpr, low=0, high=1, low_open=True)
    name, values, groups = column
    whole = [(groups == i, int((groups == i)[is_member].sum())) for i in range(len(values))]
    made = [Slice(v, inside, int(chosen.sum()) - inside) for v, (chosen, inside) in zip(values, whole, strict=True)]
    usable = [i for i, each in enumerate(made) if each.members and each.nonmembers]
    if not usable:
        raise ValueError(f"no slice by {name} has both members and non-members; make fewer slices, of more examples.")
    joint = 1 - joint_level(confidence, len(usable))
    metrics = ("auroc", f"tpr_at_fpr_{fpr:g}")
    for i in usable:
        chosen = whole[i][0]
        with counted_once():
            found = [
                estimate(metric, scores[chosen], is_member[chosen], joint)
                for metric in (MembershipAUROC(sync_on_compute=False), TPRAtFPR(fpr, sync_on_compute=False))
            ]
        made[i] = replace(made[i], estimates=dict(zip(metrics, found, strict=True)))
    p_values = torch.tensor([_p(e) for i in usable for e in made[i].estimates.values()], dtype=torch.float64)
    adjusted = iter(holm(p_values).tolist())
    for i in usable:
        each = {n: replace(e, p_value=next(adjusted)) for n, e in made[i].estimates.items()}
        made[i] = replace(made[i], estimates=each)
    return Slices(name, attack, made, confidence, metrics)


def column_of(by: Any, targets: Tensor, losses: Tensor) -> Column:
    """The column by its name, or one's own.

    Raises:
        ValueError: another name, or as for :func:`~lightning_cwrf.arrays.labels_of`.
    """
    if not isinstance(by, str):
        name, labels = str(getattr(by, "name", None) or "column"), labels_of(by, len(targets), "by")
    elif by == "class":
        name, labels = by, targets.tolist()
    elif by == "loss_decile":
        edges = losses.double().quantile(torch.arange(1, 10, dtype=torch.float64) / 10)
        name, labels = "loss decile", (1 + torch.searchsorted(edges, losses.double())).tolist()
    else:
        raise ValueError(f"by must be 'class', 'loss_decile' or a column, not {by!r}.")
    values = list(dict.fromkeys(labels))
    with suppress(TypeError):  # of different types: in the order in which they appear
        values = sorted(values)
    numbers = {value: i for i, value in enumerate(values)}
    return Column(name, values, torch.tensor([numbers[label] for label in labels]))


def _p(each: Estimate) -> float:
    assert each.p_value is not None
    return each.p_value
