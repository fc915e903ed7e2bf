"""The user's model, finished weights and data, from import paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, Dataset

from lightning_cwrf.commands.base import UsageError
from lightning_cwrf.commands.finished import check_no_hooks, load_model
from lightning_cwrf.commands.members import check_fixed, check_plain
from lightning_cwrf.commands.objects import Named, imported, made, one_line, path_and_arguments
from lightning_cwrf.data import Batches, check_batches, isolated_rng
from lightning_cwrf.trainers import SPLITS, datamodule_loader

MODEL_OBJECTS = ("model", "data", "members", "plain", "nonmembers")
_SPLIT = (
    "a split of --data (train, val, test, predict), or the import path of a data set, a loader or a function of one"
)


def add_weights_options(parser: Any, *, finished: bool = True) -> None:
    """The options that say which model, with which weights."""
    parser.add_argument(
        "--model", type=Named, help="import path of your LightningModule; --model.width 8 sets an argument of it"
    )
    parser.add_argument(
        "--checkpoint",
        type=str,
        help="the finished weights: a Lightning checkpoint (its hyper-parameters build the model; arguments given here "
        "win), a state dict, or a safetensors file" + ("" if finished else ". Default: the model as it is built"),
    )
    parser.add_argument(
        "--unpickle",
        action="store_true",
        help="read a checkpoint that holds other Python objects than tensors: that can run code, so only for your own",
    )


def add_model_options(parser: Any, *, finished: bool = True) -> None:
    """The options that say what is hardened or audited."""
    add_weights_options(parser, finished=finished)
    parser.add_argument("--data", type=Named, help="import path of your LightningDataModule, likewise")
    parser.add_argument("--members", type=Named, default="train", help=f"what the model was trained on: {_SPLIT}")
    parser.add_argument(
        "--plain", type=Named, help="the members without random augmentation, likewise; needed where --members has it"
    )
    parser.add_argument("--nonmembers", type=Named, default="test", help="what it never saw, for the audit, likewise")
    parser.add_argument("--batch_size", type=int, help="for data sets that come without a loader")
    parser.add_argument("--accelerator", type=str, default="auto", help="as for a Trainer: cpu, gpu, ...")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")


@dataclass
class Loaded:
    """A user's finished model and data."""

    model: LightningModule
    members: Batches
    plain: Batches | None
    nonmembers: Batches
    device: torch.device
    source: Source
    options: Any

    @property
    def audited(self) -> dict[str, Batches]:
        """The two sides of an audit."""
        return {"members": self.members if self.plain is None else self.plain, "nonmembers": self.nonmembers}

    def data(self, name: str) -> Batches | None:
        """The data of another option; None where it was not given."""
        return self.source.split(name)

    def again(self) -> LightningModule:
        """The finished model once more."""
        return load_model(self.options)


@dataclass
class Source:
    """The user's DataModule, and the options that name parts of it."""

    options: Any
    datamodule: LightningDataModule | None

    def split(self, name: str) -> Batches | None:
        """The data that the option of this name names."""
        given: Named | None = getattr(self.options, name)
        if given is None:
            return None
        path, arguments = path_and_arguments(name, given, getattr(self.options, f"{name}_args", {}))
        return self.named(name, path, arguments)

    def validation(self) -> Batches | None:
        """The validation split, where there is one."""
        has = self.datamodule is not None and is_overridden("val_dataloader", self.datamodule)
        return self.named("reference", "val", {}) if has else None

    def named(self, option: str, path: str, arguments: Mapping[str, Any]) -> Batches:
        """A split by name, or what an import path gives."""
        if "." not in path:
            split: Any = path
            if split not in SPLITS:
                raise UsageError(f"--{option}: there is no split {path!r}; write {_SPLIT}.")
            if arguments:
                named = ", ".join(arguments)
                raise UsageError(f"--{option} {path} is a split of --data, which takes no argument {named}.")
            if self.datamodule is None:
                raise UsageError(f"--{option} {path} is a split of a DataModule: pass --data, or an import path.")
            try:
                found: Any = datamodule_loader(self.datamodule, split)
            except Exception as error:
                raise UsageError(f"--{option} {path}: {one_line(error)}") from error
        else:
            found = made(option, path, arguments)
        try:
            check_batches(found)
        except TypeError as error:
            raise UsageError(f"--{option} {path}: {error}") from error
        if isinstance(found, Dataset) and self.options.batch_size is not None:
            return DataLoader(found, batch_size=self.options.batch_size, shuffle=option == "members")  # to train with
        data: Batches = found
        return data


def load(options: Any) -> Loaded:
    """Build the model, load its weights and find its data."""
    for name in ("model", "data") if options.data is not None or "." not in str(options.members) else ("model",):
        if getattr(options, name) is None:
            example = {"model": "mine.Net", "data": "mine.Data"}[name]
            raise UsageError(f"--{name} is missing: pass the import path of your class, such as {example}.")
    _check_sides(options)
    seed_everything(options.seed, workers=True, verbose=False)
    model = load_model(options)
    check_no_hooks("model", path_and_arguments("model", options.model, {})[0], type(model), LightningModule)
    source = Source(options, _datamodule(options))
    members, nonmembers = source.split("members"), source.split("nonmembers")
    assert members is not None
    assert nonmembers is not None
    with isolated_rng():
        seed_everything(options.seed ^ 1, workers=True, verbose=False)
        again = Source(options, _datamodule(options)).split("members")
        seed_everything(options.seed, workers=True, verbose=False)  # it sets an environment variable too
    assert again is not None
    check_fixed(members, again)
    plain = source.split("plain")
    if plain is not None:
        check_plain(members, plain)
    return Loaded(model, members, plain, nonmembers, _device(options.accelerator), source, options)


def _datamodule(options: Any) -> LightningDataModule | None:
    if options.data is None:
        return None
    path, given = path_and_arguments("data", options.data, options.data_args)
    found: LightningDataModule = made("data", path, given, LightningDataModule)
    try:
        found.prepare_data()
    except Exception as error:
        raise UsageError(f"--data: {path}.prepare_data failed ({type(error).__name__}: {one_line(error)}).") from error
    check_no_hooks("data", path, type(found), LightningDataModule)
    return found


def _check_sides(options: Any) -> None:
    sides = {name: getattr(options, name, None) for name in ("members", "nonmembers", "reference")}
    given = {name: (side, getattr(options, f"{name}_args", {})) for name, side in sides.items() if side is not None}
    for first, second in (("members", "nonmembers"), ("members", "reference"), ("reference", "nonmembers")):
        if first in given and second in given and given[first] == given[second]:
            raise UsageError(
                f"--{first} and --{second} are both {sides[first]!r}: the model's training data, reference data and "
                "non-members must be three different sets."
            )


def _device(accelerator: str) -> torch.device:
    try:
        trainer = Trainer(accelerator=accelerator, devices=1, **SILENT)
    except Exception as error:
        raise UsageError(f"--accelerator {accelerator}: {one_line(error)}") from error
    return trainer.strategy.root_device


SILENT: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}


def vanilla_of(given: str | None) -> Any:
    """``--vanilla``: a file, ``"redraw"``, or what makes an untrained module, by its import path."""
    if given is None or given == "redraw" or Path(given).is_file():
        return given
    if Path(given).suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") or "/" in given or "." not in given:
        raise UsageError(
            f"--vanilla: there is no file {given}. VanillaSnapshotCallback saves it in the first training; 'redraw' "
            "draws new weights; or pass the import path of a function that returns the untrained module."
        )
    return imported("vanilla", given)
