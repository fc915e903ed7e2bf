"""MkDocs hook: what the site has beside the files in docs/.

- README, CONTRIBUTING and CHANGELOG become pages; in the repository they are at the top level.
- A page of the API for each public subpackage, with the names of its ``__all__``.
- Links to files that are not on the site (source, examples) become text until ``[project.urls]`` of pyproject.toml has
  a ``Source``; then they lead there.
"""

from __future__ import annotations

import posixpath
import sys
from pathlib import Path

import api
from links import relinked
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation lists the pages of the API, which is that of this tree."""
    sys.path.insert(0, str(ROOT))
    for entry in config.nav or []:
        if entry.get("API") == "generated":
            entry["API"] = ["api/index.md", *({title: f"api/{title}.md"} for title in api.subpackages())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in TOP.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "api/index.md", content=api.index()))
    for title in api.subpackages():
        files.append(File.generated(config, f"api/{title}.md", content=api.page(title)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as in the repository become links of the site."""
    here = page.file.src_uri
    if here.startswith("api/"):
        return markdown
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages()} | TOP
    source = next((source for source, place in TOP.items() if place == here), f"docs/{here}")
    return relinked(markdown, posixpath.dirname(source), pages, project.get("urls", {}).get("Source"), here)
