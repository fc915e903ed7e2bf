"""Thresholds on an audit, for continuous integration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_cwrf.attacks import create_attacks
from lightning_cwrf.auditing import AuditResult, Estimate, attack_metrics
from lightning_cwrf.commands.base import EXCEEDED, UsageError

MODEL_METRICS = ("train_accuracy", "test_accuracy", "train_loss", "test_loss", "loss_gap")


@dataclass(frozen=True)
class Gate:
    """``lira/tpr_at_fpr_0.001=0.05``: the largest value that is accepted."""

    name: str
    limit: float

    @property
    def attack(self) -> str | None:
        """The attack; None for a metric of the model itself."""
        return self.name.rpartition("/")[0] or None

    @property
    def metric(self) -> str:
        return self.name.rpartition("/")[2]


def add_gate_options(parser: Any) -> None:
    """``--fail-above`` and ``--judge``."""
    parser.add_argument(
        "--fail-above",
        type=list[str],
        default=[],
        metavar="METRIC=VALUE",
        help="exit with code 3 if a metric is above this, such as lira/tpr_at_fpr_0.001=0.05; may be repeated",
    )
    parser.add_argument(
        "--judge",
        type=str,
        default="bound",
        help="what must stay below: 'bound', the upper end of the metric's confidence interval, so that too little "
        "data fails rather than passes; or 'value', the point estimate, which little data leaves to chance",
    )


def explain_gate() -> str:
    """The metrics that a gate can name, as they are registered now."""
    return (
        "metrics for --fail-above:\n  ATTACK/METRIC, with METRIC one of\n  "
        + "\n  ".join(sorted(attack_metrics(0.5)))
        + f"\n  or, of the model itself, one of {', '.join(MODEL_METRICS)}"
    )


def parse_gates(texts: Sequence[str], judge: str, attacks: Sequence[str]) -> list[Gate]:
    """Read ``--fail-above``; ``attacks`` are those that will run.

    Raises:
        UsageError: a threshold that cannot be read, or on a metric that this audit does not compute.
    """
    if judge not in ("bound", "value"):
        raise UsageError(f"--judge must be 'bound' or 'value', not {judge!r}.")
    gates = []
    for text in texts:
        found = re.fullmatch(r"\s*([\w./-]+?)\s*=\s*([-+.\deE]+)\s*", text)
        if found is None:
            raise UsageError(f"--fail-above must be METRIC=VALUE, such as lira/tpr_at_fpr_0.001=0.05, not {text!r}.")
        try:
            gate = Gate(found[1], float(found[2]))
        except ValueError:
            raise UsageError(f"--fail-above {text}: {found[2]!r} is not a number.") from None
        _check_known(gate, attacks)
        gates.append(gate)
    return gates


def _check_known(gate: Gate, attacks: Sequence[str]) -> None:
    if gate.attack is None:
        if gate.metric not in MODEL_METRICS:
            raise UsageError(
                f"--fail-above {gate.name}: name an attack too, such as loss/{gate.metric}; metrics of the model "
                f"itself are {', '.join(MODEL_METRICS)}."
            )
        return
    if gate.attack not in attacks:
        create_attacks([gate.attack])  # names the attacks that exist
        hint = " It needs shadow models: pass --shadows." if gate.attack in ("lira", "rmia") else ""
        raise UsageError(
            f"--fail-above {gate.name}: this audit runs {', '.join(attacks)}, not {gate.attack}, and what was not "
            f"measured cannot pass.{hint}"
        )
    known = attack_metrics(0.5)
    if gate.metric not in known:
        raise UsageError(
            f"--fail-above {gate.name}: there is no metric {gate.metric!r}; available: {', '.join(known)}."
        )


def judged(gates: Sequence[Gate], result: AuditResult, judge: str) -> tuple[int, list[str]]:
    """The exit code, and a line for each threshold.

    Raises:
        ValueError: a metric was not measured, because its attack failed, or it has no upper bound.
    """
    lines, code = [], 0
    for gate in gates:
        estimate = _estimate(gate, result)
        bound = estimate.interval.high if judge == "bound" else estimate.value
        if math.isnan(bound):
            raise ValueError(f"--fail-above {gate.name}: the value is not a number, which cannot pass.")
        if math.isinf(bound):
            raise ValueError(
                f"--fail-above {gate.name}: this metric is a lower bound and has none above: pass --judge value."
            )
        above = bound > gate.limit
        what = "upper bound" if judge == "bound" else "value"
        code = EXCEEDED if above else code
        lines.append(f"{'FAIL' if above else 'pass'}  {gate.name} {estimate}: {what} {bound:.4g}, limit {gate.limit:g}")
        if above and judge == "bound" and estimate.value <= gate.limit:
            lines.append(
                "      the value itself is within the limit, but these examples cannot show it: audit with more "
                "non-members and members"
            )
    return code, lines


def _estimate(gate: Gate, result: AuditResult) -> Estimate:
    found: Mapping[str, Estimate] = (
        result.model_metrics if gate.attack is None else result.estimates.get(gate.attack, {})
    )
    if gate.metric not in found:
        why = result.failures.get(gate.attack or "", "it was not measured")
        raise ValueError(f"--fail-above {gate.name} cannot be judged: {why}")
    return found[gate.metric]
