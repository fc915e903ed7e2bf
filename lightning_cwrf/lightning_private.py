"""Private attributes of Lightning, where it has no public way: all in this file, as read from version 2.6.6.

Nothing here imports Lightning, so that the layers which do not may use it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

COMPILED = ("forward", "training_step", "validation_step", "test_step", "predict_step")
"""What Lightning replaces on a module that is fitted as ``torch.compile(module)``, by attributes of the instance."""


def trainer_of(module: Any) -> Any:
    """The module's last Trainer, or None; ``LightningModule.trainer`` raises where there is none."""
    return getattr(module, "_trainer", None)


def in_started_processes(trainer: Any) -> bool:
    """Whether a fit runs in processes that end with it (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``).

    What callbacks keep in memory there does not reach the caller.
    """
    return getattr(trainer.strategy, "_start_method", "popen") != "popen"


def training_source(trainer: Any) -> Any:
    """Where a fit takes its training loader from: ``dataloader()`` makes it, and ``instance`` is the loader to use."""
    return trainer.fit_loop._data_source


def wrapped_sampler(dataset: Any) -> Any:
    """The sampler that Lightning distributes over processes, which it wraps in a dataset; None for other datasets."""
    return getattr(dataset, "_sampler", None)


def initial_hparams(module: Any) -> Any:
    """The hyper-parameters that loggers get at the start of a fit, themselves: ``hparams_initial`` is a copy."""
    return getattr(module, "_hparams_initial", {})


def set_initial_hparams(module: Any, hparams: Any) -> None:
    """Replace the hyper-parameters that loggers get; ``save_hyperparameters`` would add to them."""
    module._hparams_initial = hparams


def logs_hparams(module: Any) -> bool:
    """Whether loggers get the module's hyper-parameters: what ``save_hyperparameters(logger=...)`` chose."""
    return bool(module._log_hyperparams)


def set_logs_hparams(module: Any, logged: bool) -> None:
    """Choose whether loggers get the module's hyper-parameters; ``save_hyperparameters`` would add to them."""
    module._log_hyperparams = logged


def compile_context(module: Any) -> Any:
    """What Lightning keeps of ``torch.compile`` on a compiled module; None on others."""
    return getattr(module, "_compiler_ctx", None)


def drop_compiled_steps(module: nn.Module) -> bool:
    """Take Lightning's compiled steps off a module, and say whether there were any.

    They are attributes of the instance, bound to the module and the class that were compiled.
    """
    if compile_context(module) is None:
        return False
    vars(module)["_compiler_ctx"] = None
    for name in COMPILED:
        vars(module).pop(name, None)
    return True
