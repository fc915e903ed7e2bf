"""Relative links of Markdown, for places where the repository's files are not next to the text."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

# Code first, so that an index and a call in it (`table[key](row)`) are no link.
_CODE_OR_LINK = re.compile(r"```.*?```|`[^`\n]*`(?!\])|\[(?P<text>[^\[\]]+)\]\((?P<target>[^()\s]+)\)", re.S)


def relinked(markdown: str, folder: str, pages: Mapping[str, str], address: str | None, page: str = "") -> str:
    """Point relative links to where their targets are: another page, the repository's address, or (without one) text.

    Args:
        markdown: the text.
        folder: of the text in the repository; links are relative to it.
        pages: files of the repository that are pages, and where each page is.
        address: of the repository, without a slash at the end; None: links to other files become their text.
        page: where this text is among the pages.

    >>> relinked("[Guide](guide.md#yaml), [run](../run.py)", "docs", {"docs/guide.md": "g.md"}, None)
    '[Guide](g.md#yaml), run'
    >>> relinked("[run](../run.py)", "docs", {}, "https://example.org/project")
    '[run](https://example.org/project/blob/main/run.py)'
    """

    def moved(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if target is None or target.startswith(("#", "mailto:")) or "://" in target:
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        anchor = f"#{anchor}" if anchor else ""
        if path in pages:
            return f"[{text}]({posixpath.relpath(pages[path], posixpath.dirname(page) or '.')}{anchor})"
        return text if address is None else f"[{text}]({address}/blob/main/{path}{anchor})"

    return _CODE_OR_LINK.sub(moved, markdown)
