"""A search as one HTML page: what it concluded, the finalists side by side, and what was dropped."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from lightning_cwrf.auditing.tables import html_table
from lightning_cwrf.checks import check_flag
from lightning_cwrf.report import sections
from lightning_cwrf.report.elements import listed, scroll, section, tag
from lightning_cwrf.report.html import check_page, closing, findings, write_page
from lightning_cwrf.searching.result import RecipeSearch


def write_search_report(
    search: RecipeSearch,
    path: str | PathLike[str],
    *,
    title: str = "Search for a hardening",
    overwrite: bool = False,
) -> Path:
    """Write what a search found as one HTML page, as :func:`~lightning_cwrf.report.write_report` does of audits.

    Every figure is of the held-out half of the examples, but for those of the dropped candidates, which are said to be
    of the half that chooses.

    Args:
        search: what :func:`~lightning_cwrf.search_recipes` returned, or a saved one that was loaded.
        path: of the page, ``….html``.
        title: of the page.
        overwrite: replace an existing file.

    Returns:
        The path of the page.

    Raises:
        TypeError: ``search`` is not a RecipeSearch; a title that is not text.
        ValueError: a path that is a folder or has another suffix.
        FileExistsError: the page exists, and ``overwrite`` is False.
    """
    if not isinstance(search, RecipeSearch):
        raise TypeError(f"search must be what search_recipes returns, not a {type(search).__name__}.")
    if not isinstance(title, str):
        raise TypeError(f"title must be text, not a {type(title).__name__}.")
    check_flag("overwrite", overwrite)
    path = check_page(path, [], overwrite=overwrite)
    audits = search.audits
    settings: dict[str, Any] = {"floor": search.floor, "measure": search.measure}
    parts = [
        sections.head(audits, title),
        section("Conclusions", tag("p", f"{search.size()}."), listed([*search.conclusions(), *search.remarks])),
        *findings(audits),
        _dropped(search),
        *closing(audits, settings),
    ]
    return write_page(path, title, parts)


def _dropped(search: RecipeSearch) -> str:
    rows = search.dropped_rows()
    return section("Dropped candidates", scroll(html_table(rows))) if rows[1:] else ""
