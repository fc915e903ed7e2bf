"""The user's model with its finished weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_cwrf.commands.base import UsageError
from lightning_cwrf.commands.objects import (
    checked_arguments,
    imported_class,
    made,
    one_line,
    path_and_arguments,
)
from lightning_cwrf.data.seen import SEEN_KEY, load_seen_state
from lightning_cwrf.weights.reading import read_finished

_LIGHTNING = "pytorch-lightning_version"
"""The key by which Lightning marks its checkpoints."""
_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def load_model(options: Any) -> LightningModule:
    """The model with its finished weights."""
    path, given = path_and_arguments("model", options.model, options.model_args)
    cls = imported_class("model", path, LightningModule)
    given = checked_arguments("model", cls, given)
    if options.checkpoint is None:
        model: LightningModule = made("model", path, given, LightningModule)
        return model
    file = Path(options.checkpoint)
    if not file.is_file():
        raise UsageError(f"--checkpoint: there is no file {file}.")
    try:
        loaded, state = read_finished(file, unpickle=options.unpickle)
        if _LIGHTNING in loaded:
            model = cls.load_from_checkpoint(file, map_location="cpu", weights_only=not options.unpickle, **given)
            load_seen_state(model, loaded.get(SEEN_KEY, {}))
        else:
            model = made("model", path, given, LightningModule)
            model.load_state_dict(state)
        _check_values(model, state, file)
    except UsageError:
        raise
    except TypeError as error:
        raise UsageError(
            f"--model {path} cannot be built ({one_line(error)}), and the checkpoint does not say with what "
            "(save_hyperparameters). Pass the arguments: --model.NAME VALUE."
        ) from error
    except ValueError as error:
        hint = " Or pass --unpickle, if the file is your own." if "can run code" in str(error) else ""
        raise UsageError(f"--checkpoint: {_shortened(error)}{hint}") from error
    except Exception as error:
        raise UsageError(f"--checkpoint {file} does not fit {path}: {_shortened(error)}") from error
    return model


def check_no_hooks(option: str, path: str, cls: type, base: type) -> None:
    """Raise where a class changes batches in hooks, which an audit of a finished model does not run."""
    own = [name for name in _HOOKS if getattr(cls, name) is not getattr(base, name)]
    if own:
        raise UsageError(
            f"--{option}: {path} has {', '.join(own)}, which a Trainer runs on each batch and an audit does not. Do "
            "the same in the data set, or in the model's forward."
        )


def _check_values(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Raise for values that no training gives, which would be copied without a word."""
    own = model.state_dict()
    for name, value in own.items():
        given = state.get(name)
        if given is not None and value.is_floating_point() and not given.is_floating_point():
            raise ValueError(
                f"{file} has {name!r} as {given.dtype}, and the model has {value.dtype}: save its weights."
            )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{file} has NaN or infinite values in {name!r}: the training diverged.")
    for name, buffer in model.named_buffers():  # a mask may hold infinite values
        if name in own and buffer.is_floating_point() and torch.isnan(buffer).any():
            raise ValueError(f"{file} has NaN values in {name!r}: the training diverged.")


def _shortened(error: Exception, most: int = 500) -> str:
    text = one_line(error)
    return text if len(text) <= most else f"{text[:most].rstrip()} ..."
