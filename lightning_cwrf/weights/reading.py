"""Files of weights: safetensors, Lightning checkpoints and saved state dicts, recognised by content."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_cwrf.files import load_tensors

_STATISTICS = ("running_mean", "running_var")
# The first bytes of files that torch.save writes: a zip archive, or the pickle of old versions.
_TORCH_FILES = (b"PK\x03\x04", b"\x80")


def read_saved(path: Path, what: str) -> tuple[Any, str | None]:
    """Read a file of weights, without pickle, to the CPU.

    Args:
        path: of a file that exists.
        what: the weights in words, for messages: ``"vanilla weights"``.

    Returns:
        What the file holds, and its kind if this package wrote it as safetensors.

    Raises:
        ValueError: the file cannot be read, is damaged, or holds objects other than tensors and plain values.
    """
    with path.open("rb") as file:
        begin = file.read(9)
    # A safetensors file begins with the length of its header, whose bytes can be any, and the header itself.
    if begin.startswith(_TORCH_FILES) and begin[8:] != b"{":
        return _unpickled(path, what), None
    try:
        tensors, kind, _ = load_tensors(path, what="file of weights")
    except ValueError as error:
        raise ValueError(f"cannot read {what} from {path}: {error}") from error
    return tensors, kind


def read_finished(path: Path, *, unpickle: bool = False) -> tuple[Any, Mapping[str, Tensor]]:
    """What a file of finished weights holds, and the state dict in it.

    ``unpickle``: read other objects than tensors too, which can run code.

    Raises:
        ValueError: as :func:`read_saved`; or the file holds something else, such as vanilla weights or scores.
    """
    try:
        loaded, kind = read_saved(path, "finished weights")
    except ValueError as error:
        if not unpickle or "can run code" not in str(error):
            raise
        loaded, kind = torch.load(path, map_location="cpu", weights_only=False), None
    if kind is not None and kind.startswith("lightning_cwrf."):
        raise ValueError(f"{path} holds {kind} instead of finished weights.")
    return loaded, state_dict_in(loaded, str(path))


def state_dict_in(loaded: Any, where: str) -> Mapping[str, Tensor]:
    """The state dict in what was loaded, which is one itself or a checkpoint."""
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{where} holds no state dict; save one with torch.save(model.state_dict(), path).")
    return state


def check_values(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Raise for finished weights that no training gives, which would be copied without a word.

    Parameters and running statistics must be finite. Other buffers may hold NaN or infinite values on purpose, as masks
    of attention do.

    Args:
        model: whose weights they are, with these or other values.
        state: the weights; names that the model does not have are not looked at.
        file: where they were read, for messages.

    Raises:
        ValueError: whole numbers for weights that are none, or NaN or infinite values.
    """
    trained: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    trained |= {name: b for name, b in model.named_buffers() if name.rpartition(".")[2] in _STATISTICS}
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor) and name in state}
    for name, value in own.items():
        if not is_lazy(value) and value.is_floating_point() and not state[name].is_floating_point():
            raise ValueError(
                f"{file} has {name!r} as {state[name].dtype}, and the model has {value.dtype}: save its weights."
            )
    for name in own:
        if name in trained and not torch.isfinite(state[name]).all():
            raise ValueError(f"{file} has NaN or infinite values in {name!r}: the training diverged.")


def _unpickled(path: Path, what: str) -> Any:
    try:
        with path.open("rb") as file:  # given a path, PyTorch goes by its suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader fail in many ways
        # PyTorch's own message advises to load the file with pickle, which a file of weights never needs.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it holds a {found[1]}" if found else "it is damaged, or holds objects of other types"
        raise ValueError(
            f"cannot read {what} from {path}: {why}. Only tensors and plain values are read, because anything else in "
            "such a file can run code. Load it where you trust it, and save its state dict alone: "
            "torch.save(model.state_dict(), path)."
        ) from error
