"""Print pip constraints for the lowest versions that pyproject.toml claims: ``python tools/lowest.py > lowest.txt``.

Of the dependencies and of every extra that users install; the tools of ``dev`` and ``docs`` stay at their newest.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOOLS = ("dev", "docs")


def lower_bounds(project: dict) -> dict[str, str]:
    """The lower bound of each requirement, by name.

    >>> lower_bounds({"dependencies": ["torch>=2.9", "dask[distributed]>=2024.8,<3000"]})
    {'torch': '2.9', 'dask': '2024.8'}
    """
    extras = project.get("optional-dependencies", {})
    requirements = [*project["dependencies"], *(line for name in extras if name not in TOOLS for line in extras[name])]
    bounds = {}
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?(?:>=([\w.]+)(?:,<[\w.]+)?)?", requirement.replace(" ", ""))
        if match is None or (match[2] is None and match[1] != project.get("name")):
            raise ValueError(f"{requirement!r} has no lower bound; write it as name>=1.2 or name>=1.2,<2.")
        if match[2] is not None:
            bounds[match[1]] = match[2]
    return bounds


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, version in lower_bounds(project).items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
