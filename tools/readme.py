"""Build hook: the README as the package index shows it, where relative links would lead nowhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

sys.path.insert(0, str(Path(__file__).parent))
from links import relinked


class ReadmeHook(MetadataHookInterface):
    """Its links lead to ``Source`` of ``[project.urls]``; without that they are text."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        address = metadata.get("urls", {}).get("Source")
        metadata["readme"] = {"content-type": "text/markdown", "text": relinked(text, "", {}, address)}
