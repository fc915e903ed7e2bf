"""The sections of the HTML page, each a function from audits to HTML. All text of users is escaped."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import replace
from html import escape
from typing import Any

from lightning_cwrf.auditing import RecipeAudit
from lightning_cwrf.auditing.names import attack_name, metric_name
from lightning_cwrf.auditing.tables import html_cell, html_rows, html_table, percent
from lightning_cwrf.report import figures
from lightning_cwrf.report.changes import OVERLAP, PAIRED, Change, changes, compared_pairs, measured_changes, paired
from lightning_cwrf.report.curves import loss_histograms
from lightning_cwrf.report.elements import grid, legend, listed, scroll, section, table_of, tag
from lightning_cwrf.report.inputs import flat_settings
from lightning_cwrf.report.table import (
    AnyAudit,
    attacks_in,
    comparison_notes,
    comparison_remarks,
    comparison_rows,
    missing,
)
from lightning_cwrf.report.verdict import blind_spots, reference_points, rule, verdict

_BINS = 40
LIMITS = (
    "A stronger attack, or one with more shadow models, may find more: an audit bounds nothing from above.",
    "An audit is an experiment. It gives no guarantee, such as differential privacy does.",
    "The best of several attacks looks better by luck.",
    "Examples that depend on each other, such as several pictures of one person, make intervals too narrow.",
    "Membership inference is one risk. Others, such as reconstruction of training data, are not measured.",
)
"""What no audit shows."""
OF_MODELS = (
    "Intervals are over examples. They do not cover another training, seed or training set, nor other shadow models "
    "unless a table says so.",
    "Shadow models that were not trained as the audited model was make an attack weaker than it could be.",
)
"""What audits of single models do not show."""
OF_RECIPES = (
    "The numbers are means over models. One model, also yours, can leak more or less than its recipe does on average.",
    "Intervals are over other models of the recipe and other examples of the same kind; not over other kinds of data.",
)
"""What audits of recipes do not show."""


def head(audits: Mapping[str, AnyAudit], title: str) -> str:
    """The title, and what was audited."""
    sizes = dict.fromkeys(_sizes(each) for each in audits.values())
    kind = "ways of training" if _of_recipes(audits) else "models"
    models = f"{len(audits)} {kind}" if len(audits) > 1 else next(iter(audits))
    level = percent(next(iter(audits.values())).confidence)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    line = " · ".join([models, *sizes, f"intervals at {level} confidence", f"written {today}"])
    question = (
        "The question: can somebody who queries the model tell the examples that it was trained on (members) from "
        "examples that it never saw (non-members)?"
    )
    if _of_recipes(audits):
        question += " The numbers are means over models that were trained in the same way, each attacked with others."
    return f"<header>{tag('h1', title)}{tag('p', line, 'quiet')}{tag('p', question)}</header>"


def _of_recipes(audits: Mapping[str, AnyAudit]) -> bool:
    return any(isinstance(each, RecipeAudit) for each in audits.values())


def _sizes(audit: AnyAudit) -> str:
    if isinstance(audit, RecipeAudit):
        models, examples = audit.is_member.shape
        return f"{models} models each, on halves of {examples:,} examples"
    return f"{int(audit.is_member.sum()):,} members, {int((~audit.is_member).sum()):,} non-members"


def verdicts(audits: Mapping[str, AnyAudit]) -> str:
    """What each audit says, and what it could not have seen."""
    cards = []
    for name, result in audits.items():
        found = verdict(result)
        cards.append(
            f'<div class="verdict {found.level.replace(" ", "-")}">{tag("h3", name)}'
            f"{tag('p', found.headline, 'headline')}{listed(found.details)}</div>"
        )
    return section(
        "Verdict",
        f'<div class="verdicts">{"".join(cards)}</div>',
        *(tag("p", line, "quiet") for line in rule(audits)),
        _changes(audits),
        tag("h3", "What could not have been seen"),
        listed(blind_spots(audits)),
    )


def _changes(audits: Mapping[str, AnyAudit]) -> str:
    lines = changes(audits)
    if not lines:
        return ""
    kinds = {paired(audits[one], audits[other]) for one, other in compared_pairs(audits)}
    caution = " ".join(text for text, used in ((PAIRED, True in kinds), (OVERLAP, False in kinds)) if used)
    return tag("h3", "Before and after") + listed(lines) + tag("p", caution, "quiet")


def scale(audits: Mapping[str, AnyAudit]) -> str:
    """Every AUC beside what it can be compared with."""
    if not attacks_in(audits.values()):
        return ""
    caption = "Points are AUCs, lines their intervals. The dashed line is guessing" + (
        "." if _of_recipes(audits) else "; AUCs in the shaded range cannot be told from it."
    )
    figure = f"<figure>{figures.aucs(audits)}{tag('figcaption', caption)}</figure>"
    points = html_table([["an AUC for comparison", *audits], *reference_points(audits)])
    words = (
        "An attack’s AUC says how well it ranks members above non-members on average. A model that treats both alike "
        "gives 0.5 under every attack. The farther an attack is above what the gap between train and test accuracy "
        "gives away by itself, the more the model remembers of single examples. A low AUC can hide a few members who "
        "are recognised very surely: the TPR at a low FPR shows those."
    )
    return section("Is my number bad?", tag("p", words), legend(audits), figure, scroll(points))


def measurements(audits: Mapping[str, AnyAudit], seconds: Mapping[str, float | None] | None) -> str:
    """The comparison table, and every note."""
    shown = comparison_notes(audits.values())
    notes = comparison_remarks(audits)
    for note in dict.fromkeys(n for result in audits.values() for n in result.notes()):
        of = [name for name, result in audits.items() if note in result.notes()]
        notes.append(note if len(of) == len(audits) else f"{note} ({', '.join(of)})")
    table = scroll(table_of(["", *audits], _compared_rows(audits, seconds)))
    return section("Measurements", table, tag("p", shown[0], "quiet"), tag("h3", "Notes and remarks"), listed(notes))


def _compared_rows(audits: Mapping[str, AnyAudit], seconds: Mapping[str, float | None] | None) -> list[str]:
    """The rows of the comparison table, with a word for each change from the first model."""
    rows = comparison_rows(audits, seconds)[1:]
    first, *rest = audits.values()
    found = [measured_changes(first, each) for each in rest]
    words = [["", *map(_in_words, each)] for each in zip(*found, strict=True)]
    words += [[""] * len(audits)] * (len(rows) - len(words))
    return [
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(
            f"<td>{html_cell(cell)}{tag('span', word, 'word') if word else ''}</td>"
            for cell, word in zip(cells, said, strict=True)
        )
        + "</tr>"
        for (label, *cells), said in zip(rows, words, strict=True)
    ]


def _in_words(change: Change) -> str:
    return f"{change.word}: {change.difference}" if change.difference else change.word


def rocs(audits: Mapping[str, AnyAudit]) -> str:
    """The ROC of every attack."""
    drawn = []
    for attack in attacks_in(audits.values()):
        nan = [
            name for name, result in audits.items() if attack in result.scores and result.scores[attack].isnan().any()
        ]
        shown = {n: r if n not in nan else _without(r, attack) for n, r in audits.items()}
        note = tag("figcaption", f"Not drawn, because its scores have NaN: {', '.join(nan)}.") if nan else ""
        drawn.append(f"<figure>{tag('h3', attack_name(attack))}{figures.roc(shown, attack)}{note}</figure>")
    if not drawn:
        return ""
    level = percent(next(iter(audits.values())).confidence)
    shaded = f"Shaded: the {level} interval of the TPR at each FPR (pointwise: each holds by itself, not all at once)."
    if _of_recipes(audits):
        shaded = (
            f"Curves are means over the models; bars: the {level} interval of the mean TPR at an FPR, where measured."
        )
    caption = (
        f"Both axes are logarithmic and begin at half a false positive. {shaded} Dashed: guessing. On the left, an "
        "attacker accuses few examples and is right most often."
    )
    return section("ROC", legend(audits), grid(drawn), tag("p", caption, "quiet"))


def tradeoffs(audits: Mapping[str, AnyAudit]) -> str:
    """Each way of training by its test accuracy and the AUC of each attack."""
    drawn = [
        f"<figure>{tag('h3', attack_name(attack))}{figures.tradeoff(audits, attack)}</figure>"
        for attack in attacks_in(audits.values())
    ]
    if not drawn:
        return ""
    words = "Further right is more accurate, further down leaks less. Lines are intervals. A way of training is worth "
    words += "its loss of accuracy only if no other one lies below it and no further left."
    return section("Accuracy against privacy", legend(audits), grid(drawn), tag("p", words, "quiet"))


def losses(audits: Mapping[str, AnyAudit]) -> str:
    """Histograms of the losses of members and non-members."""
    found = loss_histograms(audits.values(), _BINS)
    drawn = []
    for i, name in enumerate(audits):
        odd = f"{found.odd[i]} losses are NaN or infinite and not drawn." if found.odd[i] else ""
        note = tag("figcaption", odd) if odd else ""
        drawn.append(f"<figure>{tag('h3', name)}{figures.losses(found, i, name)}{note}</figure>")
    boxes = "".join(
        f'<li><svg class="box" viewBox="0 0 14 12" aria-hidden="true"><rect class="bars {kind}" x="1" y="1" width="12" '
        f'height="10"/></svg>{label}</li>'
        for kind, label in (("member", "members"), ("nonmember", "non-members"))
    )
    caption = "The share of each side by loss. The more the two sides differ, the easier membership is to tell."
    key = f'<ul class="legend">{boxes}</ul>'
    return section("Losses", key, grid(drawn), tag("p", caption, "quiet"))


def limits(audits: Mapping[str, AnyAudit]) -> str:
    """What no audit shows."""
    own = OF_RECIPES if _of_recipes(audits) else OF_MODELS
    return section("What this does not show", listed([*LIMITS[:2], *own, *LIMITS[2:]]))


def settings(given: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The settings that were given, and the versions of the packages."""
    rows = [["", "value"], *flat_settings(given)] if given else []
    table = scroll(html_table(rows)) if rows else tag("p", "No settings were given for this page.", "quiet")
    line = "The page was written with " + ", ".join(f"{name} {number}" for name, number in versions.items()) + "."
    return section("Settings and versions", table, tag("p", line, "quiet"))


def every_measure(audits: Mapping[str, AnyAudit]) -> str:
    """Every estimate of every attack, with p-values and intervals over shadow models."""
    bodies = []
    for attack in (None, *attacks_in(audits.values())):
        title = "the model" if attack is None else attack_name(attack)
        found = [r.model_metrics if attack is None else r.estimates.get(attack, {}) for r in audits.values()]
        why = [missing(result, attack) for result in audits.values()]
        rows = [
            [metric_name(metric), *(_whole(each.get(metric), no) for each, no in zip(found, why, strict=True))]
            for metric in dict.fromkeys(metric for estimates in found for metric in estimates)
        ]
        heading = f'<tr><th scope="rowgroup" colspan="{len(audits) + 1}">{escape(title)}</th></tr>'
        bodies.append(f'<tbody class="group">{heading}{html_rows(rows)}</tbody>')
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in audits)
    table = f"<table><thead><tr><td></td>{top}</tr></thead>{''.join(bodies)}</table>"
    over = "models and examples" if _of_recipes(audits) else "examples"
    words = f"In brackets: intervals over {over}. p: one-sided, against chance, for this measure alone."
    return section("Every measure", tag("p", words, "quiet"), scroll(table))


def _whole(estimate: Any, otherwise: str) -> str:
    if estimate is None:
        return otherwise
    p = "" if estimate.p_value is None else f" p = {estimate.p_value:.2g}"
    over = estimate.shadow_interval
    return f"{estimate}{p}" + (f"; over shadow models too: {over.low:.3f} to {over.high:.3f}" if over else "")


def _without(result: AnyAudit, attack: str) -> AnyAudit:
    return replace(result, scores={name: each for name, each in result.scores.items() if name != attack})
