"""What changed from one audit to another, in plain sentences, and what a comparison of audits amounts to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch

from lightning_cwrf.auditing import AuditResult, Estimate
from lightning_cwrf.report.table import MODEL_ROWS, compared, same_weights
from lightning_cwrf.report.verdict import joined, verdict


def conclusion(audits: Mapping[str, AuditResult]) -> list[str]:
    """What audits show, for a terminal: the verdict on each model, and what was gained from the first to the others.

    The same sentences as on the page.
    """
    lines = [f"{name}: {verdict(result).headline}" for name, result in audits.items()]
    return lines + [f"{one} → {other}: {gain(audits[one], audits[other])}" for one, other in compared_pairs(audits)]


def changes(audits: Mapping[str, AuditResult]) -> list[str]:
    """Each comparison of :func:`compared_pairs` with every measure that is lower or higher."""
    lines = []
    for one, other in compared_pairs(audits):
        before, after = audits[one], audits[other]
        caveat = ""
        if same_examples(before, after) and not (before.examples and after.examples):
            caveat = " Whether the two audits are of the same examples was compared by labels alone."
        if same_weights(before, after):
            caveat += " Both audits are of the same weights."
        lines.append(f"{one} → {other}: {gain(before, after)} {change(before, after)}{caveat}")
    return lines


def compared_pairs(audits: Mapping[str, AuditResult]) -> list[tuple[str, str]]:
    """The first model with each of the others, and those one after another: controls come in between."""
    first, *others = audits
    return [*((first, name) for name in others), *pairwise(others)]


def gain(before: AuditResult, after: AuditResult) -> str:
    """Whether a second model is shown to leak less than the first, and what became of its accuracy."""
    rows = [(label, direction(*pair)) for label, pair in compared([before, after]) if label not in _OWN]
    words = {word: [label for label, each in rows if each == word] for word in ("lower", "higher")}
    if not same_examples(before, after):
        privacy = (
            "Whether privacy was gained is not known: the two audits are of different examples, or read them "
            "differently."
        )
    elif "unknown" in (verdict(before).level, verdict(after).level):
        privacy = "Whether privacy was gained is not known: there is no verdict on one of the two models."
    elif all(word == "cannot be compared" for _, word in rows):
        privacy = "Whether privacy was gained is not known: the two audits have no attack in common."
    elif words["lower"] and words["higher"]:
        privacy = f"Gain and loss of privacy: {joined(words['lower'])} fell, but {joined(words['higher'])} rose."
    elif words["higher"]:
        privacy = f"Privacy was lost: {joined(words['higher'])} rose."
    elif words["lower"]:
        privacy = f"A gain in privacy was shown: {joined(words['lower'])} fell."
    else:
        privacy = "No gain in privacy was shown: no measure of an attack is lower by more than the intervals."
    return f"{privacy} {_accuracy(before, after)}"


def _accuracy(before: AuditResult, after: AuditResult) -> str:
    pair = [result.model_metrics.get("test_accuracy") for result in (before, after)]
    word = direction(*pair)
    if pair[0] is None or pair[1] is None or word == "cannot be compared":
        return "Test accuracies cannot be compared."
    said = {"lower": "fell", "higher": "rose"}.get(word, "went")
    overlap = ", and the intervals overlap" if said == "went" else ""
    return f"Test accuracy {said} from {pair[0].value:.3f} to {pair[1].value:.3f}{overlap}."


def direction(before: Estimate | None, after: Estimate | None) -> str:
    """What two intervals allow to say: "lower", "higher", "no difference shown" or "cannot be compared"."""
    if before is None or after is None:
        return "cannot be compared"
    if any(math.isnan(number) for each in (before, after) for number in (each.value, *each.interval)):
        return "cannot be compared"
    if after.interval.high < before.interval.low:
        return "lower"
    if after.interval.low > before.interval.high:
        return "higher"
    return "no difference shown"


def change(before: AuditResult, after: AuditResult) -> str:
    """Which measures of a second model are lower or higher than the first's: the attacks', then the model's own."""
    rows = [(label, direction(*pair)) for label, pair in compared([before, after])]
    attacks = _told([row for row in rows if row[0] not in _OWN], "measures of attacks", others=True)
    return " ".join([*attacks, *_told([row for row in rows if row[0] in _OWN], "measures of the model", others=False)])


def _told(rows: list[tuple[str, str]], what: str, *, others: bool) -> list[str]:
    """A sentence from labels and directions; ``others``: also of overlaps beside differences."""
    words: dict[str, list[str]] = {}
    for label, word in rows:
        words.setdefault(word, []).append(label)
    parts = [f"{joined(words[word])} {_is(words[word])} {word}" for word in ("lower", "higher") if word in words]
    if (same := words.get("no difference shown")) and (others or not parts):
        some = f"the other {what}" if parts else f"all {what}"
        parts.append(f"for {some if len(same) > 1 else same[0]} the intervals overlap")
    if lost := words.get("cannot be compared"):
        parts.append(f"{joined(lost)} cannot be compared")
    text = "; ".join(parts)
    return [f"{text[0].upper()}{text[1:]}."] if text else []


def same_examples(first: AuditResult, other: AuditResult) -> bool:
    """Whether two audits can be of the same examples: by number, classes and, where both have one, digest."""
    known = bool(first.examples and other.examples)
    labels = torch.equal(first.is_member, other.is_member) and torch.equal(first.targets, other.targets)
    return labels and (first.examples == other.examples or not known)


_OWN = set(MODEL_ROWS.values())


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
