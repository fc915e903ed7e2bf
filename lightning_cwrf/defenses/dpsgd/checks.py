"""Trainers and optimizers that DP-SGD refuses before it trains, because its ε would not hold."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import LBFGS, Optimizer

from lightning_cwrf.checks import check_choice, check_number
from lightning_cwrf.defenses.dpsgd.clipping import CLIPPINGS

if TYPE_CHECKING:
    from lightning_cwrf.defenses.dpsgd.settings import DPSGD

# The settings that one kind of clipping has.
_OF_CLIPPING = {
    "layer_norms": "per_layer",
    "target_unclipped_quantile": "adaptive",
    "clipbound_learning_rate": "adaptive",
    "unclipped_num_std": "adaptive",
    "stability": "automatic",
}


def check_clipping(settings: DPSGD) -> None:
    """Raise a TypeError or ValueError for settings of clipping that are out of range, or of another kind."""
    kind = settings.clipping
    check_choice("clipping", kind, CLIPPINGS)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, of in _OF_CLIPPING.items():
        if kind != of and getattr(settings, name) != defaults[name]:
            raise ValueError(f'{name} is of clipping="{of}" and does nothing with "{kind}"; leave it out.')
    # Without noise there is no guarantee, and without clipping as well it is plain SGD.
    clip, plain = settings.max_grad_norm, kind in ("flat", "per_layer")
    if not (plain and isinstance(clip, float) and clip == math.inf and settings.noise_multiplier == 0):
        hint = "It may be infinite where noise_multiplier is 0." if plain else ""
        check_number("max_grad_norm", clip, low=0, low_open=True, hint=hint)
    quantile = settings.target_unclipped_quantile
    check_number("target_unclipped_quantile", quantile, low=0, high=1, low_open=True, high_open=True)
    check_number("clipbound_learning_rate", settings.clipbound_learning_rate, low=0, low_open=True)
    check_number("stability", settings.stability, low=0, low_open=True)
    if settings.unclipped_num_std is not None:
        check_number("unclipped_num_std", settings.unclipped_num_std, low=0, low_open=True)
        if settings.noise_multiplier == 0:
            raise ValueError("noise_multiplier=0 is without any noise: leave out unclipped_num_std.")
    if settings.layer_norms is not None:
        _check_layer_norms(settings.layer_norms, settings.max_grad_norm != defaults["max_grad_norm"])


def _check_layer_norms(norms: dict[str, float], whole: bool) -> None:
    if not isinstance(norms, dict):
        raise TypeError(f"layer_norms must be a dict of a bound for each layer's name, not {norms!r}.")
    for name, bound in norms.items():
        if not isinstance(name, str):
            raise TypeError(f"layer_norms must have names of layers as keys, not {name!r}.")
        check_number(f"layer_norms[{name!r}]", bound, low=0, low_open=True)
    if whole:
        raise ValueError(
            "layer_norms gives every layer its bound, and max_grad_norm follows from them (√ of the sum of their "
            "squares): pass one of the two."
        )


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
