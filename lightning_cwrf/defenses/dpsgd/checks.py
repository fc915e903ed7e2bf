"""Trainers and optimizers that DP-SGD refuses before it trains, because its ε would not hold."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import LBFGS, Optimizer

from lightning_cwrf.mechanism.spent import draws_of


def check_trainer(trainer: Trainer) -> None:
    """Raise a MisconfigurationException where DP-SGD does not work with a Trainer's settings."""
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(f"DP-SGD works on one device or with DDP, not with {type(strategy).__name__}.")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            "DP-SGD clips gradients of its own, which the loss scaling of 16-mixed would change; use bf16-mixed."
        )
    for name, what in (("overfit_batches", "a few batches"), ("reload_dataloaders_every_n_epochs", "new loaders")):
        if getattr(trainer, name):
            raise MisconfigurationException(
                f"DP-SGD accounts for Poisson batches of one dataset; Trainer({name}={getattr(trainer, name)}) "
                f"would train on {what} instead. Leave it out."
            )
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "DP-SGD needs logical batches of one size; use Trainer(accumulate_grad_batches=...) instead of "
            "GradientAccumulationScheduler."
        )


def check_optimizer(module: LightningModule, optimizers: list[Optimizer]) -> None:
    """Raise a MisconfigurationException unless there is one optimizer, of the module's own float32 parameters."""
    if len(optimizers) != 1 or isinstance(optimizers[0], LBFGS):
        found = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "none"
        raise MisconfigurationException(
            f"DP-SGD needs one optimizer that takes one gradient a step; configure_optimizers gave {found}."
        )
    names = {parameter: name for name, parameter in module.named_parameters()}
    for group in optimizers[0].param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise MisconfigurationException(
                    f"the optimizer trains a parameter of shape {tuple(parameter.shape)} that the module does not "
                    "have; with fix=True, make the optimizer in configure_optimizers from self.parameters()."
                )
            if parameter.dtype not in (torch.float32, torch.float64):
                raise MisconfigurationException(
                    f"DP-SGD adds its noise in float32 or float64, but {names[parameter]} is {parameter.dtype}; "
                    "use precision bf16-mixed or 32."
                )


def warn_of_plain_steps(what: str, steps: int) -> None:
    """Warn that ``from_scratch=True`` is doubtful: a module or a checkpoint has been trained without DP-SGD."""
    rank_zero_warn(
        f"this {what} was trained for {steps} steps without DP-SGD, and from_scratch=True says that its weights have "
        "seen no private data: ε covers the whole training only if that is so. Else leave from_scratch out."
    )


def refuse_draws(module: LightningModule) -> None:
    """Raise a MisconfigurationException where the weights come from draws that the accountant of DP-SGD cannot see."""
    draws = draws_of(module)
    if draws:
        raise MisconfigurationException(
            f"the weights of this module come from {draws} draws of the exponential mechanism, and the ε of DP-SGD "
            "would not count them. Start DP-SGD from the weights of before; or load these into a new module, and add "
            "the two ε and the two δ yourself."
        )
