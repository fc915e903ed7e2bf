"""The sections of the HTML page that are about one model: its rewound weights, and its most exposed members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightning_cwrf.auditing import AuditResult
from lightning_cwrf.auditing.decision import beating_guesses
from lightning_cwrf.auditing.names import attack_name
from lightning_cwrf.report.elements import grid, scroll, section, table_of, tag
from lightning_cwrf.report.inputs import layers_of, thumbnail
from lightning_cwrf.report.table import AnyAudit
from lightning_cwrf.weights.masks import WeightMask
from lightning_cwrf.weights.selection import how_rewound

_NO_ORDER = (
    "This attack could not be told from guessing on this model, so the list means nothing: these members are no more "
    "exposed than others, as far as this audit can tell."
)
_LAYERS = 40


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


def exposed(audits: Mapping[str, AnyAudit], count: int, classes: Sequence[str] | None, images: Any) -> str:
    """The members that each model's strongest attack finds most surely."""
    models = {name: each for name, each in audits.items() if isinstance(each, AuditResult)}
    if not models:
        return ""
    tables = []
    for name, result in models.items():
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


def _picture(example: Any, index: int) -> str:
    return f'<img class="thumb" alt="member {index}" src="data:image/png;base64,{thumbnail(example)}">'
