"""What an audit found: typed, printed, saved and loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_cwrf._version import __version__
from lightning_cwrf.metrics import Interval
from lightning_cwrf.metrics.functional import membership_auroc, resolvable_auc

FPR = 1e-3
"""The false positive rate that tables show."""

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
        if math.isinf(self.interval.high):  # a lower bound is an interval of its own
            return f"≥ {self.value:.3f}"
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
        return [f"the {name} attack failed: {why}" for name, why in self.failures.items()] + list(dict.fromkeys(said))

    def exposed(self, attack: str = "lira", count: int = 20, target: int | None = None) -> list[Exposed]:
        """The members that an attack finds most surely, worst first.

        Args:
            attack: its name in this audit.
            count: how many at most.
            target: of this class alone; None: of all. False positive rates are over all non-members either way.

        Raises:
            ValueError: the audit has no such attack.
        """
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
