"""θ_vn, the vanilla weights: the model as it was at initialisation, before it saw any training data."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_cwrf.data import isolated_rng

VanillaSource: TypeAlias = "str | PathLike[str] | Mapping[str, Tensor] | nn.Module | Callable[[], nn.Module]"
"""A path (safetensors, Lightning checkpoint, or state dict), a state dict, a module, a factory, or ``"redraw"``."""


def capture(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's whole state dict (parameters and buffers) on the CPU."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}


def save_vanilla(source: nn.Module | Mapping[str, Tensor], path: str | PathLike[str]) -> Path:
    """Save a model's weights as they are now, or a state dict, as safetensors; an existing file is replaced at once.

    >>> from tempfile import mkdtemp
    >>> model = nn.Linear(2, 2)
    >>> path = save_vanilla(model, Path(mkdtemp()) / "init.safetensors")
    >>> sorted(load_vanilla(path, nn.Linear(2, 2)))
    ['bias', 'weight']
    """
    state = capture(source) if isinstance(source, nn.Module) else dict(source)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({name: value.contiguous().clone() for name, value in state.items()}, part)
    return part.replace(path)


def load_vanilla(source: VanillaSource, model: nn.Module) -> dict[str, Tensor]:
    """Load θ_vn from any source and check that it fits ``model``.

    Args:
        source: a path to a safetensors file, a Lightning checkpoint or a saved state dict (read without pickle); a
            state dict; a module that was never trained; a factory that makes one; or ``"redraw"`` (:func:`redraw`).
        model: the finished model; it is not changed.

    Returns:
        A state dict (parameters and buffers) on the CPU, with the model's names and shapes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read; or names or shapes differ (it says which).

    Weights that are the model's own present ones are taken with a warning.
    """
    if isinstance(source, str) and source == "redraw":
        return redraw(model)
    if isinstance(source, nn.Module):
        state = capture(source)
    elif isinstance(source, Mapping):
        state = {name: value.detach().cpu() for name, value in source.items()}
    elif isinstance(source, (str, PathLike)):
        state = _read(Path(source))
    elif callable(source):
        with isolated_rng():
            state = capture(source())
    else:
        raise TypeError(
            "vanilla must be a path, a state dict, a module, a factory of modules or 'redraw', "
            f"not {type(source).__name__}."
        )
    _check_fit(state, model)
    return state


def redraw(model: nn.Module) -> dict[str, Tensor]:
    """Draw new initial weights by ``reset_parameters`` of every layer, on a copy; the caller's RNG is not advanced.

    These are not the weights that training began from; the paper (§4.4) holds that the place of a critical weight
    matters rather than its value. Hence a warning, not an error.

    Raises:
        ValueError: a module owns parameters but has no ``reset_parameters``, so nothing tells how to draw them.
    """
    work = copy.deepcopy(model)
    stuck = []
    device = next((p.device for p in work.parameters()), None)
    with isolated_rng(device):
        for name, module in work.named_modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                stuck.append(f"{name or 'the model itself'} ({type(module).__name__})")
    if stuck:
        raise ValueError(
            f"vanilla='redraw' cannot draw the parameters of {', '.join(stuck)}: no reset_parameters method. Add one, "
            "or pass the initial weights (VanillaSnapshotCallback saves them), or a factory of untrained modules."
        )
    warnings.warn(
        "vanilla='redraw': the initial weights are drawn anew by each layer's reset_parameters. They are not the ones "
        "that training began from, and an initialisation of your own (for example in __init__) is not repeated.",
        UserWarning,
        stacklevel=2,
    )
    return capture(work)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no vanilla weights at {path}. VanillaSnapshotCallback({str(path)!r}) in the first training's Trainer "
            'saves them there; pass vanilla="redraw" to draw new ones.'
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers fail in many ways
        raise ValueError(
            f"cannot read vanilla weights from {path}: {error}. Only tensors and plain values are read (pickles can "
            "run code); save the weights with save_vanilla(model, path)."
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict; save the weights with save_vanilla(model, path).")
    return dict(state)


def _check_fit(state: Mapping[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    faults = [f"lack {name!r} (shape {tuple(value.shape)})" for name, value in own.items() if name not in state]
    faults += [f"have an unknown {name!r}" for name in state if name not in own]
    faults += [
        f"have {name!r} of shape {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"vanilla weights {'; '.join(faults[:5])}{more}; were they saved from another architecture? "
            'Pass vanilla="redraw" to draw new ones.'
        )
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if trainable and all(torch.equal(state[name].to(p.dtype), p.detach().cpu()) for name, p in trainable):
        warnings.warn(
            "the vanilla weights are the model's own present weights: rewinding to them changes nothing. If the model "
            'is trained already, pass the weights from before training, or vanilla="redraw".',
            UserWarning,
            stacklevel=3,
        )
