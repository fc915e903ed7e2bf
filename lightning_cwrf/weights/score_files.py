"""Files of weight scores."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from lightning_cwrf.files import load_tensors, save_tensors

_KIND = "lightning_cwrf.Scores/1"


def save_scores(scores: Mapping[str, Tensor], path: str | PathLike[str]) -> Path:
    """Save scores as safetensors, with a digest of the content.

    >>> import torch
    >>> from tempfile import mkdtemp
    >>> path = save_scores({"weight": torch.ones(2)}, Path(mkdtemp()) / "scores.safetensors")
    >>> load_scores(path)
    {'weight': tensor([1., 1.])}
    """
    return save_tensors(scores, path, _KIND)


def load_scores(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Load what :func:`save_scores` saved, or any safetensors file of scores by parameter name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else, such as vanilla weights or a mask.
    """
    tensors, kind, _ = load_tensors(path, what="file of scores")
    if kind is not None and kind.startswith("lightning_cwrf.") and kind != _KIND:
        raise ValueError(f"{path} holds {kind} instead of scores; PrivacyScoringCallback.save_scores writes them.")
    return tensors
