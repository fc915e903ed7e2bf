"""Tensors on disk: safetensors files, written whole or not at all, that name their kind and are checked when read."""

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
    """What a file holds.

    ``kind`` is what its writer called it, and None for a file that another program wrote; ``metadata`` is the rest of
    what was saved beside the tensors.
    """

    tensors: dict[str, Tensor]
    kind: str | None
    metadata: dict[str, str]


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | PathLike[str], kind: str, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors as safetensors, with a digest of all of it; an existing file is replaced in one step.

    A crash or a full disk leaves the old file as it was. Missing folders are made.

    Args:
        tensors: by name; tied ones are written once each.
        path: of the file.
        kind: what the file is, for example ``"lightning_cwrf.WeightMask/1"``; :func:`load_tensors` asks for it.
        metadata: further text by name.

    Returns:
        The path.
    """
    # One storage each: safetensors refuses tensors that share memory.
    whole = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    said = {**(metadata or {}), _KIND: kind}
    with replacing(path) as part:
        save_file(whole, part, metadata={**said, _DIGEST: digest(whole, said)})
    return Path(path)


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """The path of a file to write beside ``path``, which takes its place in one step when the block ends well.

    A crash or a full disk leaves the old file as it was. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_tensors(path: str | PathLike[str], kind: str | None = None, *, what: str = "tensor file") -> TensorFile:
    """Read a safetensors file and check it.

    Args:
        path: of the file.
        kind: what it must be; None: any safetensors file, also one of another program, which has no digest.
        what: what to call the file in messages, for example ``"weight mask"``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no safetensors file, a truncated or changed one, or one of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            said = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no {what}: it is damaged, truncated or no safetensors file ({error}).") from error
    found_digest = said.pop(_DIGEST, None)
    found = said.get(_KIND)
    if kind is not None and found != kind:
        raise ValueError(f"{path} is no {what}: it holds {found or 'tensors of another program'}, not {kind}.")
    ours = (found or "").startswith("lightning_cwrf.")
    wanted = digest(tensors, said) if found_digest is not None else None
    if found_digest != wanted or (ours and found_digest is None and kind is not None):
        raise ValueError(f"{path} is damaged: its content is not what was written. Restore it or write it anew.")
    return TensorFile(tensors, said.pop(_KIND, None), said)


def digest(tensors: Mapping[str, Tensor], said: Mapping[str, str] | None = None) -> str:
    """A digest of names, types, shapes and bytes of tensors, and of text beside them."""
    made = hashlib.blake2b(repr(sorted((said or {}).items())).encode(), digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        made.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        content: Any = flat.view(torch.uint8).numpy()  # a buffer, which NumPy's types do not say
        made.update(content)
    return made.hexdigest()
