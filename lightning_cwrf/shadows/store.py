"""Where shadow models' signals are kept: one folder per key, one file per model, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_FORMAT = "lightning_cwrf.shadow/1"


@dataclass(frozen=True)
class ShadowStore:
    """The files of the shadow models that share one key.

    Attributes:
        root: the folder of all keys.
        key: identity of data, recipe and seed (:func:`~lightning_cwrf.shadows.identity.identity`).
    """

    root: Path
    key: str

    @property
    def folder(self) -> Path:
        """The folder of this key."""
        return self.root / self.key

    def signals_path(self, model: int) -> Path:
        """The file of one model's signals."""
        return self.folder / f"model-{model:04d}.safetensors"

    def weights_path(self, model: int) -> Path:
        """The file of one model's state dict, where it is kept."""
        return self.folder / f"model-{model:04d}.weights.safetensors"

    def has(self, model: int, *, weights: bool) -> bool:
        """Whether a model's signals (and its weights, if asked) are there.

        Raises:
            ValueError: the file is damaged, or was written under another key.
        """
        path = self.signals_path(model)
        if not path.is_file() or (weights and not self.weights_path(model).is_file()):
            return False
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and this one model is trained again.") from error
        if metadata.get("key") != self.key:
            raise ValueError(f"{path} belongs to another run; delete it, or choose another store.")
        return True

    def save(self, model: int, signals: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> None:
        """Write one model's files; the weights first, so that signals never stand there without them."""
        if weights is not None:
            self._write(self.weights_path(model), weights)
        self._write(self.signals_path(model), signals)

    def signals(self, model: int) -> dict[str, Tensor]:
        """What :meth:`save` wrote of one model."""
        return load_file(self.signals_path(model))

    def weights(self, model: int) -> dict[str, Tensor]:
        """The state dict of one model.

        Raises:
            FileNotFoundError: it was not kept.
        """
        path = self.weights_path(model)
        if not path.is_file():
            raise FileNotFoundError(f"no weights of shadow model {model} in {self.folder}; use keep_weights=True.")
        return load_file(path)

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        whole = {name: value.clone() for name, value in tensors.items()}  # tied weights may not share memory in a file
        try:
            save_file(whole, part, metadata={"format": _FORMAT, "key": self.key})
            part.replace(path)
        finally:  # a full disk leaves a piece of a file
            part.unlink(missing_ok=True)
