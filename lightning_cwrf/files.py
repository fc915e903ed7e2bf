"""Tensors on disk: safetensors files, written in one step, with their kind and a digest that is checked on reading."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_KIND, _DIGEST = "format", "digest"


class TensorFile(NamedTuple):
    """The content of a file.

    ``kind`` is the format that its writer named, and None for a file of another program; ``metadata`` is the other text
    saved with the tensors.
    """

    tensors: dict[str, Tensor]
    kind: str | None
    metadata: dict[str, str]


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | PathLike[str], kind: str, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors as safetensors with a digest of the content, by :func:`replacing`; tied ones under each name.

    ``kind`` is the format, for example ``"lightning_cwrf.WeightMask/1"``, which :func:`load_tensors` checks.
    """
    # A copy each: safetensors raises for tensors that share memory.
    whole = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    text = {**(metadata or {}), _KIND: kind}
    with replacing(path) as part:
        save_file(whole, part, metadata={**text, _DIGEST: digest(whole, text)})
    return Path(path)


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """A path to write to, which replaces ``path`` in one step when the block ends without an error.

    After a crash or on a full disk, the old file is unchanged. Missing folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_place(path: str | PathLike[str]) -> None:
    """Raise a ValueError where no file can be written: ``path`` is a folder, or lies below a file."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file.")
    above = next((each for each in path.parents if each.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{path} cannot be written: {above} is a file, not a folder.")


def load_tensors(path: str | PathLike[str], kind: str | None = None, *, what: str = "tensor file") -> TensorFile:
    """Read a safetensors file and check it; ``what`` it is, as in ``"weight mask"``, is for messages.

    ``kind`` is the required format; None: any safetensors file, also one of another program, which has no digest.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            text = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no {what}: it is damaged, truncated or no safetensors file ({error}).") from error
    found_digest = text.pop(_DIGEST, None)
    found = text.get(_KIND)
    if kind is not None and found != kind:
        raise ValueError(f"{path} is no {what}: it holds {found or 'tensors of another program'}, not {kind}.")
    ours = (found or "").startswith("lightning_cwrf.")
    wanted = digest(tensors, text) if found_digest is not None else None
    if found_digest != wanted or (ours and found_digest is None and kind is not None):
        raise ValueError(f"{path} is damaged: its content is not what was written. Restore it or write it again.")
    return TensorFile(tensors, text.pop(_KIND, None), text)


def digest(tensors: Mapping[str, Tensor], text: Mapping[str, str] | None = None) -> str:
    """A digest of names, types, shapes and bytes of tensors, and of the text saved with them."""
    made = hashlib.blake2b(repr(sorted((text or {}).items())).encode(), digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        made.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        content: Any = flat.view(torch.uint8).numpy()  # a buffer, but NumPy's types lack that
        made.update(content)
    return made.hexdigest()
