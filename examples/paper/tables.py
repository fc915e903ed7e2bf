"""The tables of saved studies, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def shown(cell: Any) -> str:
    """A saved cell as text."""
    if cell is None:
        return ""
    if isinstance(cell, Mapping):
        interval = "[{low:.3f}, {high:.3f}]" if "value" in cell else "[{low:+.3f}, {high:+.3f}]"
        value = "{value:.3f}" if "value" in cell else "{difference:+.3f}"
        return f"{value} {interval}".format(**cell)
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def table(content: Mapping[str, Any]) -> str:
    """The table of a saved study."""
    lines = [f"| {' | '.join(content['head'])} |", "|---" * len(content["head"]) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(shown(cell) for cell in row)} |" for row in content["rows"])]) + "\n"


def markdown(content: Mapping[str, Any]) -> str:
    """The table of a saved study, and its verdict."""
    return table(content) + "\n**{word}**: {sentence} Rule: {rule}.\n".format(**content["verdict"])


def rounded(nest: Any) -> Any:
    """Numbers to six digits after the point; NaN as None, which JSON lacks."""
    if isinstance(nest, Mapping):
        return {str(name): rounded(each) for name, each in nest.items()}
    if isinstance(nest, (list, tuple)):
        return [rounded(each) for each in nest]
    if isinstance(nest, float):
        return round(nest, 6) if math.isfinite(nest) else None
    return nest


@contextmanager
def figure(path: Path, panels: int = 1) -> Iterator[list[Any]]:
    """The axes of a figure, which is saved at the end."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(4.5 * panels, 4), layout="constrained")
    yield list(made.subplots(1, panels, squeeze=False)[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=120)
