"""What a report is made of: audits by name, the mask, pictures of members, settings."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cwrf.auditing import AuditResult, RecipeAudit
from lightning_cwrf.auditing.saved import format_name
from lightning_cwrf.report.table import AnyAudit, check_comparable, check_results
from lightning_cwrf.weights.masks import WeightMask


def named_results(results: Any) -> dict[str, AnyAudit]:
    """Audits by name: of a mapping, of one audit, or of saved audits, which are named after their files.

    Raises:
        TypeError: something else.
        ValueError: no audit; audits of models beside audits of recipes; intervals of different confidence; one audit
            under two names; a file that is not a saved audit.
        FileNotFoundError: there is no such file.
    """
    if isinstance(results, (AuditResult, RecipeAudit)):
        results = {"the model" if isinstance(results, AuditResult) else "the recipe": results}
    elif isinstance(results, (str, PathLike)):
        results = [results]
    if isinstance(results, (list, tuple)) and results and all(isinstance(each, (str, PathLike)) for each in results):
        results = _by_file(results)
    if isinstance(results, Mapping):
        results = {
            str(name): load_audit(each) if isinstance(each, (str, PathLike)) else each for name, each in results.items()
        }
    check_results(results, kinds=(AuditResult, RecipeAudit))
    if len({type(each) for each in results.values()}) > 1:
        kinds = ", ".join(f"{name!r} ({type(each).__name__})" for name, each in results.items())
        raise ValueError(
            f"audits of single models and of recipes cannot be compared on one page: {kinds}. Write two pages."
        )
    check_comparable(results)
    return dict(results)


def load_audit(path: str | PathLike[str]) -> AnyAudit:
    """Load a saved audit of a model or of a recipe."""
    return RecipeAudit.load(path) if format_name(path) == RecipeAudit.__name__ else AuditResult.load(path)


def read_mask(mask: Any) -> WeightMask | None:
    """A mask, or a file of one.

    Raises:
        TypeError: something else.
        FileNotFoundError: there is no such file.
        ValueError: a file that is not a mask.
    """
    if isinstance(mask, (str, PathLike)):
        return WeightMask.load(mask)
    if mask is not None and not isinstance(mask, WeightMask):
        raise TypeError(f"mask must be a WeightMask or a file of one, not a {type(mask).__name__}.")
    return mask


def check_images(images: Any, results: Mapping[str, AnyAudit]) -> None:
    """Raise unless there is one picture for each member of each audit.

    Raises:
        TypeError: pictures without an order.
        ValueError: another number of pictures than members.
    """
    if images is None:
        return
    if not hasattr(images, "__getitem__") or not hasattr(images, "__len__") or isinstance(images, (str, Mapping)):
        raise TypeError(
            f"images must be the members in the order of the audit: a data set, a list or a tensor, not a "
            f"{type(images).__name__}."
        )
    for name, result in results.items():
        if isinstance(result, RecipeAudit):
            raise ValueError("images are of the exposed members of one model, which audits of recipes do not have.")
        members = int(result.is_member.sum())
        if len(images) != members:
            raise ValueError(
                f"images has {len(images)} elements, and {name!r} was audited with {members} members: pass the members "
                "in the order of the audit."
            )


def thumbnail(example: Any) -> str:
    """A picture as the text of a PNG: ``(C, H, W)`` with 1 or 3 channels or ``(H, W)``, stretched to its own range.

    Raises:
        TypeError: not a tensor, nor a tuple or list that begins with one.
        ValueError: a tensor of another shape, or with NaN or infinite values.
    """
    from PIL import Image  # heavy, and for pictures alone

    value = example[0] if isinstance(example, (tuple, list)) and example else example
    if not isinstance(value, Tensor):
        raise TypeError(f"a picture must be a tensor, or (tensor, label), not a {type(value).__name__}.")
    value = value.detach().cpu().double()
    value = value[None] if value.ndim == 2 else value
    if value.ndim != 3 or len(value) not in (1, 3) or value.numel() == 0:
        raise ValueError(
            f"a picture must have the shape (1 or 3, height, width) or (height, width), not {tuple(value.shape)}."
        )
    if not value.isfinite().all():
        raise ValueError("a picture has NaN or infinite values.")
    low, high = value.min(), value.max()
    scaled = (255 * (value - low) / (high - low).clamp_min(1e-12)).round().to(torch.uint8)
    pixels = scaled[0].numpy() if len(scaled) == 1 else scaled.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    picture.thumbnail((96, 96))
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Nested settings as rows of a name and a value.

    >>> flat_settings({"rewind": {"rate": 0.03}, "seed": 0})
    [['rewind.rate', '0.03'], ['seed', '0']]
    """
    rows = []
    for name, value in settings.items():
        whole = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            rows += flat_settings(value, f"{whole}.")
        else:
            rows.append([whole, f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)])
    return rows


def layers_of(mask: WeightMask) -> list[tuple[str, int, int]]:
    """Each layer of a mask with its number of rewound weights and of all weights, in the order of the model."""
    found: dict[str, tuple[int, int]] = {}
    for name, chosen in mask.masks.items():
        layer = name.rpartition(".")[0] or name
        count, total = found.get(layer, (0, 0))
        found[layer] = (count + int(torch.count_nonzero(chosen)), total + chosen.numel())
    return [(layer, *numbers) for layer, numbers in found.items()]


def _by_file(paths: Sequence[str | PathLike[str]]) -> dict[str, Path]:
    """Paths by stem, or by the whole path where stems repeat."""
    stems = [Path(each).stem for each in paths]
    names = stems if len(set(stems)) == len(stems) else [str(Path(each)) for each in paths]
    if len(set(names)) != len(names):
        raise ValueError(f"a saved audit is given twice: {', '.join(names)}.")
    return {name: Path(each) for name, each in zip(names, paths, strict=True)}
