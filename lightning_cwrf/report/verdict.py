"""What audits say, in plain sentences that follow from the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from lightning_cwrf.attacks.base import ATTACKS
from lightning_cwrf.auditing import FPR, AuditResult, Estimate
from lightning_cwrf.auditing.tables import percent
from lightning_cwrf.metrics import Interval
from lightning_cwrf.metrics.functional import resolvable_auc
from lightning_cwrf.report.table import attack_name, attacks_in

_TPR = f"tpr_at_fpr_{FPR:g}"
_TESTED = ("auroc", _TPR)


class Verdict(NamedTuple):
    """What one audit says: ``level`` is "found", "not found" or "unknown"."""

    level: str
    headline: str
    details: list[str]


class Change(NamedTuple):
    """One measure of two audits: both values as text, and what their intervals allow to say."""

    measure: str
    before: str
    after: str
    words: str


def verdict(result: AuditResult) -> Verdict:
    """Whether any attack tells members from non-members, and how well the strongest one does."""
    if not result.estimates:
        return Verdict("unknown", "No attack could run: this audit says nothing about the model.", [])
    found, how = _found(result)
    details = [*_strongest(result), *_above_all(result), how]
    if found:
        return Verdict("found", f"Members can be told from non-members, by {_listed(found)}.", details)
    if below := result.below_chance():
        return Verdict(
            "unknown",
            f"{_listed(below)} did worse than guessing, which no real attack should: until that is explained (see the "
            "notes), this audit says nothing about the model.",
            details,
        )
    return Verdict(
        "not found",
        "No attack that ran could be told from guessing. This does not show that no attack can.",
        details,
    )


def changes(before: AuditResult, after: AuditResult) -> list[Change]:
    """The accuracy and each attack's measures in two audits."""
    rows = [
        _change("test accuracy", before.model_metrics.get("test_accuracy"), after.model_metrics.get("test_accuracy"))
    ]
    for attack in attacks_in([before, after]):
        for metric, label in zip(_TESTED, ("AUC", f"TPR at {percent(FPR)} FPR"), strict=True):
            pair = (each.estimates.get(attack, {}).get(metric) for each in (before, after))
            rows.append(_change(f"{attack_name(attack)} {label}", *pair))
    return rows


def change_headline(found: list[Change]) -> str:
    """How many of the attacks' measures are lower, higher or undecided."""
    words = [each.words for each in found if each.measure != "test accuracy"]
    lower = sum(each.startswith("lower") for each in words)
    higher = sum(each.startswith("higher") for each in words)
    parts = [f"{lower} lower", f"{higher} higher", f"{len(words) - lower - higher} with no difference shown"]
    return f"Of {len(words)} measures of attacks: {', '.join(parts)}."


def same_examples(first: AuditResult, other: AuditResult) -> bool:
    """Whether two audits can be of the same examples: as many members and non-members, of the same classes."""
    return torch.equal(first.is_member, other.is_member) and torch.equal(first.targets, other.targets)


def blind_spots(results: Mapping[str, AuditResult]) -> list[str]:
    """What the attacks could not have seen: the resolution of the samples, and attacks that did not run."""
    every = list(results.values())
    lines = list(dict.fromkeys(_resolution(result) for result in every))
    ran = attacks_in(every)
    if ran:
        lines.append(f"Attacks that ran: {_listed(ran)}.")
    failed = list(dict.fromkeys(name for result in every for name in result.failures))
    if failed:
        lines.append(f"Attacks that did not run, at least on one model: {_listed(failed)}. The notes say why.")
    known = [attack for attack in ran if attack in ATTACKS.names()]
    shadows = [attack for attack in known if any(need.startswith("shadow") for need in ATTACKS.find(attack).needs)]
    if shadows:
        lines.append(
            f"{_listed(shadows)} compared the model with shadow models. The numbers hold for an attacker with such "
            "shadow models: other or more of them may do better."
        )
    elif len(known) == len(ran):
        lines.append(
            "No attack with shadow models ran. Those are usually the strongest, at low false positive rates above "
            "all: read these numbers as those of a weak attacker."
        )
    return lines


def reference_points(result: AuditResult) -> list[tuple[str, str]]:
    """AUCs to compare with: what they mean, from this audit's own numbers."""
    points = [("0.500", "guessing")]
    train, test = (result.model_metrics.get(f"{side}_accuracy") for side in ("train", "test"))
    if train is not None and test is not None and math.isfinite(train.value - test.value):
        auc = (1 + train.value - test.value) / 2
        points.append((f"{auc:.3f}", "guessing “member” wherever the model is right: needs no attack"))
    least = _least_auc(result)
    if math.isfinite(least):
        points.append((f"{least:.3f}", "the smallest that this audit can tell from guessing"))
    points.append(("1.000", "every member is recognised"))
    return points


def _found(result: AuditResult) -> tuple[list[str], str]:
    """The attacks that do better than guessing, and by which tests."""
    tests = [
        (attack, metric, found[metric])
        for attack, found in result.estimates.items()
        for metric in _TESTED
        if metric in found
    ]
    level = (1 - result.confidence) / max(len(tests), 1)
    found = dict.fromkeys(attack for attack, metric, e in tests if _beats_chance(metric, e, level))
    how = (
        f"This counts {len(tests)} tests ({_listed(list(result.estimates))}; AUC and TPR at {percent(FPR)} FPR): one "
        f"with p ≤ {level:.2g} is a finding, so that all of them together raise a false alarm in at most "
        f"{percent(1 - result.confidence)} of audits."
    )
    return list(found), how


def _beats_chance(metric: str, estimate: Estimate, level: float) -> bool:
    if estimate.p_value is not None:
        return estimate.p_value <= level
    return estimate.interval.low > (0.5 if metric == "auroc" else FPR)


def _strongest(result: AuditResult) -> list[str]:
    """The highest AUC in words."""
    aucs = {a: e["auroc"] for a, e in result.estimates.items() if "auroc" in e and math.isfinite(e["auroc"].value)}
    if not aucs:
        return ["No attack has an AUC that is a number."]
    attack = max(aucs, key=lambda name: aucs[name].value)
    best, others = aucs[attack], len(aucs) > 1
    return [
        f"Highest AUC: {attack_name(attack)}. Shown one member and one non-member, it ranks the member higher in "
        f"{100 * best.value:.1f}% of cases{_bounds(best.interval)}; guessing does so in 50%."
        + (" It is the highest of several, so a little too high by luck." if others else "")
    ]


def _above_all(result: AuditResult) -> list[str]:
    """How many members an attack finds without a single false alarm."""
    members, nonmembers = int(result.is_member.sum()), int((~result.is_member).sum())
    counts = {}
    for attack, scores in result.scores.items():
        if not scores.isnan().any():
            counts[attack] = int((scores[result.is_member] > scores[~result.is_member].max()).sum())
    if not counts:
        return []
    attack = max(counts, key=lambda name: counts[name])
    chance = members / (nonmembers + 1)
    expected = f"{chance:.0f}" if chance >= 1 else "less than 1" if chance >= 0.05 else "almost none"
    return [
        f"Without accusing one of the {nonmembers:,} non-members, {attack_name(attack)} finds {counts[attack]:,} of "
        f"{members:,} members; guessing finds {expected} on average."
    ]


def _change(measure: str, before: Estimate | None, after: Estimate | None) -> Change:
    if before is None or after is None:
        shown = ("not measured" if each is None else str(each) for each in (before, after))
        return Change(measure, *shown, "cannot be compared")
    return Change(measure, str(before), str(after), _direction(before, after))


def _direction(before: Estimate, after: Estimate) -> str:
    if any(math.isnan(number) for each in (before, after) for number in (each.value, *each.interval)):
        return "cannot be compared"
    if after.interval.high < before.interval.low:
        return "lower; the intervals do not overlap"
    if after.interval.low > before.interval.high:
        return "higher; the intervals do not overlap"
    return "no difference shown: the intervals overlap"


def _resolution(result: AuditResult) -> str:
    members, nonmembers, least = int(result.is_member.sum()), int((~result.is_member).sum()), _least_auc(result)
    auc = f"an AUC below {least:.3f}" if math.isfinite(least) else "any AUC"
    return (
        f"With {members:,} members and {nonmembers:,} non-members, {auc} cannot be told from guessing by one test at "
        f"{percent(result.confidence)} confidence, and no false positive rate below {percent(1 / nonmembers)} can be "
        "seen: an attack that finds a few members very surely may go unnoticed."
    )


def _least_auc(result: AuditResult) -> float:
    return resolvable_auc(int(result.is_member.sum()), int((~result.is_member).sum()), result.confidence)


def _bounds(interval: Interval) -> str:
    if not all(map(math.isfinite, interval)):
        return " (no interval)"
    return f" (interval: {100 * interval.low:.1f}% to {100 * interval.high:.1f}%)"


def _listed(names: list[str]) -> str:
    shown = [attack_name(name) for name in names]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
