"""What an audit found: typed, printed, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cwrf._deprecated import renamed, warn_renamed
from lightning_cwrf._version import __version__
from lightning_cwrf.auditing.decision import judged_measures, resolution
from lightning_cwrf.auditing.findings import RAW, Findings
from lightning_cwrf.auditing.saved import read_json, write_json
from lightning_cwrf.auditing.slices import Slices, column_of, slices_of
from lightning_cwrf.auditing.tables import aligned as aligned
from lightning_cwrf.auditing.tables import percent as percent
from lightning_cwrf.auditing.users import at_user_level
from lightning_cwrf.auditing.values import FPR as FPR
from lightning_cwrf.auditing.values import Estimate as Estimate
from lightning_cwrf.auditing.values import Exposed as Exposed
from lightning_cwrf.auditing.values import estimate_of
from lightning_cwrf.checks import check_integer
from lightning_cwrf.metrics.functional import benjamini_hochberg, conformal_p_values
from lightning_cwrf.metrics.functional.discoveries import fewest_nulls

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
    failures: dict[str, str] = field(default_factory=dict)
    overlap: dict[str, list[int]] = field(default_factory=dict, repr=False)
    overlap_policy: str = field(default="error", repr=False)
    remarks: list[str] = field(default_factory=list, repr=False)
    examples: str = field(default="", repr=False)
    weights: str = field(default="", repr=False)
    attack_settings: dict[str, str] = field(default_factory=dict, repr=False)

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

    def exposed(
        self, attack: str = "lira", count: int | None = None, target: int | None = None, *, fdr: float | None = None
    ) -> list[Exposed]:
        """The members that an attack finds most surely, the most exposed first.

        With ``fdr``, those whose score is higher than a non-member's would be, by conformal p-values and the rule of
        Benjamini and Hochberg (:func:`~lightning_cwrf.metrics.functional.conformal_p_values`): in the mean over audits,
        at most this share of the list are members that the attack cannot tell from non-members. It is assumed that the
        score of such a member is exchangeable with those of the non-members. An empty list does not say that nobody is
        exposed: with n non-members at least m / (fdr (n + 1)) of the m members must score above all of them.

        Args:
            attack: its name in this audit.
            count: how many at most; None: 20, and with ``fdr`` all that are found.
            target: members of this class only; None: all. False positive rates are over all non-members in both cases,
                but ``fdr`` compares with those of the class.
            fdr: the false discovery rate, such as 0.05; None: the list has the highest scores, whoever they belong to.

        Raises:
            TypeError: a count or class that is not an integer, an ``fdr`` that is no number.
            ValueError: an attack that is not in this audit; a negative count; an ``fdr`` out of range, or that so few
                non-members cannot show for any member.
        """
        if count is not None:
            check_integer("count", count, low=0)
        if target is not None:
            check_integer("target", target)
        scores = self._scores(attack)
        members, nonmembers = scores[self.is_member], scores[~self.is_member].sort().values
        order = members.argsort(descending=True, stable=True)
        if target is not None:
            order = order[self.targets[self.is_member][order] == target]
        if fdr is not None:
            nulls = nonmembers if target is None else scores[~self.is_member & (self.targets == target)]
            if len(nulls) < fewest_nulls(fdr):
                raise ValueError(
                    f"{len(nulls)} non-members cannot show a false discovery rate of {fdr:g} for any member, whatever "
                    f"its score: at least {fewest_nulls(fdr)} can."
                )
            order = order[benjamini_hochberg(conformal_p_values(members[order], nulls)) <= fdr * (1 + 1e-12)]
        order = order[: 20 if count is None and fdr is None else count]
        at_least = len(nonmembers) - torch.searchsorted(nonmembers, members[order])
        rates = (at_least.double() / len(nonmembers)).tolist()
        targets = self.targets[self.is_member][order].tolist()
        return [
            Exposed(i, target, score, rate)
            for i, target, score, rate in zip(order.tolist(), targets, members[order].tolist(), rates, strict=True)
        ]

    def slices(self, by: Any = "class", attack: str = "lira", *, fpr: float = FPR) -> Slices:
        """An attack's AUC and TPR on parts of the data: who leaks more than the whole.

        The intervals of all slices hold together (Bonferroni), and the p-values are adjusted for all tests (Holm). Each
        slice is attacked on its own: the threshold of its TPR is set on its own non-members.

        Args:
            by: ``"class"``; ``"loss_decile"``, tenths of all examples by loss, 1 with the lowest; or a column with a
                value for each audited example, members first, as :attr:`targets` is.
            attack: its name in this audit.
            fpr: of the TPR.

        Raises:
            ValueError: an attack that is not in this audit; a column of another length, or with missing values; no
                slice with both members and non-members; an FPR out of range.
        """
        column = column_of(by, self.targets, self.losses)
        scores = self._scores(attack)
        return slices_of(scores, self.is_member, column, attack=attack, confidence=self.confidence, fpr=fpr)

    def auc_by_class(self, attack: str = "lira") -> dict[int, float]:
        """The former name of ``slices("class")``: the AUC of each class that has both members and non-members."""
        warn_renamed("AuditResult.auc_by_class", 'AuditResult.slices("class")')
        found = self.slices("class", attack)
        return {each.value: each.estimates["auroc"].value for each in found.slices if each.estimates}

    def user_level(self, groups: Any, *, combine: str | Mapping[str, str] = "mean") -> AuditResult:
        """The audit of persons rather than examples: the scores of several examples of one person become one.

        With it the question is whether any of a person's data were trained on, and each person counts once, so that the
        intervals hold where examples of one person depend on each other. All examples of a person must be on one side;
        shadow models should have been trained with all examples of a person or with none.

        Args:
            groups: who each audited example belongs to, members first, as :attr:`targets` is.
            combine: ``"mean"`` of the scores, as user inference attacks do (Kandpal et al. 2024); ``"sum"``, the
                likelihood ratio of all examples together where scores are log-likelihood ratios of independent
                examples, as those of ``lira`` and ``bavaria`` online are; or by the name of the attack, such as
                ``{"lira": "sum"}``, and the mean for the others.

        Returns:
            An audit of as many members and non-members as there are persons on each side, in the order in which they
            first appear. Its losses are means, its targets a person's class, or −1 where that is not one. Metrics of
            the model itself are of examples still; P1 takes their accuracy as measured on the non-members alone.

        Raises:
            ValueError: a person on both sides; persons with visibly more examples on one side than on the other; groups
                of another length, or missing; a way to combine or an attack that does not exist; infinite scores of
                both signs for one person, whose sum does not exist.
        """
        fields, remark = at_user_level(
            groups,
            scores=self.scores,
            is_member=self.is_member,
            targets=self.targets,
            losses=self.losses,
            accuracy=self.model_metrics["test_accuracy"].value,
            confidence=self.confidence,
            combine=combine,
        )
        return replace(self, **fields, remarks=[*self.remarks, remark])

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
        """The scores of one attack, or a ValueError that lists those of this audit."""
        if attack not in self.scores:
            raise ValueError(f"this audit has no attack {attack!r}; it has {', '.join(self.scores)}.")
        return self.scores[attack]
