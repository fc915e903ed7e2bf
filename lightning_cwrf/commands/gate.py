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
from lightning_cwrf.weights.trained import GUESSES

MODEL_METRICS = ("train_accuracy", "test_accuracy", "train_loss", "test_loss", "loss_gap")
_HIGHER_IS_BETTER = ("train_accuracy", "test_accuracy")
_SHARES = ("auroc", "advantage", "balanced_accuracy", "p1", *_HIGHER_IS_BETTER)
"""Metrics in [0, 1], besides the TPR."""


@dataclass(frozen=True)
class Gate:
    """``lira/tpr_at_fpr_0.001=0.05``: the largest value that is accepted, or with ``below`` the smallest."""

    name: str
    limit: float
    below: bool = False

    @property
    def option(self) -> str:
        return "--fail-below" if self.below else "--fail-above"

    @property
    def sense(self) -> str:
        return "below" if self.below else "above"

    @property
    def attack(self) -> str | None:
        """The attack; None for a metric of the model itself."""
        return self.name.rpartition("/")[0] or None

    @property
    def metric(self) -> str:
        return self.name.rpartition("/")[2]


def add_gate_options(parser: Any) -> None:
    """``--fail-above``, ``--fail-below`` and ``--judge``."""
    parser.add_argument(
        "--fail-above",
        type=list[str],
        default=[],
        metavar="METRIC=VALUE",
        help="exit with code 3 if a metric is above this, such as lira/tpr_at_fpr_0.001=0.05; may be repeated",
    )
    parser.add_argument(
        "--fail-below",
        type=list[str],
        default=[],
        metavar="METRIC=VALUE",
        help="the same for metrics where more is better (test_accuracy, train_accuracy, p1): exit with code 3 if below",
    )
    parser.add_argument(
        "--judge",
        type=str,
        default="bound",
        help="what is compared: 'bound', the worse end of the metric's confidence interval, so that too little "
        "data fails rather than passes; or 'value', the point estimate, which little data leaves to chance",
    )


def explain_gate() -> str:
    """The metrics that a gate can name, as they are registered now."""
    return (
        "metrics for --fail-above, or for --fail-below where more is better (accuracies, p1):\n"
        "  ATTACK/METRIC, with METRIC one of\n  "
        + "\n  ".join(sorted(attack_metrics(0.5)))
        + f"\n  or, of the model itself, one of {', '.join(MODEL_METRICS)}"
    )


def parse_gates(options: Any, attacks: Sequence[str]) -> list[Gate]:
    """Read ``--fail-above`` and ``--fail-below``; ``attacks`` are those that will run.

    Raises:
        UsageError: a threshold that cannot be read, or on a metric that this audit does not compute.
    """
    if options.judge not in ("bound", "value"):
        raise UsageError(f"--judge must be 'bound' or 'value', not {options.judge!r}.")
    gates = [_gate(text, below=False) for text in options.fail_above]
    gates += [_gate(text, below=True) for text in options.fail_below]
    for gate in gates:
        _check_known(gate, attacks)
        _check_sense(gate)
    return gates


def _gate(text: str, *, below: bool) -> Gate:
    option = "--fail-below" if below else "--fail-above"
    found = re.fullmatch(r"\s*([\w./-]+?)\s*=\s*([-+.\w]+)\s*", text)
    if found is None:
        raise UsageError(f"{option} must be METRIC=VALUE, such as lira/tpr_at_fpr_0.001=0.05, not {text!r}.")
    try:
        gate = Gate(found[1], float(found[2]), below)
    except ValueError:
        raise UsageError(f"{option} {text}: {found[2]!r} is not a number.") from None
    if not math.isfinite(gate.limit):
        raise UsageError(f"{option} {text}: the limit must be finite; any value would pass this one.")
    if (gate.metric in _SHARES or gate.metric.startswith("tpr_at_fpr_")) and not 0 <= gate.limit <= 1:
        raise UsageError(f"{option} {text}: {gate.metric} is between 0 and 1, so its limit must be too.")
    return gate


def _check_known(gate: Gate, attacks: Sequence[str]) -> None:
    if gate.attack is None:
        if gate.metric not in MODEL_METRICS:
            raise UsageError(
                f"{gate.option} {gate.name}: name an attack too, such as loss/{gate.metric}; metrics of the model "
                f"itself are {', '.join(MODEL_METRICS)}."
            )
        return
    if gate.attack not in attacks:
        create_attacks([gate.attack])  # names the attacks that exist
        hint = {"lira": " It needs shadow models: pass --shadows.", "rmia": " It needs --shadows and --population."}
        raise UsageError(
            f"{gate.option} {gate.name}: this audit runs {', '.join(attacks)}, not {gate.attack}, and what was not "
            f"measured cannot pass.{hint.get(gate.attack, '')}"
        )
    known = attack_metrics(0.5)
    if gate.metric not in known:
        raise UsageError(
            f"{gate.option} {gate.name}: there is no metric {gate.metric!r}; available: {', '.join(known)}."
        )


def _check_sense(gate: Gate) -> None:
    """Raise for a limit on the side where the metric is good: it would let the worst models pass."""
    if gate.attack is None:
        higher: bool | None = gate.metric in _HIGHER_IS_BETTER
    else:
        higher = attack_metrics(0.5)[gate.metric].higher_is_better
    if higher is not None and higher is not gate.below:
        raise UsageError(
            f"{gate.option} {gate.name}: {'more' if higher else 'less'} of this metric is better; pass "
            f"{'--fail-below' if higher else '--fail-above'}."
        )


def judged(gates: Sequence[Gate], result: AuditResult, judge: str) -> tuple[int, list[str]]:
    """The exit code, and a line for each threshold.

    Raises:
        ValueError: a metric was not measured, because its attack failed, or it has no such bound; or the audit itself
            is doubtful.
    """
    lines, code = [], 0
    for gate in gates:
        estimate = _estimate(gate, result)
        worse = estimate.interval.low if gate.below else estimate.interval.high
        bound = worse if judge == "bound" else estimate.value
        if math.isnan(bound):
            raise ValueError(f"{gate.option} {gate.name}: the value is not a number, which cannot pass.")
        if math.isinf(bound):
            raise ValueError(
                f"{gate.option} {gate.name}: this metric is a lower bound and has none above: pass --judge value."
            )
        exceeds = bound < gate.limit if gate.below else bound > gate.limit
        what = f"{'lower' if gate.below else 'upper'} bound" if judge == "bound" else "value"
        code = EXCEEDED if exceeds else code
        lines.append(
            f"{'FAIL' if exceeds else 'pass'}  {gate.name} {estimate}: {what} {bound:.4g}, limit {gate.limit:g}"
        )
        within = estimate.value >= gate.limit if gate.below else estimate.value <= gate.limit
        if exceeds and within:
            lines.append(
                "      the value itself is within the limit, but these examples cannot show it: audit with more "
                "non-members and members"
            )
    if gates and code != EXCEEDED:
        lines += _soundness(gates, result)
    return code, lines


def _soundness(gates: Sequence[Gate], result: AuditResult) -> list[str]:
    """What to say beside thresholds that were kept; raises where low values are rather a mistake than a safe model."""
    below = sorted({gate.attack for gate in gates if gate.attack} & set(result.below_chance()))
    if below:
        raise ValueError(
            f"{below[0]} is below chance, which no real attack should be, so its thresholds cannot pass: are members "
            "and non-members swapped?"
        )
    swapped = [remark for remark in result.remarks if "swapped" in remark]
    if swapped:
        raise ValueError(f"the thresholds cannot be judged: {swapped[0]}")
    guesses = [remark for remark in result.remarks if remark.startswith(GUESSES)]
    if guesses and not any(gate.below and gate.metric in _HIGHER_IS_BETTER for gate in gates):
        raise ValueError(
            f"the thresholds cannot be judged: {guesses[0]} If a model this weak is good enough, say how accurate it "
            "must be at least, --fail-below test_accuracy=VALUE."
        )
    return [f"      but {remark}" for remark in guesses]


def _estimate(gate: Gate, result: AuditResult) -> Estimate:
    found: Mapping[str, Estimate] = (
        result.model_metrics if gate.attack is None else result.estimates.get(gate.attack, {})
    )
    if gate.metric not in found:
        why = result.failures.get(gate.attack or "", "it was not measured")
        raise ValueError(f"{gate.option} {gate.name} cannot be judged: {why}")
    return found[gate.metric]
