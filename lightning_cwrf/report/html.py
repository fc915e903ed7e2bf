"""One HTML page of audits, for people: self-contained, without scripts or anything from a network."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_cwrf._version import __version__
from lightning_cwrf.auditing import RecipeAudit
from lightning_cwrf.checks import check_flag, check_integer
from lightning_cwrf.files import check_place, replacing
from lightning_cwrf.report import model_sections, sections
from lightning_cwrf.report.elements import tag
from lightning_cwrf.report.inputs import check_images, named_results, read_mask
from lightning_cwrf.report.table import AnyAudit
from lightning_cwrf.weights.masks import WeightMask

# Nothing is loaded, not even by mistake.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(
    results: Any,
    path: str | PathLike[str],
    *,
    title: str = "Membership inference audit",
    mask: WeightMask | str | PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float | None] | None = None,
    class_names: Sequence[str] | None = None,
    exposed: int = 10,
    images: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write one HTML page that says what audits found, for people who decide about a model.

    It holds the verdict in plain words, the table of :func:`~lightning_cwrf.report.comparison_table`, ROCs with
    intervals, histograms of losses, the most exposed members, every measure, and what the audits do not show. The page
    is one file without scripts, opens from disk and prints. It names members by their indices: treat it as the data.
    Audits of recipes (:class:`~lightning_cwrf.RecipeAudit`) are compared in pairs, and shown by accuracy against AUC
    instead of by member.

    Args:
        results: audits by the name of the model or recipe, the one to compare with first, all of one kind; an audit
            can be the path of a saved one. Or one audit, or paths, which are named after their files.
        path: of the page, ``….html``.
        title: of the page.
        mask: the rewound weights, or a file of them: which layers they lie in.
        settings: how the models were made, as names and values, which can be nested.
        seconds: the time spent on each model, for a row of the table; None for one that was not trained here.
        class_names: the names of the classes, in order.
        exposed: how many of the most exposed members to list for each model; 0: none. Not for recipes.
        images: the members in the order of the audit, to show the exposed ones: a data set, a list or a tensor, with
            ``(1 or 3, height, width)`` each. They are private data and become part of the page.
        overwrite: replace an existing file.

    Returns:
        The path of the page.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a path that is a folder, has another suffix or is that of an input; no audit; intervals of different
            confidence; audits of models beside audits of recipes; a file that is not a saved audit; a model without
            seconds; another number of images than members, or images that cannot be shown; too few names of classes;
            names of classes or images for recipes.
        FileNotFoundError: a saved audit or a mask does not exist.
        FileExistsError: the page exists, and ``overwrite`` is False.

    >>> from tempfile import mkdtemp
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import TensorDataset, random_split
    >>> from lightning_cwrf import audit
    >>> data = TensorDataset(torch.randn(60, 4), torch.arange(60) % 3)
    >>> members, nonmembers = random_split(data, [30, 30])
    >>> result = audit(nn.Linear(4, 3), members=members, nonmembers=nonmembers)
    >>> write_report({"my model": result}, Path(mkdtemp()) / "report.html").name
    'report.html'
    """
    check_flag("overwrite", overwrite)
    check_integer("exposed", exposed, low=0)
    path = check_page(path, [*_listed(results), mask], overwrite=overwrite)
    if not isinstance(title, str):
        raise TypeError(f"title must be text, not a {type(title).__name__}.")
    if settings is not None and not isinstance(settings, Mapping):
        raise TypeError(f"settings must be values by name, not a {type(settings).__name__}.")
    audits = named_results(results)
    check_images(images, audits)
    names = _class_names(class_names, audits)
    chosen = read_mask(mask)
    parts = [
        sections.head(audits, title),
        *findings(audits, seconds),
        model_sections.layers(chosen, settings or {}) if chosen is not None else "",
        model_sections.exposed(audits, exposed, names, images) if exposed else "",
        *closing(audits, settings or {}),
    ]
    return write_page(path, title, parts)


def findings(audits: Mapping[str, AnyAudit], seconds: Mapping[str, float | None] | None = None) -> list[str]:
    """The sections on what the audits found."""
    recipes = any(isinstance(each, RecipeAudit) for each in audits.values())
    return [
        sections.verdicts(audits),
        sections.tradeoffs(audits) if recipes else "",
        sections.scale(audits),
        sections.measurements(audits, seconds),
        sections.rocs(audits),
        sections.losses(audits),
    ]


def closing(audits: Mapping[str, AnyAudit], settings: Mapping[str, Any]) -> list[str]:
    """The sections at the end of every page."""
    return [sections.limits(audits), sections.settings(settings, _versions()), sections.every_measure(audits)]


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    """Write a page of these sections, completely or not at all."""
    with replacing(path) as part:
        part.write_text(_page(title, "".join(parts)), encoding="utf-8")
    return path


def check_page(path: str | PathLike[str], inputs: Sequence[Any], *, overwrite: bool) -> Path:
    """The path of the page, unless the page would take the place of something else."""
    path = Path(path)
    check_place(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"the report is an HTML page: its file must end with .html, not {path.suffix!r}.")
    for each in inputs:
        if isinstance(each, (str, PathLike)) and Path(each).resolve() == path.resolve():
            raise ValueError(f"{path} is read for the report, which would take its place: name another file.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it.")
    return path


def _listed(results: Any) -> list[Any]:
    if isinstance(results, Mapping):
        return list(results.values())
    return list(results) if isinstance(results, (list, tuple)) else [results]


def _page(title: str, body: str) -> str:
    style = files("lightning_cwrf.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"{tag('title', title)}\n<style>\n{style}</style>\n</head>\n<body>\n<main>{body}</main>\n</body>\n</html>\n"
    )


def _class_names(names: Sequence[str] | None, audits: Mapping[str, AnyAudit]) -> list[str] | None:
    if names is None:
        return None
    if any(isinstance(each, RecipeAudit) for each in audits.values()):
        raise ValueError("class_names is for the list of exposed members, which audits of recipes do not have.")
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError("class_names must be a list of names, in the order of the classes.")
    needed = 1 + max(int(result.targets.max()) for result in audits.values())
    if len(names) < needed:
        raise ValueError(f"class_names has {len(names)} names, and the audits have at least {needed} classes.")
    return list(names)


def _versions() -> dict[str, str]:
    """Of the packages that this page was written with."""
    found = {"lightning_cwrf": __version__, "Python": platform.python_version()}
    for name in ("torch", "lightning", "torchmetrics", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
