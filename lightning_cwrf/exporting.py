"""A finished model as a file to give away: its weights, a model card, and nothing of its training data."""

from __future__ import annotations

import argparse
import array
from collections.abc import Callable, Mapping
from numbers import Number
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from lightning_cwrf._version import __version__
from lightning_cwrf.auditing import AuditResult
from lightning_cwrf.auditing.tables import markdown_table, markdown_text
from lightning_cwrf.callbacks.common import OncePerModule
from lightning_cwrf.callbacks.defense import defense_of
from lightning_cwrf.callbacks.gradient_mask import GradientMaskCallback
from lightning_cwrf.callbacks.rewind import CriticalRewindCallback
from lightning_cwrf.callbacks.scoring import PrivacyScoringCallback
from lightning_cwrf.checks import check_flag
from lightning_cwrf.defenses.base import own_hparams
from lightning_cwrf.files import check_place, replacing, save_tensors
from lightning_cwrf.lightning_private import trainer_of
from lightning_cwrf.report.inputs import flat_settings
from lightning_cwrf.report.sections import LIMITS
from lightning_cwrf.trainers import callbacks_of
from lightning_cwrf.weights.copies import tensors_of, weights_digest
from lightning_cwrf.weights.selection import how_rewound

_OURS = "lightning_cwrf"


def export(
    model: LightningModule,
    path: str | PathLike[str],
    *,
    audit: AuditResult | None = None,
    title: str | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model without anything that its training left beside the weights, and a model card in Markdown.

    A checkpoint of a hardening also holds the optimizer's state, the mask of the rewound weights, and digests of the
    reference data. An export does not. The card says how the model was hardened, as far as its last Trainer or
    ``settings`` know, what an audit found, and what that does not show.

    Args:
        model: as it is after the fit; a defense that is attached to it is left out.
        path: ``….safetensors`` for the weights alone, or ``….ckpt`` for a Lightning checkpoint that
            ``load_from_checkpoint`` reads, with the module's hyper-parameters. The card is beside it, ``….md``.
        audit: of these weights, for the card. An audit holds scores of single members; the card has only its table.
        title: of the card. Default: the name of the class.
        settings: of the hardening, for the card, where the model was loaded from a file; they may be nested. The card
            is given away with the model: leave out what is private.
        overwrite: replace existing files.

    Returns:
        The path of the weights.

    Raises:
        TypeError: no LightningModule, no AuditResult, a title that is not text, or settings that are no mapping.
        ValueError: another suffix, or a folder; an audit of other weights; hyper-parameters that hold data, for a
            checkpoint; safetensors, of a model whose state dict holds more than tensors.
        FileExistsError: a file exists, and ``overwrite`` is False.

    >>> from tempfile import mkdtemp
    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> path = export(BoringModel(), Path(mkdtemp()) / "model.safetensors")
    >>> print(path.with_suffix(".md").read_text().splitlines()[0])
    # BoringModel
    """
    if not isinstance(model, LightningModule):
        raise TypeError(f"export takes a LightningModule, not {type(model).__name__}.")
    if audit is not None and not isinstance(audit, AuditResult):
        raise TypeError(f"audit must be an AuditResult, not {type(audit).__name__}.")
    check_flag("overwrite", overwrite)
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be text, not {type(title).__name__}.")
    if settings is not None and not isinstance(settings, Mapping):
        raise TypeError(f"settings must be a mapping of names and values, not {type(settings).__name__}.")
    path = Path(path)
    check_place(path)
    if path.suffix not in _WRITERS:
        raise ValueError(f"the file must end with {' or '.join(_WRITERS)}, not {path.suffix!r}.")
    card = path.with_suffix(".md")
    check_place(card)
    existing = [str(each) for each in (path, card) if each.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{' and '.join(existing)} exist; pass overwrite=True to replace them.")
    found = [] if audit is None else _audit_lines(model, audit)
    text = _card(model, path, found, title or _class_of(model).__name__, settings or {})
    _WRITERS[path.suffix](model, path)
    with replacing(card) as part:
        part.write_text(text, encoding="utf-8")
    return path


def _audit_lines(model: LightningModule, audit: AuditResult) -> list[str]:
    """What the card says of an audit, which must be of the model's weights."""
    own = weights_digest(model)
    if not (own and audit.weights):
        why = "the model holds more than plain tensors" if audit.weights else "the audit does not say which it is of"
        return [f"It is not known whether this audit is of these weights: {why}.", "", audit.to_markdown()]
    if own != audit.weights:
        raise ValueError(
            f"the audit is of other weights than those of this {_class_of(model).__name__} (by digest), so its numbers "
            "are not this model's: pass an audit of the model as it is now, "
            "lightning_cwrf.audit(model, members=..., nonmembers=...). MIAAuditCallback's result is of the weights at "
            "the end of its fit; an audit of a wrapped or converted model is not one of the model itself."
        )
    return [f"It is of these weights; their digest (`weights_digest`) is `{own}`.", "", audit.to_markdown()]


def _write_tensors(model: LightningModule, path: Path) -> None:
    tensors, state = tensors_of(model), model.state_dict()
    if tensors.keys() != state.keys():
        more = ", ".join(sorted(state.keys() - tensors.keys())[:5])
        raise ValueError(f"the model's state dict holds more than tensors ({more}); export it as ….ckpt.")
    save_tensors(tensors, path, "pt")  # the format that other programs expect to be named


def _write_checkpoint(model: LightningModule, path: Path) -> None:
    trainer = trainer_of(model)
    checkpoint: dict[str, Any] = {
        # Readers of vanilla weights recognise a trained model by these.
        "epoch": 0 if trainer is None else trainer.current_epoch,
        "global_step": 0 if trainer is None else trainer.global_step,
        "pytorch-lightning_version": pl.__version__,
        "state_dict": {name: _on_cpu(value) for name, value in model.state_dict().items()},
    }
    if hparams := own_hparams(model):
        _check_no_data(hparams)
        checkpoint[model.CHECKPOINT_HYPER_PARAMS_KEY] = dict(hparams)
    model.on_save_checkpoint(checkpoint)  # what the class itself needs to be loaded
    own = {name: value for name, value in checkpoint.items() if not name.startswith(_OURS)}
    with replacing(path) as part:
        torch.save(own, part)


def _check_no_data(hparams: Mapping[str, Any]) -> None:
    """Raise with the hyper-parameters that hold data, which may be training data."""
    found = [name for name, value in hparams.items() if _holds_data(value)]
    if found:
        ignored = ", ".join(map(repr, found))
        raise ValueError(
            f"the hyper-parameters {ignored} hold data (tensors, arrays, data sets, loaders or long lists of numbers), "
            "which an exported checkpoint would give away, training data perhaps: write "
            f"self.save_hyperparameters(ignore=[{ignored}]) in the module's __init__ and train again, or export the "
            "weights alone as ….safetensors."
        )


def _holds_data(value: Any) -> bool:
    if isinstance(value, (torch.Tensor, np.ndarray)) or type(value).__module__.partition(".")[0] in _TABLES:
        return True
    if isinstance(value, (Dataset, DataLoader, LightningDataModule, bytes, bytearray, array.array)):
        return True
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, (list, tuple, set, frozenset)):
        return False
    return _count_numbers(value) > _LONG or any(map(_holds_data, value))


def _count_numbers(value: Any) -> int:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple, set, frozenset)):
        return int(isinstance(value, Number))
    return sum(map(_count_numbers, value))


_LONG = 100
"""Numbers in a list that is still a setting, such as a weight for each class."""
_TABLES = ("pandas", "polars", "pyarrow")

_WRITERS: dict[str, Callable[[LightningModule, Path], None]] = {
    ".safetensors": _write_tensors,
    ".ckpt": _write_checkpoint,
}


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _class_of(model: LightningModule) -> type:
    """The user's class."""
    return getattr(type(model), "_attached_to", type(model))


def _card(model: LightningModule, path: Path, audit: list[str], title: str, settings: Mapping[str, Any]) -> str:
    kind = _class_of(model)
    weights = sum(p.numel() for p in model.parameters())
    lines = [
        f"# {markdown_text(title)}",
        "",
        f"`{kind.__module__}.{kind.__qualname__}`, {weights:,} weights, in `{path.name}`. Written by lightning_cwrf "
        f"{__version__}, with torch {torch.__version__} and lightning {pl.__version__}.",
        "",
        "## How it was hardened",
        "",
        *_recipe(model, settings),
        "",
        "## What an audit found",
        "",
        *(audit or ["No audit was given for this card."]),
        "",
        "## What this does not show",
        "",
        *(f"- {limit}" for limit in LIMITS),
    ]
    return "\n".join(lines) + "\n"


def _recipe(model: LightningModule, settings: Mapping[str, Any]) -> list[str]:
    trainer = trainer_of(model)
    rows = [["setting", "value"]]
    rows += [[name.replace(".", ": "), value] for name, value in flat_settings(settings)]
    if trainer is not None:
        _check_held(model, trainer)
    for callback in [] if trainer is None else callbacks_of(trainer, PrivacyScoringCallback, CriticalRewindCallback):
        rows += _settings(callback)
        if isinstance(callback, CriticalRewindCallback) and callback.mask is not None:
            tune = next((each.tune for each in callbacks_of(trainer, GradientMaskCallback)), "rest")
            done = how_rewound(callback.values, callback.hold, tune)
            rows.append([done, f"{callback.mask.count:,} of {callback.mask.total:,} weights"])
    defense = defense_of(model)
    if defense is not None:
        rows += [[f"defense: {name}", str(value)] for name, value in defense.named().items()]
    if len(rows) == 1:
        return [
            "Nothing is known: no settings were given, and the model's last Trainer had no callback of CWRF or defense."
        ]
    return [
        *markdown_table(rows),
        "",
        "Of the defenses only DP-SGD gives a guarantee, for the data that it trained on.",
    ]


def _check_held(model: LightningModule, trainer: Trainer) -> None:
    """Raise if weights that were held in the model's last fit have other values now: its settings are not theirs."""
    for callback in callbacks_of(trainer, GradientMaskCallback):
        moved = callback.mask.moved(model) if callback.mask is not None and callback.mask.is_frozen else {}
        if moved:
            raise ValueError(
                f"these weights are not those of the model's last fit: {sum(moved.values()):,} weights that were held "
                f"in it have other values now ({', '.join(list(moved)[:3])}). Export right after the fit, or load the "
                "weights into a new model, whose card then says nothing of a hardening."
            )


def _settings(callback: OncePerModule) -> list[list[str]]:
    name = "scoring" if isinstance(callback, PrivacyScoringCallback) else "rewinding"
    done: Mapping[str, Any] = callback.done_with or {}
    return [[f"{name}: {key}", str(value)] for key, value in done.items() if value is not None]
