"""Deep copies of modules, on which weights are scored and drawn anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.lightning_private import COMPILED as COMPILED
from lightning_cwrf.lightning_private import drop_compiled_steps


def copied(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Any:
    """A deep copy of a module; the module itself is never scored or redrawn.

    Args:
        model: the module.
        weights: a state dict; the copy has its values, and shares the memory of the parameters with it where device
            and precision are the same. The copy must not be trained then.

    Raises:
        TypeError: the module, or something that it holds, cannot be copied.
    """
    memo = _computed(model)
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # A module may save its weights in a form of its own; then only its load_state_dict knows what to do with them.
    plain = own.keys() <= {*parameters, *(name for name, _ in model.named_buffers())}
    if weights is not None and plain:
        for name in own.keys() & parameters.keys():
            parameter = parameters[name]
            given = weights[name].to(parameter.device, parameter.dtype)
            memo[id(parameter)] = nn.Parameter(given, requires_grad=parameter.requires_grad)
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:  # a __deepcopy__ may raise anything
        raise TypeError(
            f"{type(model).__name__} cannot be copied ({_uncopyable(model)}: {error}), and its weights are scored and "
            "redrawn on a copy. Take that attribute off the module before, or give its class a __deepcopy__."
        ) from error
    if weights is not None and plain:
        with torch.no_grad():
            for name, buffer in made.named_buffers():
                if name in own:
                    buffer.copy_(weights[name])
    elif weights is not None:
        made.load_state_dict(weights)
    for module in made.modules():
        drop_compiled_steps(module)
    return made


def _computed(model: nn.Module) -> dict[int, Any]:
    """Detached copies of tensors that a forward pass left on the modules, by id: ``deepcopy`` refuses them.

    ``weight_norm``, ``spectral_norm`` and pruning keep the weight so, and compute it anew in every pass.
    """
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}


def _uncopyable(model: nn.Module) -> str:
    """Where in a module the thing is that cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                return f"attribute {f'{path}.{name}'.lstrip('.')!r} of type {type(value).__name__}"
    return "one of its parameters or buffers"
