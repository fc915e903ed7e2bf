"""The sections of the HTML page, each a function from audits to HTML. All text of users is escaped."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from lightning_cwrf.auditing import AuditResult
from lightning_cwrf.auditing.decision import beating_guesses
from lightning_cwrf.auditing.names import attack_name, metric_name
from lightning_cwrf.auditing.tables import html_cell, html_rows, html_table, percent
from lightning_cwrf.report import figures
from lightning_cwrf.report.changes import changes, direction
from lightning_cwrf.report.curves import loss_histograms
from lightning_cwrf.report.elements import grid, legend, listed, scroll, section, table_of, tag
from lightning_cwrf.report.inputs import flat_settings, layers_of, thumbnail
from lightning_cwrf.report.table import attacks_in, compared, comparison_notes, comparison_rows, missing
from lightning_cwrf.report.verdict import blind_spots, reference_points, rule, verdict
from lightning_cwrf.weights.masks import WeightMask
from lightning_cwrf.weights.selection import how_rewound

_NO_ORDER = (
    "This attack could not be told from guessing on this model, so the list means nothing: these members are no more "
    "exposed than others, as far as this audit can tell."
)
_BINS = 40
_LAYERS = 40
LIMITS = (
    "A stronger attack, or one with more shadow models, may find more: an audit bounds nothing from above.",
    "An audit is an experiment. It gives no guarantee, such as differential privacy does.",
    "Intervals are over examples. They do not cover another training, seed or training set, nor other shadow models "
    "unless a table says so.",
    "Shadow models that were not trained as the audited model was make an attack weaker than it could be.",
    "The best of several attacks looks better by luck.",
    "Examples that depend on each other, such as several pictures of one person, make intervals too narrow.",
    "Membership inference is one risk. Others, such as reconstruction of training data, are not measured.",
)
"""What no audit shows."""


def head(audits: Mapping[str, AuditResult], title: str) -> str:
    """The title, and what was audited."""
    sizes = dict.fromkeys(
        f"{int(r.is_member.sum()):,} members, {int((~r.is_member).sum()):,} non-members" for r in audits.values()
    )
    models = f"{len(audits)} models" if len(audits) > 1 else next(iter(audits))
    level = percent(next(iter(audits.values())).confidence)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    line = " · ".join([models, *sizes, f"intervals at {level} confidence", f"written {today}"])
    question = (
        "The question: can somebody who queries the model tell the examples that it was trained on (members) from "
        "examples that it never saw (non-members)?"
    )
    return f"<header>{tag('h1', title)}{tag('p', line, 'quiet')}{tag('p', question)}</header>"


def verdicts(audits: Mapping[str, AuditResult]) -> str:
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


def _changes(audits: Mapping[str, AuditResult]) -> str:
    lines = changes(audits)
    if not lines:
        return ""
    caution = (
        "“Lower” and “higher” are said only where the two intervals do not overlap. Where they do, there may be a "
        "difference or none: these audits cannot tell. A difference between two trainings is not yet one between two "
        "methods: for that, repeat both with other seeds."
    )
    return tag("h3", "Before and after") + listed(lines) + tag("p", caution, "quiet")


def scale(audits: Mapping[str, AuditResult]) -> str:
    """Every AUC beside what it can be compared with."""
    if not attacks_in(audits.values()):
        return ""
    caption = (
        "Points are AUCs, lines their intervals. The dashed line is guessing; AUCs in the shaded range cannot be told "
        "from it."
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


def measurements(audits: Mapping[str, AuditResult], seconds: Mapping[str, float | None] | None) -> str:
    """The comparison table, and every note."""
    shown = comparison_notes(audits.values())
    notes = []
    for note in dict.fromkeys(n for result in audits.values() for n in result.notes()):
        of = [name for name, result in audits.items() if note in result.notes()]
        notes.append(note if len(of) == len(audits) else f"{note} ({', '.join(of)})")
    table = scroll(table_of(["", *audits], _compared_rows(audits, seconds)))
    return section("Measurements", table, tag("p", shown[0], "quiet"), tag("h3", "Notes and remarks"), listed(notes))


def _compared_rows(audits: Mapping[str, AuditResult], seconds: Mapping[str, float | None] | None) -> list[str]:
    """The rows of the comparison table, with a word for each change from the first model."""
    rows = comparison_rows(audits, seconds)[1:]
    words = [["", *(direction(first, each) for each in rest)] for _, (first, *rest) in compared(audits.values())]
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


def rocs(audits: Mapping[str, AuditResult]) -> str:
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
    caption = (
        f"Both axes are logarithmic and begin at half a false positive. Shaded: the {level} interval of the TPR at "
        "each FPR (pointwise: each holds by itself, not all of them at once). Dashed: guessing. On the left, an "
        "attacker accuses few examples and is right most often."
    )
    return section("ROC", legend(audits), grid(drawn), tag("p", caption, "quiet"))


def losses(audits: Mapping[str, AuditResult]) -> str:
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


def layers(mask: WeightMask, settings: Mapping[str, Any]) -> str:
    """Where the rewound weights lie, and what the settings, where they are known, say was done to them."""
    how, word = _rewinding(settings)
    found = layers_of(mask)
    kept = sorted(sorted(range(len(found)), key=lambda i: -found[i][1])[:_LAYERS])
    rows = []
    for layer, count, total in (found[i] for i in kept):
        share, part = count / max(total, 1), count / max(mask.count, 1)
        bar = f'<span class="bar"><i style="width:{100 * part:.1f}%"></i></span>'
        rows.append(
            f'<tr><th scope="row">{escape(layer)}</th><td>{count:,} of {total:,}</td><td>{100 * share:.1f}%</td>'
            f"<td>{100 * part:.1f}%{bar}</td></tr>"
        )
    table = table_of(("layer", word, "of the layer", f"of all {word}"), rows)
    share = mask.count / max(mask.total, 1)
    lead = f"{mask.count:,} of {mask.total:,} weights ({100 * share:.2f}%) were {how}."
    rest = [layer for i, layer in enumerate(found) if i not in set(kept)]
    more = (
        f"Not listed: {len(rest)} further layers with {sum(layer[1] for layer in rest):,} {word} weights."
        if rest
        else ""
    )
    title = f"{word.capitalize()} weights"
    return section(title, tag("p", lead), scroll(table), tag("p", more, "quiet") if more else "")


def _rewinding(settings: Mapping[str, Any]) -> tuple[str, str]:
    """What was done to the chosen weights, and a word for them; settings of a file or a command are texts."""
    given = settings.get("rewind", settings)
    known = given if isinstance(given, Mapping) else {}
    values, hold = str(known.get("values", "initial")), str(known.get("hold", True)) != "False"
    return how_rewound(values, hold), "held" if values == "trained" else "rewound"


def exposed(audits: Mapping[str, AuditResult], count: int, classes: Sequence[str] | None, images: Any) -> str:
    """The members that each model's strongest attack finds most surely."""
    tables = []
    for name, result in audits.items():
        aucs = {attack: found["auroc"].value for attack, found in result.estimates.items() if "auroc" in found}
        usable = [a for a in aucs if aucs[a] == aucs[a] and not result.scores[a].isnan().any()]
        if not usable:
            tables.append(f"<div>{tag('h3', name)}{tag('p', 'No attack has scores to order the members by.')}</div>")
            continue
        attack, nonmembers = max(usable, key=lambda a: aucs[a]), int((~result.is_member).sum())
        columns = ["", "member", "class", "score", "non-members above"][0 if images is not None else 1 :]
        rows = []
        for each in result.exposed(attack, count):
            label = str(each.target) if classes is None else classes[each.target]
            label = "several" if each.target < 0 else label  # a person at the level of users
            above = f"{round(each.false_positive_rate * nonmembers):,} of {nonmembers:,}"
            cells = "".join(tag("td", cell) for cell in (label, f"{each.score:.4g}", above))
            picture = "" if images is None else f"<td>{_picture(images[each.member], each.member)}</td>"
            rows.append(f'<tr>{picture}<th scope="row">{each.member}</th>{cells}</tr>')
        title = tag("h3", f"{name}, by {attack_name(attack)}")
        beats = attack in beating_guesses(result.estimates, result.confidence)
        doubt = "" if beats else tag("p", _NO_ORDER, "doubt")
        tables.append(f"<div>{title}{doubt}{scroll(table_of(columns, rows))}</div>")
    words = (
        "Members are named by their place among the audited members, from 0. “Non-members above”: those with at least "
    )
    words += "this score; the fewer, the surer the attack."
    private = (
        "This list says of single persons or records that they were trained on: treat the page as you treat the data."
    )
    if images is not None:
        private += " It shows their pictures, each stretched to its own range of values."
    return section("Most exposed members", tag("p", private, "private"), tag("p", words), grid(tables))


def limits() -> str:
    """What no audit shows."""
    return section("What this does not show", listed(LIMITS))


def settings(given: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The settings that were given, and the versions of the packages."""
    rows = [["", "value"], *flat_settings(given)] if given else []
    table = scroll(html_table(rows)) if rows else tag("p", "No settings were given for this page.", "quiet")
    line = "The page was written with " + ", ".join(f"{name} {number}" for name, number in versions.items()) + "."
    return section("Settings and versions", table, tag("p", line, "quiet"))


def every_measure(audits: Mapping[str, AuditResult]) -> str:
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
    words = "In brackets: intervals over examples. p: one-sided, against chance, for this measure alone."
    return section("Every measure", tag("p", words, "quiet"), scroll(table))


def _whole(estimate: Any, otherwise: str) -> str:
    if estimate is None:
        return otherwise
    p = "" if estimate.p_value is None else f" p = {estimate.p_value:.2g}"
    over = estimate.shadow_interval
    return f"{estimate}{p}" + (f"; over shadow models too: {over.low:.3f} to {over.high:.3f}" if over else "")


def _without(result: AuditResult, attack: str) -> AuditResult:
    return replace(result, scores={name: each for name, each in result.scores.items() if name != attack})


def _picture(example: Any, index: int) -> str:
    return f'<img class="thumb" alt="member {index}" src="data:image/png;base64,{thumbnail(example)}">'
