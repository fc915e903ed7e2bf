"""Where shadow models' signals are kept: one folder per key, one file per model, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_cwrf.files import load_tensors, save_tensors

_SIGNALS, _WEIGHTS = "lightning_cwrf.shadow_signals/2", "lightning_cwrf.shadow_weights/2"
_TRAINED_AGAIN = "delete it, and this one model is trained again."


@dataclass(frozen=True)
class ShadowStore:
    """The files of the shadow models that share one key.

    Each file has a digest of its content, the key and the model's number, which are checked whenever it is read.

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

    def probe(self) -> None:
        """Write a small file and remove it, so that a store that cannot be written is known before any training.

        Raises:
            ValueError: the folder cannot be made or written to (why).
        """
        trial = self.folder / f"probe.{os.getpid()}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trial.write_bytes(b"probe")
            trial.unlink()
        except OSError as error:
            raise ValueError(
                f"the store {self.root} cannot be written: {error}. Pass store=, a folder that can be."
            ) from error

    def has(self, model: int, *, weights: bool) -> bool:
        """Whether a model's signals (and its weights, if asked) are there; their headers are read, not their content.

        Raises:
            ValueError: a file is damaged, or is another model's.
        """
        paths = [self.signals_path(model)] + ([self.weights_path(model)] if weights else [])
        if not all(path.is_file() for path in paths):
            return False
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata() or {}
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); {_TRAINED_AGAIN}") from error
            self._check(path, metadata, model)
        return True

    def save(self, model: int, signals: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> None:
        """Write one model's files; the weights first, so that signals never stand there without them."""
        whose = {"key": self.key, "model": str(model)}
        if weights is not None:
            save_tensors(weights, self.weights_path(model), _WEIGHTS, whose)
        save_tensors(signals, self.signals_path(model), _SIGNALS, whose)

    def signals(self, model: int) -> dict[str, Tensor]:
        """What :meth:`save` wrote of one model.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: the file is damaged or changed, or is another model's.
        """
        return self._load(self.signals_path(model), _SIGNALS, model)

    def weights(self, model: int) -> dict[str, Tensor]:
        """The state dict of one model.

        Raises:
            FileNotFoundError: it was not kept.
            ValueError: the file is damaged or changed, or is another model's.
        """
        path = self.weights_path(model)
        if not path.is_file():
            raise FileNotFoundError(f"no weights of shadow model {model} in {self.folder}; use keep_weights=True.")
        return self._load(path, _WEIGHTS, model)

    def _load(self, path: Path, kind: str, model: int) -> dict[str, Tensor]:
        try:
            file = load_tensors(path, kind, what="file of a shadow model")
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}; {_TRAINED_AGAIN}") from error
        self._check(path, file.metadata, model)
        return file.tensors

    def _check(self, path: Path, metadata: Mapping[str, str], model: int) -> None:
        if metadata.get("key") != self.key:
            raise ValueError(f"{path} belongs to another run; {_TRAINED_AGAIN}")
        if metadata.get("model") != str(model):
            raise ValueError(f"{path} holds shadow model {metadata.get('model')}, not {model}; {_TRAINED_AGAIN}")
