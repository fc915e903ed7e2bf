"""The tutorial as a notebook, made of its page: ``python tools/notebook.py`` writes docs/tutorial.ipynb.

Text becomes Markdown cells, Python examples become code cells; what the page shows as output stays text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def cells(page: str) -> list[tuple[str, str]]:
    r"""The cells of a page, in order: their type and text.

    >>> cells("# Title\n\n```python\nx = 1\n```\n\nAnd then.\n")
    [('markdown', '# Title'), ('code', 'x = 1'), ('markdown', 'And then.')]
    """
    found = []
    for i, text in enumerate(re.split(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)):
        if text.strip():
            found.append(("code" if i % 2 else "markdown", text.strip()))
    return found


def notebook(page: str) -> str:
    """The notebook of a page, without outputs, as JSON."""
    made: list[dict[str, Any]] = []
    for i, (kind, text) in enumerate(cells(page)):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": text.splitlines(keepends=True)}
        made.append(cell if kind == "markdown" else {**cell, "execution_count": None, "outputs": []})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    (DOCS / "tutorial.ipynb").write_text(notebook(page), encoding="utf-8")


if __name__ == "__main__":
    main()
