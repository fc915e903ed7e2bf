"""Pages of the API, from the public names of the package, and its docstrings as Markdown."""

from __future__ import annotations

import importlib
import re
from typing import Any

import griffe

PACKAGE = "lightning_cwrf"
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`(~?)([\w.]+)`")
_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.M)


def subpackages() -> list[str]:
    """What ``dir(lightning_cwrf)`` shows beside its names, and the functions of metrics."""
    package = importlib.import_module(PACKAGE)
    return sorted(f"{PACKAGE}.{name}" for name in {*dir(package), "metrics.functional"} - set(package.__all__))


def names(title: str) -> dict[str, str]:
    """The public names of a module, and the path at which each is defined."""
    module = importlib.import_module(title)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == title and name[0] != "_"]
    found = {}
    for name in getattr(module, "__all__", own):
        home = getattr(getattr(module, name), "__module__", None) or title
        # A constant, or an alias of a type, has the module of its type.
        found[name] = f"{home}.{name}" if home.startswith(PACKAGE) else f"{title}.{name}"
    return found


def page(title: str) -> str:
    """The page of one module: its docstring, and each public name. A name of two modules is on the first page."""
    earlier = {path for other in subpackages() if other < title for path in names(other).values()}
    parts = [
        f"# {title} {{#{title}}}",
        f"::: {title}\n    options: {{members: false, show_root_heading: false, show_root_toc_entry: false}}",
    ]
    parts += [f"::: {path}" for path in names(title).values() if path not in earlier]
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """The page of the names that the package itself has, each with a link."""
    package = importlib.import_module(PACKAGE)
    homes = {name: path for title in reversed(subpackages()) for name, path in names(title).items()}
    lines = [f"# API\n\n`from {PACKAGE} import ...`:\n"]
    for name in package.__all__:
        if name in homes:
            summary = (getattr(package, name).__doc__ or "").partition("\n")[0]
            lines.append(f"- [`{name}`][{homes[name]}]: {_ROLE.sub(_code, summary)}")
    lines.append("\nMore are in the subpackages:\n")
    lines += [f"- [`{title}`][{title}]: {_summary(title)}" for title in subpackages()]
    return "\n".join(lines) + "\n"


class Docstrings(griffe.Extension):
    """Sphinx roles become links to the name's place in the API, doctests become code."""

    def __init__(self) -> None:
        self.places = {title: title for title in subpackages()}
        for title in subpackages():
            for name, path in names(title).items():
                self.places.setdefault(name, path)
                self.places[path] = path

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _ROLE.sub(self._link, obj.docstring.value)
            obj.docstring.value = _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", text)

    def _link(self, match: re.Match[str]) -> str:
        path = match[2]
        name = path.rpartition(".")[2]
        place = self.places.get(path) or self.places.get(name)
        return f"[{_code(match)}][{place}]" if place else _code(match)


def _code(match: re.Match[str]) -> str:
    short, path = match.groups()
    return f"`{path.rpartition('.')[2] if short else path}`"


def _summary(title: str) -> str:
    return _ROLE.sub(_code, (importlib.import_module(title).__doc__ or "").partition("\n")[0])
