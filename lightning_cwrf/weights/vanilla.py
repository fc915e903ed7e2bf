"""θ_vn, the vanilla weights: those of the model at initialisation, before it saw any training data."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_cwrf.data import isolated_rng
from lightning_cwrf.files import digest, save_tensors
from lightning_cwrf.weights.copies import capture as capture
from lightning_cwrf.weights.copies import tensors_of
from lightning_cwrf.weights.reading import read_saved, state_dict_in
from lightning_cwrf.weights.redraw import redraw as redraw

VanillaSource: TypeAlias = "str | PathLike[str] | Mapping[str, Tensor] | nn.Module | Callable[[], nn.Module]"
"""A path (safetensors, Lightning checkpoint, or state dict), a state dict, a module, a factory, or ``"redraw"``."""

_KIND = "lightning_cwrf.Vanilla/1"


def save_vanilla(source: nn.Module | Mapping[str, Tensor], path: str | PathLike[str]) -> Path:
    """Save a model's current weights, or a state dict; an existing file is replaced in one step.

    The file has the safetensors format, whatever its suffix, and a digest of its content.

    >>> from tempfile import mkdtemp
    >>> model = nn.Linear(2, 2)
    >>> path = save_vanilla(model, Path(mkdtemp()) / "init.safetensors")
    >>> sorted(load_vanilla(path, nn.Linear(2, 2)))
    ['bias', 'weight']
    """
    return save_tensors(tensors_of(source) if isinstance(source, nn.Module) else source, path, _KIND)


def load_vanilla(source: VanillaSource, model: nn.Module) -> dict[str, Tensor]:
    """Load θ_vn from any source and check that it fits ``model``.

    Whether weights are untrained cannot be checked in general. A checkpoint from after training steps is an error.

    Args:
        source: a path to a safetensors file, a Lightning checkpoint or a saved state dict (distinguished by content,
            and read without pickle); a state dict; a module that was never trained; a factory that makes one; or
            ``"redraw"`` (:func:`~lightning_cwrf.weights.redraw.redraw`).
        model: the finished model; it is not changed.

    Returns:
        A state dict (parameters and buffers) on the CPU, with the model's names and shapes. The tensors of a state
        dict that are on the CPU already are not copied.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the source is none of these, or the factory needs arguments.
        ValueError: the file cannot be read, is damaged, is a checkpoint from after training steps, or holds something
            else, such as scores; names or shapes differ; or values are NaN or infinite.

    The model's own current weights are accepted with a warning.
    """
    check_source(source)
    if is_redraw(source):
        return redraw(model)
    if isinstance(source, nn.Module):
        state = capture(source)
    elif isinstance(source, Mapping):
        state = _state_in(source, "the mapping")
    elif isinstance(source, (str, PathLike)):
        state = _read(Path(source))
    else:
        state = _made_by(source)
    _check_fit(state, model)
    return state


def check_source(source: Any) -> None:
    """Raise a TypeError unless ``source`` is one that :func:`load_vanilla` takes.

    >>> check_source(None)
    Traceback (most recent call last):
    TypeError: vanilla must be a path, a state dict, a module, a factory of modules or 'redraw', not NoneType.
    """
    if not isinstance(source, (str, PathLike, Mapping, nn.Module)) and not callable(source):
        raise TypeError(
            "vanilla must be a path, a state dict, a module, a factory of modules or 'redraw', "
            f"not {type(source).__name__}."
        )


def is_file(source: VanillaSource) -> bool:
    """Whether a source is a path."""
    return isinstance(source, (str, PathLike)) and not is_redraw(source)


def is_redraw(source: VanillaSource) -> bool:
    """Whether new weights are to be drawn."""
    return isinstance(source, str) and source == "redraw"


def identity(source: VanillaSource) -> str | None:
    """A digest by which a resumed run compares vanilla weights; None where there is none, as for a missing file.

    >>> identity({"weight": torch.zeros(2)}) == identity({"weight": torch.ones(2)})
    False
    """
    if is_redraw(source):
        return "redraw"
    if isinstance(source, Mapping):
        return f"weights {digest(_state_in(source, 'the mapping'))}"
    if isinstance(source, (str, PathLike)) and Path(source).is_file():
        return f"weights {digest(_read(Path(source)))}"
    return None


def _made_by(factory: Callable[[], nn.Module]) -> dict[str, Tensor]:
    name = getattr(factory, "__name__", type(factory).__name__)
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise TypeError(
            f"vanilla: {name} cannot be called without arguments ({error}); pass lambda: {name}(...), a "
            "functools.partial, or the untrained module itself."
        ) from None
    except ValueError:  # some callables have no signature that can be read
        pass
    with isolated_rng():
        made = factory()
    if not isinstance(made, nn.Module):
        raise TypeError(f"vanilla: {name} must return an untrained module, not {type(made).__name__}.")
    return capture(made)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no vanilla weights at {path}. VanillaSnapshotCallback({str(path)!r}) in the first training's Trainer "
            'saves them there; pass vanilla="redraw" to draw new ones.'
        )
    loaded, kind = read_saved(path, "vanilla weights")
    if kind is not None and kind.startswith("lightning_cwrf.") and kind != _KIND:
        raise ValueError(
            f"{path} holds {kind} instead of vanilla weights. VanillaSnapshotCallback, or save_vanilla(model, path) "
            "before the training, writes them."
        )
    return _state_in(loaded, str(path))


def _state_in(loaded: Any, where: str) -> dict[str, Tensor]:
    """The state dict in ``loaded``, which is one itself or a checkpoint from before the training."""
    state = state_dict_in(loaded, where)
    if state is not loaded:
        for name in ("global_step", "epoch"):
            if loaded.get(name):
                raise ValueError(
                    f"{where} is a checkpoint from after training ({name} is {loaded[name]}), but vanilla weights are "
                    "those from before any training data was seen. If it was trained on other data than the members, "
                    'pass its state dict: torch.load(path, weights_only=True)["state_dict"]. Else pass '
                    'vanilla="redraw".'
                )
    return {name: value.detach() if value.is_meta else value.detach().cpu() for name, value in state.items()}


def _is_float(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _check_fit(state: Mapping[str, Tensor], model: nn.Module) -> None:
    own = tensors_of(model)
    faults = [f"lack {name!r} (shape {tuple(value.shape)})" for name, value in own.items() if name not in state]
    faults += [f"have an unknown {name!r}" for name in state if name not in own]
    faults += [
        f"have {name!r} of shape {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    faults += [
        f"have {name!r} as {state[name].dtype}" + " on the meta device, without values" * state[name].is_meta
        for name, value in own.items()
        if name in state and (state[name].is_meta or _is_float(value) > _is_float(state[name]))
    ]
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"vanilla weights {'; '.join(faults[:5])}{more}; were they saved from another architecture? "
            'Pass vanilla="redraw" to draw new ones.'
        )
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(p), name)
        tied = other != name and {name, other} <= state.keys()
        if tied and not torch.equal(state[name], state[other]):
            raise ValueError(
                f"the vanilla weights {other!r} and {name!r} differ, but in the model they are the same (tied) "
                "parameter. Save them from a model in which they are tied."
            )
    # A buffer may hold NaN or -inf on purpose.
    bad = [name for name, _ in model.named_parameters() if name in state and not torch.isfinite(state[name]).all()]
    if bad:
        raise ValueError(
            f"the vanilla weights {', '.join(map(repr, bad[:5]))} hold NaN or infinite values: they are damaged, or "
            "from a training that diverged."
        )
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if trainable and all(torch.equal(state[name].to(p.dtype), p.detach().cpu()) for name, p in trainable):
        warnings.warn(
            "the vanilla weights are the model's own current weights: rewinding to them changes nothing. If the model "
            'is already trained, pass the weights from before training, or vanilla="redraw".',
            UserWarning,
            stacklevel=3,
        )
