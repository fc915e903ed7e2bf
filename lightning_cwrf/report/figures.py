"""The figures of the HTML page, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_cwrf.auditing import AuditResult, RecipeAudit
from lightning_cwrf.auditing.names import attack_name
from lightning_cwrf.metrics.functional import membership_roc
from lightning_cwrf.report import svg
from lightning_cwrf.report.curves import LossHistograms, mean_roc, measured_rates, smallest_rate, tpr_band
from lightning_cwrf.report.table import AnyAudit, attacks_in, missing
from lightning_cwrf.report.verdict import smallest_auc

_LEFT, _TOP, _SIDE = 54, 12, 320
_BINS_HIGH = 150


def roc(results: Mapping[str, AnyAudit], attack: str) -> str:
    """An attack's ROC on each model with logarithmic axes, pointwise intervals and the chance line."""
    floor = smallest_rate(results.values())
    x = svg.Scale(floor, 1, _LEFT, _LEFT + _SIDE, log=True)
    y = svg.Scale(floor, 1, _TOP + _SIDE, _TOP, log=True)
    grid, bands, curves = [svg.rectangle(_LEFT, _TOP, _SIDE, _SIDE, "panel")], [], []
    for rate in x.decades():
        grid += [svg.line(x(rate), y.end, x(rate), y.start, "grid"), svg.line(x.start, y(rate), x.end, y(rate), "grid")]
        grid += [svg.text(x(rate), y.start + 17, svg.rate_label(rate))]
        grid += [svg.text(x.start - 7, y(rate) + 4, svg.rate_label(rate), anchor="end")]
    for i, result in enumerate(results.values()):
        if attack not in result.scores:
            continue
        if isinstance(result, RecipeAudit):
            points = [(x(f), y(max(t, floor))) for f, t in mean_roc(result, attack, floor)]
            curves.append(svg.path(points, f"curve {svg.series(i)}"))
            for rate, (low, high) in measured_rates(result, attack):
                bands.append(
                    svg.line(x(rate), y(max(low, floor)), x(rate), y(max(high, floor)), f"range {svg.series(i)}")
                )
            continue
        band = tpr_band(result, attack, floor)
        upper = [(x(f), y(max(t, floor))) for f, t in zip(band.fpr, band.high, strict=True)]
        lower = [(x(f), y(max(t, floor))) for f, t in zip(band.fpr, band.low, strict=True)]
        bands.append(svg.path([*upper, *reversed(lower)], f"band {svg.series(i)}", closed=True))
        fpr, tpr, _ = membership_roc(result.scores[attack], result.is_member)
        corners = svg.steps([x(v) for v in fpr.tolist()], [y(v) for v in tpr.tolist()])
        curves.append(svg.path(corners, f"curve {svg.series(i)}"))
    chance = svg.line(x(floor), y(floor), x(1), y(1), "chance")
    middle = (x.start + x.end) / 2
    names = [svg.text(middle, y.start + 36, "false positive rate", kind="axis")]
    names += [svg.text(13, (y.start + y.end) / 2, "true positive rate", kind="axis", turn=True)]
    label = f"ROC of {attack_name(attack)} with logarithmic axes"
    return svg.picture(_LEFT + _SIDE + 22, _TOP + _SIDE + 44, [*grid, *bands, chance, *curves, *names], label)


def losses(found: LossHistograms, index: int, name: str) -> str:
    """One model's histograms of losses, on the axes that all models share."""
    x = svg.Scale(found.edges[0], found.edges[-1], _LEFT, _LEFT + _SIDE, log=True)
    top = max((share for pair in found.shares for side in pair for share in side), default=0.0) or 1.0
    y = svg.Scale(0, top, _TOP + _BINS_HIGH, _TOP)
    parts = [svg.rectangle(_LEFT, _TOP, _SIDE, _BINS_HIGH, "panel")]
    for value in x.decades(1 if x.high < 10 else 2):
        parts += [svg.line(x(value), y.end, x(value), y.start, "grid")]
        parts += [svg.text(x(value), y.start + 17, svg.power_label(value))]
    for share in (0.0, top / 2, top):
        parts.append(svg.text(x.start - 7, y(share) + 4, f"{100 * share:.0f}%", anchor="end"))
    for shares, kind in zip(found.shares[index], ("member", "nonmember"), strict=True):
        corners = [(x(found.edges[0]), y(0))]
        for share, left, right in zip(shares, found.edges[:-1], found.edges[1:], strict=True):
            corners += [(x(left), y(share)), (x(right), y(share))]
        corners.append((x(found.edges[-1]), y(0)))
        parts.append(svg.path(corners, f"bars {kind}", closed=True))
    parts.append(svg.text((x.start + x.end) / 2, y.start + 36, "loss", kind="axis"))
    label = f"Histograms of the losses of {name}"
    return svg.picture(_LEFT + _SIDE + 22, _TOP + _BINS_HIGH + 44, parts, label)


def aucs(results: Mapping[str, AnyAudit]) -> str:
    """Every attack's AUC on each model with its interval, and what could not be told from guessing."""
    attacks = attacks_in(results.values())
    values = [
        number
        for result in results.values()
        for found in result.estimates.values()
        if "auroc" in found
        for number in (found["auroc"].value, *found["auroc"].interval)
        if math.isfinite(number)
    ]
    low = min([0.45, *values])
    least = max((smallest_auc(result) for result in results.values() if isinstance(result, AuditResult)), default=0.5)
    height, block = 20, 20 * len(results) + 14
    bottom = 8 + block * len(attacks)
    x = svg.Scale(math.floor(10 * low) / 10, 1, 104, 352)
    parts = [svg.rectangle(x(0.5), 4, x(min(least, 1)) - x(0.5), bottom - 4, "blind")]
    for tenth in range(round(10 * x.low), 11):
        kind = "chance" if tenth == 5 else "grid"
        parts += [svg.line(x(tenth / 10), 4, x(tenth / 10), bottom, kind)]
        parts += [svg.text(x(tenth / 10), bottom + 17, f"{tenth / 10:.1f}")]
    for row, attack in enumerate(attacks):
        top = 8 + block * row
        parts.append(svg.text(94, top + block / 2, _short(attack_name(attack)), anchor="end", kind="axis"))
        for i, result in enumerate(results.values()):
            y = top + height * i + 14
            found = result.estimates.get(attack, {}).get("auroc")
            if found is None or not math.isfinite(found.value):
                parts.append(
                    svg.text(
                        x(0.5) + 6, y + 4, missing(result, attack) if found is None else "no number", anchor="start"
                    )
                )
                continue
            interval = [
                bound if math.isfinite(bound) else end for bound, end in zip(found.interval, (0, 1), strict=True)
            ]
            parts.append(svg.line(x(interval[0]), y, x(interval[1]), y, f"range {svg.series(i)}"))
            parts.append(f'<circle class="dot {svg.series(i)}" cx="{x(found.value):.1f}" cy="{y:.1f}" r="4.5"/>')
    parts.append(svg.text((x.start + x.end) / 2, bottom + 36, "AUC (0.5 is guessing)", kind="axis"))
    return svg.picture(364, bottom + 44, parts, "AUC of every attack on each model, with intervals")


def tradeoff(results: Mapping[str, AnyAudit], attack: str) -> str:
    """Test accuracy against an attack's AUC, with intervals; bottom right is best."""
    shown = {
        i: (result.model_metrics["test_accuracy"], result.estimates[attack]["auroc"])
        for i, result in enumerate(results.values())
        if attack in result.estimates and "auroc" in result.estimates[attack]
    }
    shown = {
        i: pair for i, pair in shown.items() if all(math.isfinite(n) for e in pair for n in (e.value, *e.interval))
    }
    x = _around([n for e, _ in shown.values() for n in e.interval], _LEFT, _LEFT + _SIDE)
    y = _around([0.5, *(n for _, e in shown.values() for n in e.interval)], _TOP + _SIDE, _TOP)
    parts = [svg.rectangle(_LEFT, _TOP, _SIDE, _SIDE, "panel")]
    for value in x.ticks():
        parts += [svg.line(x(value), y.end, x(value), y.start, "grid"), svg.text(x(value), y.start + 17, f"{value:g}")]
    for value in y.ticks():
        parts += [svg.line(x.start, y(value), x.end, y(value), "chance" if value == 0.5 else "grid")]
        parts += [svg.text(x.start - 7, y(value) + 4, f"{value:g}", anchor="end")]
    for i, (accuracy, auc) in shown.items():
        at, kind = (x(accuracy.value), y(auc.value)), f"range {svg.series(i)}"
        parts += [svg.line(x(accuracy.interval.low), at[1], x(accuracy.interval.high), at[1], kind)]
        parts += [svg.line(at[0], y(auc.interval.low), at[0], y(auc.interval.high), kind)]
        parts += [f'<circle class="dot {svg.series(i)}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4.5"/>']
    parts.append(svg.text((x.start + x.end) / 2, y.start + 36, "test accuracy", kind="axis"))
    parts.append(svg.text(13, (y.start + y.end) / 2, "AUC (0.5 is guessing)", kind="axis", turn=True))
    label = f"Test accuracy against the AUC of {attack_name(attack)}, with intervals"
    return svg.picture(_LEFT + _SIDE + 22, _TOP + _SIDE + 44, parts, label)


def _around(values: list[float], start: float, end: float) -> svg.Scale:
    """A linear scale with a margin around values, at least a twentieth wide."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = max(0.08 * (high - low), (0.05 - (high - low)) / 2, 0.0)
    return svg.Scale(low - margin, high + margin, start, end)


def swatch(index: int) -> str:
    """A piece of a series' line, for a legend."""
    drawn = svg.line(0, 5, 28, 5, f"curve {svg.series(index)}")
    return f'<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true">{drawn}</svg>'


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}…"
