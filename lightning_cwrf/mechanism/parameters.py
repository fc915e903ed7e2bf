"""Which parameters a mechanism trains, and their values side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_cwrf.weights.descent import trainable_parameters

Parameters: TypeAlias = Literal["head", "all"] | Sequence[str]
"""Which parameters are trained: those of the last ``nn.Linear``, all, or these."""


def parameter_names(model: nn.Module, parameters: Parameters) -> list[str]:
    """The names of trained parameters, in the model's order; tied ones have the first of their names.

    Args:
        model: a classifier.
        parameters: ``"head"`` (weight and bias of the last ``nn.Linear``), ``"all"`` that are trainable, or names.

    Raises:
        TypeError: names that are no strings.
        ValueError: an unknown name, a frozen parameter, or no ``nn.Linear``.

    >>> parameter_names(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "head")
    ['2.weight', '2.bias']
    """
    check_chosen(parameters)
    own = dict(model.named_parameters())
    if isinstance(parameters, str):
        if parameters == "all":
            return list(trainable_parameters(model)) or _none()
        linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise ValueError("the model has no nn.Linear that could be its head: pass parameters=[...], their names.")
        chosen = {id(each) for each in linear[-1].parameters()}
    else:
        every = dict(model.named_parameters(remove_duplicate=False))
        unknown = [name for name in parameters if name not in every]
        if unknown:
            raise ValueError(f"the model has no parameter {unknown[0]!r}; its parameters are {', '.join(own)}.")
        chosen = {id(every[name]) for name in parameters}
    names = [name for name, value in own.items() if id(value) in chosen]
    frozen = [name for name in names if not own[name].requires_grad]
    if frozen:
        raise ValueError(f"{frozen[0]} is frozen (requires_grad is False): leave it out of parameters, or unfreeze it.")
    return names or _none()


def check_chosen(parameters: Any) -> None:
    """Raise a TypeError or ValueError for what chooses no parameters of any model."""
    if isinstance(parameters, str):
        if parameters not in ("head", "all"):
            raise ValueError(f'parameters must be "head", "all" or a list of names, not {parameters!r}.')
    elif not isinstance(parameters, (list, tuple)) or not all(isinstance(name, str) for name in parameters):
        raise TypeError(f'parameters must be "head", "all" or a list of names, not {parameters!r}.')


def _none() -> list[str]:
    raise ValueError("there is no parameter to train: all are frozen, or parameters is empty.")


def check_head(model: nn.Module, classes: int) -> None:
    """Raise a ValueError where the last ``nn.Linear`` does not give the logits of so many classes."""
    *_, last = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    if last[1].out_features != (1 if classes == 2 and last[1].out_features == 1 else classes):
        raise ValueError(
            f"the last nn.Linear, {last[0] or 'the model'}, has {last[1].out_features} outputs and the model {classes} "
            "classes, so it is not the head: pass parameters=[...], the names of the head's."
        )


def flat(model: nn.Module, names: Sequence[str]) -> Tensor:
    """The named parameters side by side, ``(d,)`` float64 on the CPU."""
    own = dict(model.named_parameters())
    return torch.cat([own[name].detach().cpu().double().flatten() for name in names])


def write(model: nn.Module, names: Sequence[str], values: Tensor) -> None:
    """Set the named parameters, in their own precision, to what :func:`flat` gives of them.

    Raises:
        ValueError: a value is not finite in that precision; nothing is written.
    """
    own = dict(model.named_parameters())
    pieces = torch.split(values, [own[name].numel() for name in names])
    new = {name: piece.view(own[name].shape).to(own[name]) for name, piece in zip(names, pieces, strict=True)}
    if not all(bool(torch.isfinite(value).all()) for value in new.values()):
        raise ValueError("the weights are not finite after the draws and were not written; lower eta or raise damping.")
    with torch.no_grad():
        for name, value in new.items():
            own[name].copy_(value)
