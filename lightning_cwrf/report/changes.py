"""What changed from one audit to another, in plain sentences, and what a comparison of audits amounts to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch

from lightning_cwrf.auditing import AuditResult, Estimate, RecipeAudit
from lightning_cwrf.auditing.attack_settings import settings_differ
from lightning_cwrf.auditing.decision import joint_level
from lightning_cwrf.report.table import MODEL_ROWS, AnyAudit, Row, compared, same_weights
from lightning_cwrf.report.verdict import joined, verdict

PAIRED = (
    "Of two recipes with the same pool, “lower” and “higher” are said where the paired difference has a p-value of at "
    "most (1 − confidence) divided by the number of measures in the comparison: all of them together raise a false "
    "alarm in at most the share 1 − confidence of comparisons. Elsewhere there may be a difference or none: these "
    "models cannot tell."
)
OVERLAP = (
    "Of other audits, “lower” and “higher” are said only where the two intervals do not overlap. Where they do, there "
    "may be a difference or none: these audits cannot tell. A difference between two trainings is not yet one between "
    "two methods: for that, repeat both with other seeds, or audit the recipes over one pool."
)


class Change(NamedTuple):
    """A measure from one audit to another.

    ``word`` is "lower", "higher", "no difference shown" or "cannot be compared"; ``difference`` is that of two recipes
    in pairs, as text.
    """

    label: str
    word: str
    difference: str = ""


def conclusion(audits: Mapping[str, AnyAudit]) -> list[str]:
    """What audits show, for a terminal: the verdict on each model, and what was gained from the first to the others.

    The same sentences as on the page.
    """
    lines = [f"{name}: {verdict(result).headline}" for name, result in audits.items()]
    return lines + [f"{one} → {other}: {gain(audits[one], audits[other])}" for one, other in compared_pairs(audits)]


def changes(audits: Mapping[str, AnyAudit]) -> list[str]:
    """Each comparison of :func:`compared_pairs` with every measure that is lower or higher."""
    lines = []
    for one, other in compared_pairs(audits):
        before, after = audits[one], audits[other]
        caveat = ""
        if isinstance(before, AuditResult) and isinstance(after, AuditResult):
            if same_examples(before, after) and not (before.examples and after.examples):
                caveat = " Whether the two audits are of the same examples was compared by labels alone."
            if same_weights(before, after):
                caveat += " Both audits are of the same weights."
        lines.append(f"{one} → {other}: {gain(before, after)} {change(before, after)}{caveat}")
    return lines


def compared_pairs(audits: Mapping[str, AnyAudit]) -> list[tuple[str, str]]:
    """The first model with each of the others, and those one after another: controls come in between."""
    first, *others = audits
    return [*((first, name) for name in others), *pairwise(others)]


def gain(before: AnyAudit, after: AnyAudit) -> str:
    """Whether a second model is shown to leak less than the first, and what became of its accuracy."""
    found = [each for each in measured_changes(before, after) if each.label not in _OWN]
    words = {word: [each.label for each in found if each.word == word] for word in ("lower", "higher")}
    if not same_examples(before, after):
        privacy = (
            "Whether privacy was gained is not known: the two audits are of different examples, or read them "
            "differently."
        )
    elif "unknown" in (verdict(before).level, verdict(after).level):
        privacy = "Whether privacy was gained is not known: there is no verdict on one of the two models."
    elif all(each.word == "cannot be compared" for each in found):
        privacy = "Whether privacy was gained is not known: the two audits have no attack in common."
    elif words["lower"] and words["higher"]:
        privacy = f"Gain and loss of privacy: {joined(words['lower'])} fell, but {joined(words['higher'])} rose."
    elif words["higher"]:
        privacy = f"Privacy was lost: {joined(words['higher'])} rose."
    elif words["lower"]:
        privacy = f"A gain in privacy was shown: {joined(words['lower'])} fell."
    else:
        together = f"the error of the difference, which allows for {len(found) + len(_OWN)} measures together"
        beyond = together if paired(before, after) else "the intervals"
        privacy = f"No gain in privacy was shown: no measure of an attack is lower by more than {beyond}."
    return f"{privacy} {_accuracy(before, after)}"


def measured_changes(before: AnyAudit, after: AnyAudit) -> list[Change]:
    """How each measure of the comparison table changed: of two recipes in pairs, else by whether intervals overlap."""
    rows = compared([before, after])
    others = settings_differ(before.attack_settings, after.attack_settings)
    rows = [row._replace(estimates=[None, None]) if row.measure.rpartition("/")[0] in others else row for row in rows]
    if not (isinstance(before, RecipeAudit) and isinstance(after, RecipeAudit) and paired(before, after)):
        return [Change(row.label, direction(*row.estimates)) for row in rows]
    return [_paired(row, before, after, joint_level(after.confidence, len(rows))) for row in rows]


def paired(before: AnyAudit, after: AnyAudit) -> bool:
    """Whether two audits are of recipes with the same pool and membership."""
    return isinstance(before, RecipeAudit) and isinstance(after, RecipeAudit) and before.data == after.data


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


def change(before: AnyAudit, after: AnyAudit) -> str:
    """Which measures of a second model are lower or higher than the first's: the attacks', then the model's own."""
    found = measured_changes(before, after)
    same = "no difference is shown" if paired(before, after) else "the intervals overlap"
    attacks = _told([each for each in found if each.label not in _OWN], "measures of attacks", same, others=True)
    own = _told([each for each in found if each.label in _OWN], "measures of the model", same, others=False)
    return " ".join([*attacks, *own])


def same_examples(first: AnyAudit, other: AnyAudit) -> bool:
    """Whether two audits can be of the same examples: by number, classes and, where both have one, digest."""
    if not (isinstance(first, AuditResult) and isinstance(other, AuditResult)):
        return paired(first, other)
    known = bool(first.examples and other.examples)
    labels = torch.equal(first.is_member, other.is_member) and torch.equal(first.targets, other.targets)
    return labels and (first.examples == other.examples or not known)


def _paired(row: Row, before: RecipeAudit, after: RecipeAudit, level: float) -> Change:
    """The paired difference of one measure, judged at this level."""
    if None in row.estimates:
        return Change(row.label, "cannot be compared")
    difference = after.minus(before, row.measure)
    if math.isnan(difference.value) or math.isnan(difference.p_value):
        return Change(row.label, "cannot be compared")
    word = "lower" if difference.value < 0 else "higher"
    return Change(row.label, word if difference.p_value <= level else "no difference shown", str(difference))


def _accuracy(before: AnyAudit, after: AnyAudit) -> str:
    """What became of the accuracy: a cost, so of recipes in pairs it is judged alone, not among all measures."""
    pair = [result.model_metrics.get("test_accuracy") for result in (before, after)]
    words = {each.label: each.word for each in measured_changes(before, after)}
    word = words.get(MODEL_ROWS["test_accuracy"], "cannot be compared")
    if pair[0] is None or pair[1] is None or word == "cannot be compared":
        return "Test accuracies cannot be compared."
    said, more = {"lower": "fell", "higher": "rose"}.get(word, "went"), ""
    if isinstance(before, RecipeAudit) and isinstance(after, RecipeAudit) and paired(before, after):
        difference = after.minus(before, "test_accuracy")
        low, high = difference.interval
        said, more = "fell" if high < 0 else "rose" if low > 0 else "went", f": {difference}"
    elif said == "went":
        more = ", and the intervals overlap"
    return f"Test accuracy {said} from {pair[0].value:.3f} to {pair[1].value:.3f}{more}."


def _told(found: list[Change], what: str, same: str, *, others: bool) -> list[str]:
    """A sentence from labels and directions; ``others``: also of measures with no difference beside differences."""
    words: dict[str, list[str]] = {}
    for each in found:
        words.setdefault(each.word, []).append(each.label)
    parts = [f"{joined(words[word])} {_is(words[word])} {word}" for word in ("lower", "higher") if word in words]
    if (equal := words.get("no difference shown")) and (others or not parts):
        some = f"the other {what}" if parts else f"all {what}"
        parts.append(f"for {some if len(equal) > 1 else equal[0]} {same}")
    if lost := words.get("cannot be compared"):
        parts.append(f"{joined(lost)} cannot be compared")
    text = "; ".join(parts)
    return [f"{text[0].upper()}{text[1:]}."] if text else []


_OWN = set(MODEL_ROWS.values())


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
