"""The files of shadow models: one folder per key, one file per model, each written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_cwrf._deprecated import renamed
from lightning_cwrf.files import load_tensors, save_tensors

_OUTPUTS, _WEIGHTS = "lightning_cwrf.shadow_signals/2", "lightning_cwrf.shadow_weights/2"
_RETRAINED = "delete it, and this one model is trained again."


@renamed(signals="outputs", signals_path="outputs_path")
@dataclass(frozen=True)
class ShadowStore:
    """The files of the shadow models that share one key.

    Each file holds a digest of its content, the key, and the number of its model; all are checked on every read.

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

    def outputs_path(self, model: int) -> Path:
        """The file of one model's outputs."""
        return self.folder / f"model-{model:04d}.safetensors"

    def weights_path(self, model: int) -> Path:
        """The file of one model's state dict, if it was stored."""
        return self.folder / f"model-{model:04d}.weights.safetensors"

    def probe(self) -> None:
        """Write and remove a small file, so that a store that cannot be written is an error before any training."""
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
        """Whether a model's outputs (and its weights, if asked) are stored; only the headers of the files are read."""
        paths = [self.outputs_path(model)] + ([self.weights_path(model)] if weights else [])
        if not all(path.is_file() for path in paths):
            return False
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata() or {}
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); {_RETRAINED}") from error
            self._check(path, metadata, model)
        return True

    def save(self, model: int, outputs: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> None:
        """Write one model's files; the weights first, so that outputs never exist without them."""
        owner = {"key": self.key, "model": str(model)}
        if weights is not None:
            save_tensors(weights, self.weights_path(model), _WEIGHTS, owner)
        save_tensors(outputs, self.outputs_path(model), _OUTPUTS, owner)

    def outputs(self, model: int) -> dict[str, Tensor]:
        """The outputs that :meth:`save` wrote for one model.

        Raises:
            FileNotFoundError: the model is not stored.
            ValueError: the file is damaged or was changed, or belongs to another model.
        """
        return self._load(self.outputs_path(model), _OUTPUTS, model)

    def weights(self, model: int) -> dict[str, Tensor]:
        """The state dict of one model.

        Raises:
            FileNotFoundError: it was not kept.
            ValueError: the file is damaged or was changed, or belongs to another model.
        """
        path = self.weights_path(model)
        if not path.is_file():
            raise FileNotFoundError(f"no weights of shadow model {model} in {self.folder}; use keep_weights=True.")
        return self._load(path, _WEIGHTS, model)

    def _load(self, path: Path, kind: str, model: int) -> dict[str, Tensor]:
        try:
            file = load_tensors(path, kind, what="file of a shadow model")
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}; {_RETRAINED}") from error
        self._check(path, file.metadata, model)
        return file.tensors

    def _check(self, path: Path, metadata: Mapping[str, str], model: int) -> None:
        if metadata.get("key") != self.key:
            raise ValueError(f"{path} belongs to another run; {_RETRAINED}")
        if metadata.get("model") != str(model):
            raise ValueError(f"{path} holds shadow model {metadata.get('model')}, not {model}; {_RETRAINED}")
