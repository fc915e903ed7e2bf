"""Rows of cells as plain text, Markdown and HTML. The first row has the names of the columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

Rows = Sequence[Sequence[str]]


def aligned(rows: Rows) -> list[str]:
    """Rows of cells as lines with aligned columns.

    >>> aligned([["a", "b"], ["long", "c"]])
    ['a     b', 'long  c']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def percent(share: float) -> str:
    """A share as a percentage; 0.999 must not become 100%.

    >>> percent(0.95), percent(0.999)
    ('95%', '99.9%')
    """
    return f"{100 * share:.4g}%"


def markdown_table(rows: Rows) -> list[str]:
    """Rows of cells as the lines of a Markdown table.

    >>> markdown_table([["attack", "AUC"], ["lira", "0.5"]])
    ['| attack | AUC |', '| --- | --- |', '| lira | 0.5 |']
    """
    lines = [f"| {' | '.join(map(markdown_text, row))} |" for row in rows]
    return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]


def markdown_text(text: str) -> str:
    """Text on one line, in which no character starts Markdown or HTML."""
    # An underscore inside a word, as in the names of metrics, means nothing there.
    marks = re.compile(r"[\\`*<|&]|(?<=\])\(|(?<![^\W_])_|_(?![^\W_])")
    return marks.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def html_table(rows: Rows, *, attributes: str = "") -> str:
    """Rows of cells as an HTML table; the first cell of each row is its heading, and all text is escaped.

    An interval in brackets is a ``span`` of its own.

    >>> html_table([["", "a<b"], ["AUC", "0.5 [0.4, 0.6]"]])  # doctest: +ELLIPSIS
    '<table><thead><tr><td></td><th scope="col">a&lt;b</th></tr></thead><tbody><tr><th scope="row">AUC</th><td>0.5 ...
    """
    head = "".join(f'<th scope="col">{escape(cell)}</th>' if cell else "<td></td>" for cell in rows[0])
    return f"<table{attributes}><thead><tr>{head}</tr></thead><tbody>{html_rows(rows[1:])}</tbody></table>"


def html_rows(rows: Iterable[Sequence[str]]) -> str:
    """The rows of a table's body (:func:`html_table`)."""
    return "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{html_cell(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )


def html_cell(text: str) -> str:
    """The text of a cell, escaped, with an interval in a ``span``."""
    value, bracket, rest = escape(text).partition(" [")
    bounds, end, more = rest.partition("]")
    return f'{value} <span class="interval">[{bounds}]</span>{more}' if bracket and end else escape(text)
