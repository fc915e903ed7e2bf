"""What audits say, in plain sentences that follow from the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from lightning_cwrf.attacks.base import ATTACKS
from lightning_cwrf.auditing import FPR, AuditResult, RecipeAudit
from lightning_cwrf.auditing.decision import beating_guesses, joint_level, judged_measures, least_auc
from lightning_cwrf.auditing.names import attack_name
from lightning_cwrf.auditing.tables import percent
from lightning_cwrf.metrics import Interval
from lightning_cwrf.report.table import AnyAudit, attacks_in


class Verdict(NamedTuple):
    """What one audit says: ``level`` is "found", "not found" or "unknown"."""

    level: str
    headline: str
    details: list[str]


def verdict(result: AnyAudit) -> Verdict:
    """Whether any attack tells members from non-members, and how well the strongest one does."""
    subject = "this way of training" if isinstance(result, RecipeAudit) else "the model"
    failed = [f"Failed, and not part of this verdict: {_listed(list(result.failures))}."] if result.failures else []
    if not result.estimates:
        return Verdict("unknown", f"No attack could run: this audit says nothing about {subject}.", failed)
    found = beating_guesses(result.estimates, result.confidence)
    details = [*failed, *_unmeasured(result), *_strongest(result), *_above_all(result)]
    if found:
        return Verdict(
            "found",
            f"Members can be told from non-members: {_listed(found)} beat{'s' * (len(found) == 1)} guessing.",
            details,
        )
    if below := result.below_chance():
        return Verdict(
            "unknown",
            f"{_listed(below)} did worse than guessing, by more than the interval. Members and non-members may be "
            f"swapped, or it is chance, which does this in at most about {percent((1 - result.confidence) / 2)} of "
            f"audits. Until that is explained (see the notes), this audit says nothing about {subject}.",
            details,
        )
    if not judged_measures(result.estimates):
        return Verdict(
            "unknown",
            f"No attack has an AUC or a TPR at {percent(FPR)} FPR that is a number: this audit says nothing about "
            f"{subject}.",
            details,
        )
    return Verdict(
        "not found", "No attack that ran could be told from guessing. Another attack may do better.", details
    )


def blind_spots(results: Mapping[str, AnyAudit]) -> list[str]:
    """What the attacks could not have seen: the resolution of the samples, and attacks that did not run."""
    every = list(results.values())
    lines = list(dict.fromkeys(_resolution(result) for result in every))
    ran = attacks_in(every)
    if ran:
        lines.append(f"Attacks that ran: {_listed(ran)}.")
    failed = list(dict.fromkeys(name for result in every for name in result.failures))
    if failed:
        lines.append(f"Attacks that failed, at least on one model: {_listed(failed)}. The notes say why.")
    some = [name for name in ran if any(name not in {**r.estimates, **r.failures} for r in every)]
    if some:
        lines.append(f"Attacks that were not run on every model: {_listed(some)}.")
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


def rule(results: Mapping[str, AnyAudit]) -> list[str]:
    """By which tests a verdict says that an attack beats guessing."""
    lines = []
    for result in results.values():
        tests = len(judged_measures(result.estimates))
        if tests:
            whole = percent(1 - result.confidence)
            lines.append(
                f"An attack beats guessing here if its AUC or its TPR at {percent(FPR)} FPR has p ≤ "
                f"{joint_level(result.confidence, tests):.2g}: that is {whole} divided by {tests} tests, so that all "
                f"of them together raise a false alarm in at most {whole} of audits."
            )
    return list(dict.fromkeys(lines))


def smallest_auc(result: AuditResult) -> float:
    """The smallest AUC with which an attack would beat guessing in this audit; infinity where none would."""
    members = int(result.is_member.sum())
    tests = len(judged_measures(result.estimates))
    return least_auc(members, len(result.is_member) - members, result.confidence, tests)


def reference_points(results: Mapping[str, AnyAudit]) -> list[list[str]]:
    """AUCs to compare with, from each audit's own numbers: rows of what they mean and the value for each model."""
    gaps = []
    for result in results.values():
        train, test = (result.model_metrics[f"{side}_accuracy"].value for side in ("train", "test"))
        gaps.append(f"{(1 + train - test) / 2:.3f}")
    least = [smallest_auc(result) for result in results.values() if isinstance(result, AuditResult)]
    told = ["the smallest that this audit can tell from guessing", *(f"{e:.3f}" if e <= 1 else "none" for e in least)]
    return [
        ["guessing", *("0.500" for _ in results)],
        ["saying “member” wherever the model is right, which needs no attack", *gaps],
        *([told] if least else []),
        ["every member recognised", *("1.000" for _ in results)],
    ]


def _unmeasured(result: AnyAudit) -> list[str]:
    """The attacks that ran without one measure that can be tested."""
    tested = {attack for attack, _, _ in judged_measures(result.estimates)}
    missing = [attack for attack in result.estimates if attack not in tested]
    return [f"Without a result that is a number, and not part of this verdict: {_listed(missing)}."] if missing else []


def _strongest(result: AnyAudit) -> list[str]:
    """The highest AUC in words."""
    aucs = {a: e["auroc"] for a, e in result.estimates.items() if "auroc" in e and math.isfinite(e["auroc"].value)}
    if not aucs:
        return ["No attack has an AUC that is a number."]
    attack = max(aucs, key=lambda name: aucs[name].value)
    best = aucs[attack]
    return [
        f"Highest AUC: {attack_name(attack)}. Of one member and one non-member, it ranks the member higher in "
        f"{100 * best.value:.1f}% of cases{_bounds(best.interval)}; guessing does so in 50%."
    ]


def _above_all(result: AnyAudit) -> list[str]:
    """How many members an attack finds without a single false alarm; of a recipe, on average over its models."""
    examples = len(result.targets)
    inside = result.is_member.view(-1, examples)
    members, nonmembers = int(inside[0].sum()), int((~inside[0]).sum())
    counts = {}
    for attack, scores in result.scores.items():
        if not scores.isnan().any():
            models = zip(scores.view(-1, examples), inside, strict=True)
            counts[attack] = sum(int((each[m] > each[~m].max()).sum()) for each, m in models) / len(inside)
    if not counts:
        return []
    attack = max(counts, key=lambda name: counts[name])
    found = f"{counts[attack]:,.1f}" if len(inside) > 1 else f"{counts[attack]:,.0f}"
    chance = members / (nonmembers + 1)
    expected = f"{chance:.0f}" if chance >= 1 else "less than 1" if chance >= 0.05 else "almost none"
    return [
        f"Without accusing one of the {nonmembers:,} non-members, {attack_name(attack)} finds {found} of {members:,} "
        f"members{', on average over the models' * (len(inside) > 1)}; guessing finds {expected} on average."
    ]


def _resolution(result: AnyAudit) -> str:
    if isinstance(result, RecipeAudit):
        return _precision(result)
    members, nonmembers, least = int(result.is_member.sum()), int((~result.is_member).sum()), smallest_auc(result)
    auc = f"an AUC below {least:.3f}" if math.isfinite(least) else "any AUC"
    return (
        f"With {members:,} members and {nonmembers:,} non-members, {auc} cannot be told from guessing at "
        f"{percent(result.confidence)} confidence, and no false positive rate below {100 / nonmembers:.2g}% can be "
        "seen: a few members who are found very surely may go unnoticed."
    )


def _precision(result: RecipeAudit) -> str:
    models, examples = result.is_member.shape
    widths = {
        attack: (found["auroc"].interval.high - found["auroc"].interval.low) / 2
        for attack, found in result.estimates.items()
        if "auroc" in found and all(map(math.isfinite, found["auroc"].interval))
    }
    known = f" The mean AUC is known to within about ± {max(widths.values()):.3f}." if widths else ""
    return (
        f"{models} models on halves of {examples:,} examples: no false positive rate below {200 / examples:.2g}% can "
        f"be seen in one model.{known}"
    )


def _bounds(interval: Interval) -> str:
    if not all(map(math.isfinite, interval)):
        return " (no interval)"
    return f" (interval: {100 * interval.low:.1f}% to {100 * interval.high:.1f}%)"


def _listed(attacks: list[str]) -> str:
    return joined([attack_name(attack) for attack in attacks])


def joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
