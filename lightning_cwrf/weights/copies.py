"""Copies of modules and of their weights. Weights are scored and redrawn on copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_cwrf.files import digest
from lightning_cwrf.lightning_private import COMPILED as COMPILED
from lightning_cwrf.lightning_private import drop_compiled_steps


def capture(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the tensors of the model's state dict (parameters and buffers) on the CPU."""
    return {name: value.to("cpu", copy=True).contiguous() for name, value in tensors_of(model).items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what modules save beside tensors (``get_extra_state``)."""
    check_not_lazy(model)
    return {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def weights_digest(model: nn.Module) -> str:
    """A digest of a model's parameters and buffers, with their names and types.

    The device, ``torch.compile`` and a defense on the model do not change it. It is empty where the state dict holds
    anything but plain tensors, such as quantized ones: then equal digests would not show that models are equal.

    >>> model = nn.Linear(2, 2)
    >>> [weights_digest(each) == weights_digest(model) for each in (copy.deepcopy(model), nn.Linear(2, 2))]
    [True, False]
    """
    state = model.state_dict()
    plain = all(
        isinstance(value, Tensor)
        and not is_lazy(value)
        and type(value.detach()) is Tensor
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_meta)
        for value in state.values()
    )
    return digest({name.replace("_orig_mod.", ""): value for name, value in state.items()}) if plain else ""


def check_not_lazy(model: nn.Module) -> None:
    """Raise a ValueError for parameters that have no shape until a first batch (``nn.LazyLinear``)."""
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"the model has lazy parameters without a shape yet ({', '.join(lazy[:5])}): run a batch through it first, "
            "for example at the end of its __init__."
        )


def copied(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Any:
    """A deep copy of a module, with the values of ``weights``; the module itself is never scored or redrawn.

    Do not train such a copy: its parameters share memory with ``weights`` where device and precision are the same.
    """
    memo = _computed(model)
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # A module may save its weights in its own form, which only its load_state_dict can read.
    plain = own.keys() <= {*parameters, *(name for name, _ in model.named_buffers())}
    if weights is not None and plain:
        for name in own.keys() & parameters.keys():
            parameter = parameters[name]
            given = weights[name].to(parameter.device, parameter.dtype)
            memo[id(parameter)] = nn.Parameter(given, requires_grad=parameter.requires_grad)
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:  # a __deepcopy__ may raise anything
        fix = "Remove that attribute from the module first, or give its class a __deepcopy__."
        if "RecordFunction" in str(error):
            fix = "It is the Trainer's PyTorchProfiler's: pass that record_module_names=False."
        raise TypeError(
            f"{type(model).__name__} cannot be copied ({_uncopyable(model)}: {error}), and its weights are scored and "
            f"redrawn on a copy. {fix}"
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


@contextmanager
def visiting(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Restore parameters and buffers, which it gives, and keep autocast from reusing weights of freed graphs."""
    kept = {name: tensor.detach().clone() for name, tensor in parameters_and_buffers(module)}
    try:
        yield kept
    finally:
        torch.clear_autocast_cache()
        with torch.no_grad():
            for name, tensor in parameters_and_buffers(module):
                if name in kept and kept[name].shape == tensor.shape and not torch.equal(kept[name], tensor):
                    tensor.copy_(kept[name])


def changed_since(kept: Mapping[str, Tensor], module: nn.Module) -> list[str]:
    """The parameters and buffers that are not what :func:`visiting` kept; NaN in equal places is no change."""
    now = dict(parameters_and_buffers(module))
    return [name for name in {**kept, **now} if not _equal(kept.get(name), now.get(name))]


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def parameters_and_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All of them by name, also those that are not saved."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _computed(model: nn.Module) -> dict[int, Any]:
    """Detached copies of the non-leaf tensors on the modules, by id; ``deepcopy`` raises for such tensors.

    ``weight_norm``, ``spectral_norm`` and pruning store the weight like this, and compute it again in every pass.
    """
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}


def _uncopyable(model: nn.Module) -> str:
    """The attribute of a module that cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                return f"attribute {f'{path}.{name}'.lstrip('.')!r} of type {type(value).__name__}"
    return "one of its parameters or buffers"
