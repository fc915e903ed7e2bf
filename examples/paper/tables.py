"""The tables of saved studies, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def shown(cell: Any) -> str:
    """A saved cell as text."""
    if cell is None:
        return ""
    if isinstance(cell, Mapping):
        interval = "[{low:.3f}, {high:.3f}]" if "value" in cell else "[{low:+.3f}, {high:+.3f}]"
        value = "{value:.3f}" if "value" in cell else "{difference:+.3f}"
        return f"{value} {interval}".format(**cell)
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def markdown(content: Mapping[str, Any]) -> str:
    """The table of a saved study, and its verdict."""
    lines = [f"| {' | '.join(content['head'])} |", "|---" * len(content["head"]) + "|"]
    lines += [f"| {' | '.join(shown(cell) for cell in row)} |" for row in content["rows"]]
    return "\n".join([*lines, "", "**{word}**: {sentence} (Rule: {rule})".format(**content["verdict"])]) + "\n"


def rounded(nest: Any) -> Any:
    """Numbers to six digits after the point; NaN as None, which JSON lacks."""
    if isinstance(nest, Mapping):
        return {str(name): rounded(each) for name, each in nest.items()}
    if isinstance(nest, (list, tuple)):
        return [rounded(each) for each in nest]
    if isinstance(nest, float):
        return round(nest, 6) if math.isfinite(nest) else None
    return nest
