"""What DP-SGD refuses before it trains: settings, Trainers, layers and optimizers whose ε would not hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import LBFGS, Optimizer

from lightning_cwrf.checks import check_choice, check_number
from lightning_cwrf.defenses.dpsgd.ledger import ACCOUNTANTS
from lightning_cwrf.defenses.dpsgd.step import unsupported_layers

LARGEST_TARGET = 100


def check_dpsgd(
    target_epsilon: Any, noise_multiplier: Any, target_delta: Any, max_grad_norm: Any, accountant: Any
) -> None:
    """Raise unless the numbers of DP-SGD are in range, and one of ε and σ is given."""
    if (target_epsilon is None) == (noise_multiplier is None):
        raise ValueError("DP-SGD needs one of target_epsilon and noise_multiplier, and not both.")
    if target_epsilon is not None:
        hint = "A larger one promises nothing; pass noise_multiplier for so little noise."
        check_number("target_epsilon", target_epsilon, low=0, high=LARGEST_TARGET, low_open=True, hint=hint)
    if noise_multiplier is not None:
        check_number("noise_multiplier", noise_multiplier, low=0)
    hint = "It is the chance that the guarantee fails: take less than 1 / (number of training examples)."
    check_number("target_delta", target_delta, low=0, high=1, low_open=True, high_open=True, hint=hint)
    # Without noise there is no guarantee, and no clipping either is plain SGD.
    if not (isinstance(max_grad_norm, float) and max_grad_norm == math.inf and noise_multiplier == 0):
        hint = "It may be infinite where noise_multiplier is 0."
        check_number("max_grad_norm", max_grad_norm, low=0, low_open=True, hint=hint)
    check_choice("accountant", accountant, ACCOUNTANTS)


def check_trainer(trainer: Trainer) -> None:
    """Raise a MisconfigurationException where a Trainer's settings do not go with DP-SGD."""
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


def check_layers(module: LightningModule) -> None:
    """Raise a MisconfigurationException that names the layers without a gradient for each example."""
    wrong = unsupported_layers(module)
    if wrong:
        listed = "; ".join(f"{name} ({reason})" for name, reason in wrong.items())
        raise MisconfigurationException(
            f"DP-SGD cannot take per-example gradients through {listed}. Replace these layers (BatchNorm by "
            "GroupNorm, for one), or pass fix=True to have it done."
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
    """Doubt ``from_scratch=True`` of a module or a checkpoint that has been trained otherwise."""
    rank_zero_warn(
        f"this {what} was trained for {steps} steps without DP-SGD, and from_scratch=True says that its weights have "
        "seen no private data: ε covers the whole training only if that is so. Else leave from_scratch out."
    )
