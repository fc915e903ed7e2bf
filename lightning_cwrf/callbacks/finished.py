"""Loading the finished weights at the start of a hardening."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_cwrf.callbacks.common import OncePerModule, saved_state
from lightning_cwrf.data.seen import SEEN_KEY, load_seen_state
from lightning_cwrf.files import digest
from lightning_cwrf.weights.reading import check_values, read_finished


class FinishedWeightsCallback(OncePerModule):
    """Loads the weights of a finished training before a hardening starts, and nothing else of its checkpoint.

    For a run that is written in YAML, where no code calls ``load_from_checkpoint``. Resuming the finished checkpoint
    (``ckpt_path``) would bring its optimizer, schedule and epoch along, and train nothing. A hardening that was
    killed resumes as usual: its own checkpoint says that the finished weights were loaded.

    Put it first among the callbacks, so that those after it see the finished weights.

    Args:
        path: a Lightning checkpoint, a saved state dict, or a safetensors file, recognised by content and read
            without pickle. Weights that it lacks are an error, and so are unknown ones, unless the module's
            ``strict_loading`` is False; then a warning lists both.

    Raises:
        TypeError: not a path.
        FileNotFoundError: when the fit starts: there is no such file.
        ValueError: likewise: the file cannot be read, or its weights do not fit the module.
        MisconfigurationException: likewise: the fit resumes from a checkpoint of another training.

    >>> FinishedWeightsCallback("finished.ckpt").path.name
    'finished.ckpt'
    """

    why_not_sharded = (
        "it loads whole weights into a whole model. Load them before the fit, in the module's configure_model"
    )

    def __init__(self, path: str | PathLike[str]) -> None:
        if not isinstance(path, (str, PathLike)):
            raise TypeError(f"path must be that of a file of weights, not a {type(path).__name__}.")
        self.path = Path(path)

        self.reset()

    def reset(self) -> None:
        self._loaded: str | None = None

    def settings(self) -> dict[str, Any]:
        if self._loaded is None and self.path.is_file():  # a resumed run, which does not need the file
            return {"weights": digest(self._read()[1])}
        return {"weights": self._loaded}

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().prepare(trainer, pl_module, stage)
        # A resumed run restores its own weights after this, and does not need the file.
        if stage != "fit" or self.done_with is not None or not self.path.is_file():
            return
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # makes the layers; Lightning calls it again, as it may
        self._load(pl_module)
        self.done_with = self.settings()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.done_with is None:
            raise FileNotFoundError(f"there are no finished weights at {self.path}.")
        super().on_fit_start(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn == TrainerFn.FITTING and self.state_key not in checkpoint.get("callbacks", {}):
            raise MisconfigurationException(
                "this run resumes from a checkpoint of another training, with its optimizer, schedule and epoch, so "
                f"{type(self).__name__} would load nothing. To harden a finished model, leave ckpt_path out."
            )

    @saved_state
    def state_dict(self) -> dict[str, Any]:
        return {} if self.done_with is None else {"settings": self.done_with}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done_with = state_dict["settings"]

    def _load(self, module: LightningModule) -> None:
        loaded, state = self._read()
        if state is not loaded:
            module.on_load_checkpoint(loaded)  # as load_from_checkpoint does
            load_seen_state(module, loaded.get(SEEN_KEY, {}))
        self._check_fit(module, state)
        module.load_state_dict(state, strict=False)
        self._loaded = digest(state)

    def _read(self) -> tuple[Any, Mapping[str, Tensor]]:
        return read_finished(self.path)

    def _check_fit(self, module: LightningModule, state: Mapping[str, Any]) -> None:
        own = module.state_dict()
        faults = [f"lack {name!r}" for name in own if name not in state]
        faults += [f"have an unknown {name!r}" for name in state if name not in own]
        if faults and module.strict_loading is False and own.keys() & state.keys():
            rank_zero_warn(f"the finished weights in {self.path} {_listed(faults)}: strict_loading is False.")
            faults = []
        tensors = ((name, value) for name, value in own.items() if isinstance(value, Tensor) and not is_lazy(value))
        sized = {name: value for name, value in tensors if name in state}
        faults += [
            f"have {name!r} of shape {tuple(state[name].shape)} instead of {tuple(value.shape)}"
            for name, value in sized.items()
            if state[name].shape != value.shape
        ]
        if faults:
            raise ValueError(
                f"the finished weights in {self.path} {_listed(faults)}. Build the module with the arguments of its "
                "first training."
            )
        check_values(module, state, self.path)


def _listed(faults: list[str]) -> str:
    more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
    return f"{'; '.join(faults[:5])}{more}"
