"""Reading a recipe off a training. Anything that cannot be read is an error that says what to pass instead."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    Timer,
)
from torch import nn
from torch.utils.data import DataLoader, default_collate

from lightning_cwrf.callbacks import DefenseCallback
from lightning_cwrf.data import reads_alike
from lightning_cwrf.data.poisson import users_loader, whole_order
from lightning_cwrf.defenses import Defense, DefenseMixin
from lightning_cwrf.defenses.base import own_hparams
from lightning_cwrf.defenses.monitors import is_training_metric
from lightning_cwrf.lightning_private import trainer_of
from lightning_cwrf.recipes.compare import original_class
from lightning_cwrf.recipes.cwrf import config_of
from lightning_cwrf.shadows.identity import identity
from lightning_cwrf.trainers import refuse_pytorch_lightning

_OBSERVERS = (Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar)
"""Callbacks that observe a training and do not shape it."""

_TRAINER: dict[str, Any] = {
    "min_epochs": 0,
    "max_steps": -1,
    "min_steps": None,
    "precision": "32-true",
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "accumulate_grad_batches": 1,
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
}
"""Arguments of a Trainer that shape a training, and their defaults, which are left out of a recipe."""


def read_training(
    trainer: Trainer,
    model: LightningModule,
    build_module: Callable[[], LightningModule] | None,
    loader: DataLoader[Any] | None,
    augment: Callable[[Any], Any] | None,
    callbacks: Callable[[], list[Callback]] | None,
    defense: Defense | None,
) -> dict[str, Any]:
    """The fields of a :class:`~lightning_cwrf.ShadowRecipe`; the arguments are those of its ``like``."""
    refuse_pytorch_lightning(trainer, model)
    if not isinstance(model, LightningModule):
        raise TypeError(f"like reads the training of a LightningModule, not of a {type(model).__name__}.")
    given: Any = trainer
    if not isinstance(given, Trainer):
        what = given.__name__ if isinstance(given, type) else f"a {type(given).__name__}"
        raise TypeError(f"like reads a Trainer of lightning.pytorch, not {what}: ShadowRecipe.like(trainer, model).")
    if trainer.train_dataloader is not None and trainer_of(model) is not trainer:
        raise ValueError(
            "this model's last Trainer is another one, so its defense may belong to another training: read each recipe "
            "with the Trainer that trained the model, before another Trainer takes it."
        )
    attached: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    defense = _defense_of(model, attached) if defense is None else defense
    if loader is None and trainer.train_dataloader is None:
        raise ValueError("this Trainer has not trained yet: pass loader=, the training loader.")
    found: Any = users_loader(trainer.train_dataloader) if loader is None else loader
    _check_schedulers(trainer, model)
    return {
        "build_module": _module_of(model) if build_module is None else build_module,
        "trainer_kwargs": _arguments_of(trainer, attached),
        **_batches_of(found, trainer.world_size, augment),
        "augment": augment,
        "callbacks": callbacks,
        "defense": defense,
        "cwrf": _cwrf_of(attached, callbacks is not None, found, augment is not None),
    }


def _defense_of(model: LightningModule, callbacks: Sequence[Callback]) -> Defense | None:
    """A DefenseCallback's, or the attached one; None: there is none, or the class inherits one and builds it again."""
    given = next((each.defense for each in callbacks if isinstance(each, DefenseCallback)), None)
    if given is None and isinstance(model, DefenseMixin) and original_class(model) is not type(model):
        given = model.defense
    return given


def _module_of(model: LightningModule) -> Callable[[], LightningModule]:
    cls = original_class(model)
    given = own_hparams(model)
    modules = [name for name, value in given.items() if isinstance(value, nn.Module)]
    if modules:
        raise ValueError(
            f"the hyper-parameter {modules[0]} is a module, with its present weights; pass build_module=, a function "
            f"that builds the {cls.__name__} with an untrained one."
        )
    _warn_of_changes(given, model.hparams_initial)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return functools.partial(cls, **given)
    named = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    unknown = [name for name in named if name not in given]
    if unknown:
        raise ValueError(
            f"how this {cls.__name__} was built is unknown: its hyper-parameters lack {', '.join(unknown)}. Call "
            "save_hyperparameters() in its __init__, of all its arguments, or pass build_module=, a function that "
            "builds it."
        )
    return functools.partial(cls, **{name: given[name] for name in named})


def _warn_of_changes(now: Mapping[str, Any], initial: Mapping[str, Any]) -> None:
    """Warn of hyper-parameters that changed after the module was built, before or after its training."""
    changed = [name for name, value in now.items() if name in initial and _content(value) != _content(initial[name])]
    if changed:
        changes = ", ".join(f"{name} was {initial[name]!r} and is {now[name]!r} now" for name in changed)
        warnings.warn(
            f"hyper-parameters were changed after the module was built ({changes}); the recipe takes the present "
            "values. If the training used others, pass build_module=, a function that builds the module with those.",
            stacklevel=6,
        )


def _content(value: Any) -> str:
    return identity(value, version="ignores what has no comparable content")


def _arguments_of(trainer: Trainer, callbacks: Sequence[Callback]) -> dict[str, Any]:
    if trainer.interrupted:
        raise ValueError("this training was interrupted: shadow models of its settings would train on to the end.")
    if any(isinstance(callback, Timer) for callback in callbacks):
        raise ValueError(
            "this training ends by the clock (max_time, Timer): shadow models that train in parallel would end at "
            "another step. Give it max_epochs or max_steps."
        )
    read = {name: getattr(trainer, name) for name in _TRAINER}
    algorithm = read["gradient_clip_algorithm"]
    read["gradient_clip_algorithm"] = getattr(algorithm, "value", algorithm)
    changed = {name: value for name, value in read.items() if value not in (None, _TRAINER[name])}
    return {"max_epochs": trainer.max_epochs, **changed}


def _check_schedulers(trainer: Trainer, model: LightningModule) -> None:
    """Raise for a scheduler that waits for a metric of the validation."""
    for config in trainer.lr_scheduler_configs if trainer.train_dataloader is not None else ():
        validated = config.reduce_on_plateau and trainer.val_dataloaders is not None
        if validated and not (config.monitor and is_training_metric(model, config.monitor)):
            raise ValueError(
                f"a scheduler waits for {config.monitor!r}, and shadow models have no validation data; let it monitor "
                "a training metric, or write the recipe as a function of your own."
            )


def _batches_of(loader: Any, world_size: int, augment: Callable[[Any], Any] | None) -> dict[str, Any]:
    order = whole_order(loader)
    if order is None:
        sampler = type(getattr(getattr(loader, "batch_sampler", None), "sampler", None)).__name__
        why = f" (its {sampler} draws some examples, or some more often)" if sampler.endswith("Sampler") else ""
        raise ValueError(
            f"this training loader cannot be read{why}: pass loader=, a DataLoader that reads a whole data set in "
            "order or shuffled (in place of a sampler of some examples, one over their Subset), or write the recipe as "
            "a function."
        )
    some = DataLoader(loader.dataset, batch_size=16, collate_fn=loader.collate_fn)
    if augment is None and not reads_alike(some):
        raise ValueError(
            "the training data read differently each time (random augmentation), as they must for shadow models: pass "
            "augment=, a function of one example; the pool is read without it."
        )
    return {
        "batch_size": loader.batch_sampler.batch_size * world_size,
        "drop_last": loader.batch_sampler.drop_last,
        "shuffle": order == "shuffled",
        "examples": len(loader.dataset),
        "collate_fn": None if loader.collate_fn is default_collate else loader.collate_fn,
    }


def _cwrf_of(callbacks: Sequence[Callback], others_given: bool, loader: Any, augmented: bool) -> Any:
    others = [
        type(callback).__name__
        for callback in callbacks
        if not isinstance(callback, _OBSERVERS) and not type(callback).__module__.startswith("lightning_cwrf.")
    ]
    if others and not others_given:
        raise ValueError(
            f"{', '.join(others)} may shape the training: pass callbacks=, a function that makes those which do "
            "(callbacks=list for none: shadow models then train to the end)."
        )
    return config_of(callbacks, loader, augmented=augmented)
