"""Reading a recipe off a training: what can be read is, and what cannot is an error that says what to pass."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sized
from typing import TYPE_CHECKING, Any, Literal

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

from lightning_cwrf.callbacks import (
    CriticalRewindCallback,
    DefenseCallback,
    GradientMaskCallback,
    PrivacyScoringCallback,
)
from lightning_cwrf.data import all_digests, isolated_rng, reads_alike
from lightning_cwrf.data.poisson import users_loader, whole_order
from lightning_cwrf.defenses import Defense, DefenseMixin
from lightning_cwrf.defenses.base import own_hparams
from lightning_cwrf.recipes.cwrf import CWRF
from lightning_cwrf.shadows.identity import identity

if TYPE_CHECKING:
    from lightning_cwrf.recipes.recipe import ShadowRecipe

_WATCHERS = (Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar)
"""Callbacks that look at a training and do not shape it."""

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
"""Arguments of a Trainer that shape a training, and the values that need not be said."""


def read_recipe(
    kind: type[ShadowRecipe],
    trainer: Trainer,
    model: LightningModule,
    module: Callable[[], LightningModule] | None,
    loader: DataLoader[Any] | None,
    augment: Callable[[Any], Any] | None,
    callbacks: Callable[[], list[Callback]] | None,
    defense: Defense | None,
) -> ShadowRecipe:
    """See :meth:`~lightning_cwrf.ShadowRecipe.like`."""
    if not isinstance(model, LightningModule):
        raise TypeError(f"like reads the training of a LightningModule, not of a {type(model).__name__}.")
    given: Any = trainer
    if not isinstance(given, Trainer):
        what = given.__name__ if isinstance(given, type) else f"a {type(given).__name__}"
        raise TypeError(f"like reads a Trainer of lightning.pytorch, not {what}: ShadowRecipe.like(trainer, model).")
    if trainer.train_dataloader is not None and model._trainer is not trainer:
        raise ValueError(
            "this model's last Trainer is another one, so its defense may be of another training: read each recipe "
            "with the Trainer that made the model, before another one takes it."
        )
    defense = _defense_of(trainer, model) if defense is None else defense
    found = _loader_of(trainer) if loader is None else loader
    _check_schedulers(trainer)
    recipe = kind(
        module=_module_of(model) if module is None else module,
        trainer=_arguments_of(trainer),
        **_batches_of(found, trainer.world_size, augment),
        augment=augment,
        callbacks=callbacks,
        defense=defense,
        cwrf=_cwrf_of(trainer, callbacks is not None, found, augment is not None),
    )
    _check_rebuilds(recipe, model, may_freeze=callbacks is not None)
    return recipe


def _module_of(model: LightningModule) -> Callable[[], LightningModule]:
    cls: Any = getattr(type(model), "_attached_to", type(model))
    given = own_hparams(model)
    modules = [name for name, value in given.items() if isinstance(value, nn.Module)]
    if modules:
        raise ValueError(
            f"the hyper-parameter {modules[0]} is a module, with the weights it has now; pass module=, a function that "
            f"builds the {cls.__name__} with an untrained one."
        )
    _warn_of_changes(given, model.hparams_initial)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return functools.partial(cls, **given)
    named = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    unknown = [name for name in named if name not in given]
    if unknown:
        raise ValueError(
            f"how this {cls.__name__} was built cannot be told: its hyper-parameters lack {', '.join(unknown)}. Call "
            "save_hyperparameters() in its __init__, of all its arguments, or pass module=, a function that builds it."
        )
    return functools.partial(cls, **{name: given[name] for name in named})


def _warn_of_changes(now: Mapping[str, Any], initial: Mapping[str, Any]) -> None:
    """Hyper-parameters set after the module was built: before its training (a learning rate finder) or after it."""
    changed = [name for name, value in now.items() if name in initial and _told(value) != _told(initial[name])]
    if changed:
        said = ", ".join(f"{name} was {initial[name]!r} and is {now[name]!r} now" for name in changed)
        warnings.warn(
            f"hyper-parameters were changed after the module was built ({said}); the recipe takes them as they are "
            "now. If the training used others, pass module=, a function that builds the module with those.",
            stacklevel=5,
        )


def _told(value: Any) -> str:
    return identity(value, version="of what cannot be told, nothing is compared")


def _arguments_of(trainer: Trainer) -> dict[str, Any]:
    if trainer.interrupted:
        raise ValueError("this training was interrupted: shadow models of its settings would train on to the end.")
    timer = next((c for c in _callbacks_of(trainer) if isinstance(c, Timer)), None)
    if timer is not None:
        raise ValueError(
            "this training ends by the clock (max_time, Timer), which shadow models beside one another would do "
            "elsewhere; give it max_epochs or max_steps."
        )
    read = {name: getattr(trainer, name) for name in _TRAINER}
    algorithm = read["gradient_clip_algorithm"]
    read["gradient_clip_algorithm"] = getattr(algorithm, "value", algorithm)
    said = {name: value for name, value in read.items() if value not in (None, _TRAINER[name])}
    return {"max_epochs": trainer.max_epochs, **said}


def _check_schedulers(trainer: Trainer) -> None:
    for config in trainer.lr_scheduler_configs if trainer.train_dataloader is not None else ():
        if config.reduce_on_plateau and trainer.val_dataloaders is not None:
            raise ValueError(
                f"a scheduler waits for {config.monitor!r}, and shadow models have no validation data; let it monitor "
                "a training metric, or write the recipe as a function of your own."
            )


def _loader_of(trainer: Trainer) -> Any:
    loader = trainer.train_dataloader
    if loader is None:
        raise ValueError("this Trainer has not trained yet: pass loader=, the training loader.")
    return users_loader(loader)


def _batches_of(loader: Any, world_size: int, augment: Callable[[Any], Any] | None) -> dict[str, Any]:
    order = whole_order(loader)
    if order is None:
        raise ValueError(
            "this training loader cannot be read: pass loader=, a DataLoader that takes a whole data set in order or "
            "shuffled (with a sampler of some examples, one over their Subset), or write the recipe as a function."
        )
    some = DataLoader(loader.dataset, batch_size=16, collate_fn=loader.collate_fn)
    if augment is None and not reads_alike(some):
        raise ValueError(
            "the training data read differently each time (random augmentation), which shadow models must do too: "
            "pass augment=, a function of one example; the pool is read without it."
        )
    return {
        "batch_size": loader.batch_sampler.batch_size * world_size,
        "drop_last": loader.batch_sampler.drop_last,
        "shuffle": order == "shuffled",
        "examples": len(loader.dataset),
        "collate": None if loader.collate_fn is default_collate else loader.collate_fn,
    }


def _defense_of(trainer: Trainer, model: LightningModule) -> Defense | None:
    callbacks = [each for each in _callbacks_of(trainer) if isinstance(each, DefenseCallback)]
    if callbacks:
        return callbacks[0].defense
    # By inheritance it is part of the class.
    return model.defense if isinstance(model, DefenseMixin) and hasattr(type(model), "_attached_to") else None


def _cwrf_of(trainer: Trainer, others_given: bool, loader: Any, augmented: bool) -> CWRF | None:
    ours: dict[type, Any] = {}
    others = []
    for callback in _callbacks_of(trainer):
        if isinstance(callback, (PrivacyScoringCallback, CriticalRewindCallback, GradientMaskCallback)):
            ours[type(callback)] = callback
        elif not isinstance(callback, _WATCHERS) and not type(callback).__module__.startswith("lightning_cwrf."):
            others.append(type(callback).__name__)
    if others and not others_given:
        raise ValueError(
            f"{', '.join(others)} may shape the training: pass callbacks=, a function that makes those which do "
            "(callbacks=list for none: shadow models then train to the end)."
        )
    if not ours:
        return None
    scoring, rewind, mask = (
        ours.get(kind) for kind in (PrivacyScoringCallback, CriticalRewindCallback, GradientMaskCallback)
    )
    if not (scoring and rewind and mask):
        raise ValueError(
            "shadow models score, rewind and freeze their own weights: the Trainer needs PrivacyScoringCallback, "
            "CriticalRewindCallback and GradientMaskCallback."
        )
    settings = {name: value for each in (scoring, rewind, mask) for name, value in _settings_of(each).items()}
    return CWRF(
        **settings,
        vanilla="redraw" if isinstance(scoring.vanilla, str) and scoring.vanilla == "redraw" else "own",
        members=_members_of(scoring, loader, augmented),
    )


def _settings_of(callback: Callback) -> dict[str, Any]:
    """A callback's settings that :class:`CWRF` has too; any other that was given is an error."""
    kind = type(callback)
    known = {field.name for field in dataclasses.fields(CWRF)}
    settings = {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if (kind, name) in _READ_BY_THEMSELVES:
            continue
        value = getattr(callback, _HELD_AS.get(name, name))
        if name in known and (kind, name) not in _REFUSED:
            settings[name] = value
        elif value is not parameter.default:
            why = _REFUSED.get((kind, name), "CWRF has no such setting")
            raise ValueError(
                f"{kind.__name__}({name}=...) cannot be carried to shadow models: {why}. Leave it out, or write the "
                "recipe as a function of your own."
            )
    return settings


_READ_BY_THEMSELVES = {(PrivacyScoringCallback, "vanilla"), (PrivacyScoringCallback, "members")}

_HELD_AS = {"mask": "given_mask"}
"""Attributes of callbacks that are not called as the parameter is."""

_REFUSED: dict[tuple[type, str], str] = {
    (CriticalRewindCallback, "scores"): "each shadow model scores its own weights, on its own members",
    (CriticalRewindCallback, "mask"): "each shadow model chooses its own weights, by its own scores",
    (CriticalRewindCallback, "vanilla"): "each shadow model is rewound to the weights that it is scored against",
    (GradientMaskCallback, "mask"): "each shadow model chooses its own weights, by its own scores",
}
"""Settings of a callback that belong to one model, and why."""


def _members_of(scoring: PrivacyScoringCallback, loader: Any, augmented: bool) -> Literal["training", "plain"]:
    """Whether the model was scored on its training batches or on its members as the data set gives them."""
    given = scoring.members
    if given is None:
        return "training"
    source = given.dataset if isinstance(given, DataLoader) else given
    if augmented:  # their content differs each time
        same = isinstance(source, Sized) and len(source) == len(loader.dataset)
    else:
        trained = DataLoader(loader.dataset, batch_size=256, collate_fn=loader.collate_fn)
        with isolated_rng():
            found = all_digests(given)
            same = found is not None and found == all_digests(trained)
    if not same:
        raise ValueError(
            "PrivacyScoringCallback(members=...) are other data than the training data, and what a shadow model should "
            "score on instead cannot be told. Pass the plain training data, leave members out, or write the recipe as "
            "a function of your own."
        )
    return "plain"


def _callbacks_of(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _check_rebuilds(recipe: ShadowRecipe, model: LightningModule, may_freeze: bool) -> None:
    with isolated_rng():
        rebuilt = recipe.build()
    shapes: list[Mapping[str, Any]] = [
        {name: tuple(value.shape) for name, value in each.state_dict().items()} for each in (rebuilt, model)
    ]
    if shapes[0] != shapes[1]:
        names = sorted(n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
        raise ValueError(
            f"the module that was built anew has other weights than the model, such as {names[0]}; pass module=, a "
            "function that builds it as it was."
        )
    trained: list[Mapping[str, bool]] = [
        {name: p.requires_grad for name, p in each.named_parameters()} for each in (rebuilt, model)
    ]
    changed = [name for name in trained[1] if trained[0][name] != trained[1][name]]
    if changed and not may_freeze:
        now = "trained" if trained[1][changed[0]] else "frozen"
        raise ValueError(
            f"{len(changed)} parameters, such as {changed[0]}, are {now} in the model (requires_grad) and not in the "
            "module that was built anew; pass module=, a function that builds it and sets requires_grad as for the "
            "training."
        )
    if isinstance(model, DefenseMixin) and not isinstance(rebuilt, DefenseMixin):
        raise ValueError("the model has a defense which the module that was built anew has not; pass defense=.")
