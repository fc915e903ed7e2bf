"""Metrics that callbacks and schedulers wait for, and that go with the training step which a defense replaces."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import CodeType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchmetrics import Metric

from lightning_cwrf.data import isolated_rng
from lightning_cwrf.data.loading import some_batches
from lightning_cwrf.data.poisson import users_loader
from lightning_cwrf.trainers import callbacks_of, transfer_of
from lightning_cwrf.weights.copies import copied

OURS = "train_loss"
"""What a defense logs its loss as, each step and each epoch."""


def check_monitors(module: LightningModule, root: Any, name: str) -> None:
    """Raise where a callback or a scheduler of the Trainer waits for a metric that only the replaced step logs.

    What that step logs is found by running it once, without gradients, on a copy of the module whose ``log`` only
    notes names. Where it does not run there, the strings in its code are taken.

    Args:
        module: in ``on_train_start``, with a defense.
        root: the class whose ``training_step`` replaces the user's own.
        name: of the defense.

    Raises:
        MisconfigurationException: with the metrics, and who waits for them.

    Warns:
        The metric is the defense's own loss.
    """
    waiting = _waiting(module.trainer)
    for monitor in waiting.keys() & _forms(OURS):
        rank_zero_warn(
            f"{' and '.join(waiting.pop(monitor))} monitors {monitor!r}, which is now the loss of {name}: it may be "
            "negative, and a lower one is not a better model. Monitor a validation metric."
        )
    if not waiting:
        return
    logged = _logged_by(module, lambda each: super(root, each).training_step)
    others = _logged_elsewhere(module)
    lost = [monitor for monitor in waiting if monitor in logged and monitor not in others]
    if lost:
        who = sorted({each for monitor in lost for each in waiting[monitor]})
        raise MisconfigurationException(
            f"{name} replaces this module's training_step, so nothing logs {', '.join(map(repr, lost))}, which "
            f"{' and '.join(who)} would wait for. Log it in validation_step, monitor another metric, or leave "
            f"{'these' if len(who) > 1 else 'this'} out of the Trainer of this fit."
        )


def is_training_metric(module: LightningModule, monitor: str) -> bool:
    """Whether the training step of a module that has been fitted logs a metric, and its validation does not."""
    if monitor in _forms(OURS):
        return True
    return monitor in _logged_by(module, lambda each: each.training_step) - _logged_elsewhere(module)


def _waiting(trainer: Trainer) -> dict[str, list[str]]:
    """Who waits for which metric."""
    found: dict[str, list[str]] = {}
    for callback in callbacks_of(trainer, object):
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str):
            found.setdefault(monitor, []).append(type(callback).__name__)
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and isinstance(config.monitor, str):
            found.setdefault(config.monitor, []).append(type(config.scheduler).__name__)
    return found


def _forms(name: str) -> set[str]:
    return {name, f"{name}_step", f"{name}_epoch"}


def _logged_by(module: LightningModule, step: Callable[[Any], Any]) -> set[str]:
    with suppress(Exception):  # the user's code, on a module that has no Trainer
        return _names_of(module, step, users_loader(module.trainer.train_dataloader))
    return {form for name in _strings(step(module), type(module)) for form in _forms(name)}


def _names_of(module: LightningModule, step: Callable[[Any], Any], data: Any) -> set[str]:
    """The names that a step logs on one batch of the data."""
    found: set[str] = set()

    def log(name: str, *_: Any, **__: Any) -> None:
        found.update(_forms(name))

    def log_dict(names: Any, *_: Any, **__: Any) -> None:
        for name in names:
            log(name)

    with isolated_rng(module.device), torch.no_grad():
        batch = transfer_of(module.trainer)(next(iter(some_batches(data, examples=1, batches=1))))
        copy = copied(module)
        vars(copy).update(log=log, log_dict=log_dict)
        own = step(copy)
        own(*(batch, 0)[: len(inspect.signature(own).parameters)])
    return found


@contextmanager
def replaced_step_named(module: LightningModule) -> Iterator[None]:
    """Name the likely cause where the user's hook needs the metrics of a step that the defense replaces.

    Its error is raised with that cause, and a metric that it computes or logs without an update is a warning.
    """
    for name, metric in module.named_modules():
        if isinstance(metric, Metric) and not isinstance(metric.compute, _Compute):
            metric.compute = _Compute(metric, name, metric.compute)  # type: ignore[method-assign]
    try:
        yield
    except Exception as error:
        raise MisconfigurationException(
            f"on_train_epoch_end of {type(module).__name__} failed: {type(error).__name__}: {error}. A defense "
            "replaces training_step, so metrics that this step updates are empty at the end of the epoch. Leave the "
            "hook out of this fit (module.on_train_epoch_end = lambda: None), or compute these metrics only "
            "where they were updated."
        ) from error


class _Compute:
    """A metric's ``compute`` that warns, once, where nothing has updated the metric: many then give 0."""

    def __init__(self, metric: Metric, name: str, compute: Callable[..., Any]) -> None:
        self.metric, self.name, self.compute = metric, name, compute
        self.warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.metric.update_called or self.warned):
            self.warned = True
            rank_zero_warn(
                f"the metric {self.name!r} is computed though nothing has updated it: a defense replaces "
                "training_step, which may have done so. What is logged of it, 0 or NaN, means nothing. Log it in "
                "validation_step, or leave the hook out of this fit (module.on_train_epoch_end = lambda: None)."
            )
        return self.compute(*args, **kwargs)


def _logged_elsewhere(module: LightningModule) -> set[str]:
    """Names that the validation may log, and hooks and callbacks of the user's: the strings in their code."""
    validation = module.trainer.val_dataloaders
    classes = [cls for cls in type(module).__mro__ if not cls.__module__.startswith(_NOT_THE_USERS)]
    classes += [type(each) for each in callbacks_of(module.trainer, object)]
    hooks = [
        method
        for cls in classes
        for name, method in vars(cls).items()
        if name.startswith("on_") or (name == "validation_step" and validation is not None)
    ]
    found = {form for hook in hooks for name in _strings(hook, type(module)) for form in _forms(name)}
    if validation is not None:
        with suppress(Exception):
            found |= _names_of(module, lambda copy: copy.validation_step, validation)
    return found


def _strings(method: Any, cls: type) -> set[str]:
    """The strings in a method's code, and in that of the methods of its class which it calls."""
    found: set[str] = set()
    waiting, seen = [_code(method)], set()
    while waiting:
        code = waiting.pop()
        if code is None or code in seen:
            continue
        seen.add(code)
        for each in _nested(code):
            found.update(constant for constant in each.co_consts if isinstance(constant, str))
            waiting += [_code(vars(base).get(name)) for base in cls.__mro__ for name in each.co_names]
    return found


_NOT_THE_USERS = ("lightning.", "pytorch_lightning.", "lightning_cwrf.", "torch.")


def _code(method: Any) -> CodeType | None:
    """The code of a method of the user's."""
    found = inspect.unwrap(method) if callable(method) else None
    theirs = str(getattr(found, "__module__", "torch.")).startswith(_NOT_THE_USERS)
    return None if theirs else getattr(found, "__code__", None)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
