"""Inline SVG for the HTML page. Colours are classes, so that the page's style chooses them for light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

SERIES = 8
"""How many series have a colour and a dash of their own; more of them repeat."""


@dataclass(frozen=True)
class Scale:
    """From values to pixels, linear or logarithmic; values beyond the ends are drawn at the ends."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def decades(self, step: int = 1) -> list[float]:
        """Powers of ten between the ends."""
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        return [10.0**n for n in range(first, last + 1, step)]

    def ticks(self, most: int = 6) -> list[float]:
        """At most so many round values between the ends.

        >>> Scale(0.48, 0.83, 0, 100).ticks()
        [0.5, 0.6, 0.7, 0.8]
        """
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        step *= next(n for n in (1, 2, 5, 10) if (self.high - self.low) / (n * step) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]


def picture(width: int, height: int, parts: Iterable[str], label: str) -> str:
    """An SVG that scales with the page; ``label`` is what a screen reader says."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        f'style="max-width:{width}px">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, content: str, *, anchor: str = "middle", kind: str = "tick", turn: bool = False) -> str:
    """Text at a place; ``turn`` has it run upwards."""
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A filled rectangle."""
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def path(points: Sequence[tuple[float, float]], kind: str, *, closed: bool = False) -> str:
    """A line through points in pixels."""
    drawn = " ".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{drawn}{"Z" if closed else ""}"/>'


def steps(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """The corners of a curve that keeps each ``y`` until the next ``x``, without those less than half a pixel away.

    >>> steps([0, 5, 10], [0, 2, 4])
    [(0, 0), (5, 0), (5, 2), (10, 2), (10, 4)]
    """
    points = [(xs[0], ys[0])]
    last = len(xs) - 1
    for i in range(1, len(xs)):
        x, y = xs[i], ys[i]
        here = points[-1]
        if i < last and abs(x - here[0]) < 0.5 and abs(y - here[1]) < 0.5:
            continue
        points += [(x, here[1])] if x != here[0] and y != here[1] else []
        points += [(x, y)] if (x, y) != here else []
    return points


def series(index: int) -> str:
    """The class of a series' colour and dash."""
    return f"s{index % SERIES}"


def rate_label(rate: float) -> str:
    """A rate on an axis.

    >>> rate_label(0.001), rate_label(1.0)
    ('0.1%', '100%')
    """
    return f"{100 * rate:g}%"


def power_label(value: float) -> str:
    """A power of ten.

    >>> power_label(1e-06), power_label(1.0)
    ('10⁻⁶', '1')
    """
    exponent = round(math.log10(value))
    if exponent in (0, 1):
        return f"{value:g}"
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"
