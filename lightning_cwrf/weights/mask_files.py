"""Masks and their held values in files and in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cwrf.files import load_tensors, save_tensors

_KIND = "lightning_cwrf.WeightMask/1"


def check_masks(masks: Any) -> None:
    """Raise a TypeError unless ``masks`` maps names to bool tensors."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be bool tensors by parameter name, not a {type(masks).__name__}.")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"the mask of {name!r} must be a bool tensor, not {found}.")


def pack(masks: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A state for checkpoints: a bit per weight, the shapes, and the held values."""
    return {
        "bits": {name: torch.from_numpy(np.packbits(mask.numpy())) for name, mask in masks.items()},
        "shapes": {name: torch.tensor(mask.shape, dtype=torch.int64) for name, mask in masks.items()},
        "values": {name: value.cpu() for name, value in values.items()},
    }


def unpack(state: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks and values, checked, of a state with packed ``bits``, or with bool ``masks`` as files have them."""
    masks, values = dict(state.get("masks", {})), dict(state.get("values", {}))
    for name, bits in state.get("bits", {}).items():
        shape = torch.Size(state["shapes"][name].tolist())
        flat = np.unpackbits(bits.cpu().numpy(), count=shape.numel())
        masks[name] = torch.from_numpy(flat).bool().view(shape)
    check_masks(masks)
    for name, value in values.items():
        if name not in masks:
            raise ValueError(f"a damaged weight mask: it has values for {name!r}, and no mask.")
        count = int(masks[name].count_nonzero())
        if value.shape != (count,):
            raise ValueError(
                f"a damaged weight mask: it has {value.numel()} values for the {count} masked weights of {name!r}."
            )
    if values and values.keys() != masks.keys():
        without = sorted(masks.keys() - values.keys())
        raise ValueError(f"a damaged weight mask: it lacks the values for {', '.join(map(repr, without[:5]))}.")
    return masks, values


def save(masks: Mapping[str, Tensor], values: Mapping[str, Tensor], path: str | PathLike[str]) -> Path:
    """Save masks and held values as safetensors, as ``masks/<parameter>`` and ``values/<parameter>``."""
    tensors = {f"masks/{name}": mask for name, mask in masks.items()}
    return save_tensors({**tensors, **{f"values/{name}": value for name, value in values.items()}}, path, _KIND)


def load(path: str | PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """The ``masks`` and ``values`` of a file, for :func:`unpack`."""
    tensors, kind, _ = load_tensors(path, what="weight mask")  # early versions wrote no digest
    if kind != _KIND:
        raise ValueError(
            f"{path} is not a weight mask, it holds {kind or 'tensors of another program'}; WeightMask.save writes one."
        )
    state: dict[str, dict[str, Tensor]] = {"masks": {}, "values": {}}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        if part not in state or not name:
            raise ValueError(f"{path} is a damaged weight mask: it has an unknown entry {key!r}.")
        state[part][name] = value
    return state
