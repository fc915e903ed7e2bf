"""Pieces of the HTML page. Text that they are given as text is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from lightning_cwrf.report.figures import swatch


def tag(name: str, content: str, kind: str = "") -> str:
    """Escaped text in an element."""
    attributes = f' class="{kind}"' if kind else ""
    return f"<{name}{attributes}>{escape(content)}</{name}>"


def section(title: str, *parts: str) -> str:
    """A section with its heading, from HTML."""
    return f"\n<section>{tag('h2', title)}{''.join(parts)}</section>"


def listed(lines: Iterable[str]) -> str:
    """A list of sentences; nothing where there are none."""
    items = "".join(tag("li", line) for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def scroll(table: str) -> str:
    """A table that scrolls by itself where the screen is too narrow for it."""
    return f'<div class="scroll">{table}</div>'


def grid(parts: Iterable[str]) -> str:
    """HTML side by side, where there is space."""
    return f'<div class="grid">{"".join(parts)}</div>'


def table_of(columns: Iterable[str], rows: Iterable[str]) -> str:
    """A table from the names of its columns and rows of HTML."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def legend(names: Iterable[str]) -> str:
    """The line of each series beside its name."""
    items = "".join(f"<li>{swatch(i)}{escape(name)}</li>" for i, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'
