"""Audits on disk: one JSON file, written completely or not at all, with a digest that detects changes."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cwrf.files import check_place, replacing

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}
# Suffixes of weight files: a result saved under such a name would overwrite the user's weights.
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".npz")


def write_json(content: Mapping[str, Any], path: str | PathLike[str]) -> Path:
    """Write a nest of mappings, lists, dataclasses, numbers, text and tensors as JSON, with a digest of all of it.

    Tensors become base64 text with their dtype and shape; NaN and infinity, which JSON lacks, become text too.
    """
    path = check_json_path(path)
    whole = {name: plain(value) for name, value in content.items()}
    whole["digest"] = _digest(whole)
    with replacing(path) as part:
        part.write_text(json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def check_json_path(path: str | PathLike[str]) -> Path:
    """The path, unless no audit can be written there: then a ValueError."""
    path = Path(path)
    if path.suffix.lower() in _WEIGHTS:
        raise ValueError(
            f"an audit is saved as one JSON file, raw scores included: {path} has the suffix of another kind of file. "
            f"Name it {path.with_suffix('.json').name}."
        )
    check_place(path)
    return path


def digest_of(path: str | PathLike[str]) -> str:
    """The digest in a file that :func:`read_json` reads."""
    return str(json.loads(Path(path).read_text(encoding="utf-8"))["digest"])


def format_name(path: str | PathLike[str]) -> str | None:
    """The kind of content in a file that :func:`write_json` wrote, such as ``"RecipeAudit"``; None: unknown."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            begin = file.read(256)  # the format comes first, and the rest may be large
    except (OSError, ValueError):  # read_json says what is wrong with the file
        return None
    found = re.match(r'\{\s*"format"\s*:\s*"(?:\w+\.)*(\w+)/', begin)
    return None if found is None else found[1]


def read_json(
    path: str | PathLike[str], kind: str, *, what: str = "saved audit", writer: str = "AuditResult.save"
) -> dict[str, Any]:
    """Read what :func:`write_json` wrote with this ``"format"``; tensors are restored, the rest stays as in JSON.

    ``what`` the file is and its ``writer`` are for messages.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} at {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are not UTF-8
        raise ValueError(f"{path} is damaged or is not JSON: {error}.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != kind:
        name = kind.partition("/")[0]
        if isinstance(found, str) and found.startswith(f"{name}/"):
            raise ValueError(
                f"{path} has the format {found} of another version of lightning_cwrf; this one reads {kind}. Run the "
                "audit again, or read the file's numbers as JSON."
            )
        raise ValueError(f"{path} is not a {what}; {writer} writes one.")
    if content.pop("digest", None) != _digest(content):
        raise ValueError(
            f"{path} was changed after it was saved: its numbers and scores are not those of the audit (by digest). "
            "Restore the file, or run the audit again."
        )
    read: dict[str, Any] = _tensors(content)
    return read


def plain(value: Any) -> Any:
    """A value as JSON can hold it.

    >>> plain({"low": -math.inf, "scores": torch.tensor([True])})
    {'low': '-inf', 'scores': {'dtype': 'bool', 'shape': [1], 'base64': 'AQ=='}}
    """
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _of_tensor(value: Tensor) -> dict[str, Any]:
    value = value.detach().cpu().contiguous()
    name = str(value.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise TypeError(f"a saved audit holds tensors of {', '.join(_DTYPES)}, not {name}.")
    content: Any = value.reshape(-1).view(torch.uint8).numpy()
    return {"dtype": name, "shape": list(value.shape), "base64": base64.b64encode(content).decode()}


def _tensors(content: Any) -> Any:
    if isinstance(content, list):
        return [_tensors(each) for each in content]
    if not isinstance(content, dict):
        return content
    if content.keys() == {"dtype", "shape", "base64"}:
        # A copy: torch requires writable memory.
        raw = torch.frombuffer(bytearray(base64.b64decode(content["base64"])) or bytearray(1), dtype=torch.uint8)
        empty = 0 in content["shape"]
        dtype = _DTYPES[content["dtype"]]
        return torch.empty(content["shape"], dtype=dtype) if empty else raw.view(dtype).reshape(content["shape"])
    return {name: _tensors(each) for name, each in content.items()}


def _digest(content: Mapping[str, Any]) -> str:
    """A digest of the values, independent of the layout of the text."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
