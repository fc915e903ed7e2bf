"""An optimizer of one model, moved to the weights of K models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_ELEMENTWISE = {
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
}
"""Optimizers that treat each weight by itself, so that K models' weights in one tensor are K models still."""

_FUSED = {torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD}


def moved(configured: Any, stacked: dict[Tensor, nn.Parameter]) -> Any:
    """What ``configure_optimizers`` returned, with its optimizer training the stacked parameters in place of its own.

    Raises:
        ValueError: several optimizers, or one that is not known to treat each weight by itself.
    """
    optimizers = list({id(found): found for found in _optimizers_in(configured)}.values())
    if len(optimizers) != 1:
        raise ValueError(f"a stack needs one optimizer, not {len(optimizers)}. Leave stack=1.")
    if type(optimizers[0]) not in _ELEMENTWISE:
        raise ValueError(
            f"{type(optimizers[0]).__name__} cannot be stacked: it is not known to treat each weight by itself. "
            "Leave stack=1."
        )
    _move(optimizers[0], stacked)
    return configured


def _optimizers_in(configured: Any) -> Iterator[Optimizer]:
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, dict):
        for value in configured.values():
            yield from _optimizers_in(value)
    elif isinstance(configured, (list, tuple)):
        for value in configured:
            yield from _optimizers_in(value)


def _move(optimizer: Optimizer, stacked: dict[Tensor, nn.Parameter]) -> None:
    """Let an optimizer, and the schedulers that hold it, train other parameters; existing state is repeated K times."""
    for group in optimizer.param_groups:
        group["params"] = [stacked[p] for p in group["params"]]
        if type(optimizer) in _FUSED and group.get("foreach") is None and group.get("fused") is None:
            group["fused"] = True
    for p, state in list(optimizer.state.items()):
        optimizer.state[stacked[p]] = {
            name: torch.stack([value] * len(stacked[p])) if getattr(value, "shape", None) == p.shape else value
            for name, value in state.items()
        }
        del optimizer.state[p]
