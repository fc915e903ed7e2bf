"""The user's model with its finished weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from lightning_cwrf.commands.base import UsageError
from lightning_cwrf.commands.objects import (
    checked_arguments,
    imported_class,
    made,
    one_line,
    path_and_arguments,
)
from lightning_cwrf.data.seen import SEEN_KEY, load_seen_state
from lightning_cwrf.weights.reading import check_values, read_finished

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
        check_values(model, state, file)
        check_values(model, model.state_dict(), file)  # as its own on_load_checkpoint has changed them
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


def _shortened(error: Exception, most: int = 500) -> str:
    text = one_line(error)
    return text if len(text) <= most else f"{text[:most].rstrip()} ..."
