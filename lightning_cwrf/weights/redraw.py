"""Initial weights for a model whose own are lost, drawn again as its layers, its class and its adapters draw them."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_cwrf.data import isolated_rng
from lightning_cwrf.weights.copies import capture, copied

_PASS = "pass the initial weights (VanillaSnapshotCallback saves them), or a factory of untrained modules."


def redraw(model: nn.Module) -> dict[str, Tensor]:
    """Draw new initial weights, on a copy; the caller's RNG is not advanced.

    Each layer draws its own by ``reset_parameters``. Then a model's own initialisation is applied, where a module has
    one by the names that timm, Hugging Face and others give it: ``init_weights()``, or ``_init_weights(layer)`` for
    each of its layers. Last come adapters by their own method (PEFT's ``reset_lora_parameters``, which sets the second
    matrix to zero).

    Parameters that are not trained (``requires_grad`` is False), such as those of a frozen backbone, keep the model's
    values, and so do the buffers of layers whose parameters are all frozen. The running statistics of other BatchNorm
    layers are reset, as before training.

    These are not the weights that training started from. The paper (§4.4) finds that the position of a critical weight
    matters rather than its value; hence a warning, not an error.

    Raises:
        ValueError: nothing sets a trainable parameter (no ``reset_parameters``, or one that does not set all of them,
            as with ``spectral_norm``), an initialisation fails, or it gives the model's own weights again.
    """
    work = copied(model)
    kept = _kept(work)
    device = next((p.device for p in work.parameters()), None)
    with isolated_rng(device), torch.no_grad():
        for p in _trained(work):
            p.fill_(math.nan)
        for layer in work.modules():
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if callable(reset) and _draws(layer):
                reset()
        own = [_initialise(name, module, begin) for name, module, begin in _initialisations(work)]
        _reset_adapters(work)
    _check_drawn(work)
    _check_new(work, model)
    warnings.warn(
        "vanilla='redraw': the initial weights are drawn again by each layer's reset_parameters"
        f"{''.join(f' and {each}' for each in own)}. They are not those that training started from, and your own "
        "initialisation elsewhere (for example in __init__) is not applied.",
        UserWarning,
        stacklevel=2,
    )
    return {**capture(work), **kept}


def _trained(module: nn.Module, *, recurse: bool = True) -> list[nn.Parameter]:
    return [p for p in module.parameters(recurse) if p.requires_grad and not is_lazy(p)]  # scoring reports lazy ones


def _draws(layer: nn.Module) -> bool:
    """Whether a layer's own parameters are drawn: one with frozen parameters alone keeps them, and its buffers."""
    own = list(layer.parameters(recurse=False))
    return not own or any(p.requires_grad for p in own)


def _kept(work: nn.Module) -> dict[str, Tensor]:
    """Copies of what is not drawn: frozen parameters, and the buffers beside them."""
    kept = {name: p.detach().to("cpu", copy=True) for name, p in work.named_parameters() if not p.requires_grad}
    saved = work.state_dict()
    for path, layer in work.named_modules():
        if not _draws(layer):
            names = [f"{path}.{name}".lstrip(".") for name, _ in layer.named_buffers(recurse=False)]
            kept |= {name: saved[name].to("cpu", copy=True) for name in names if name in saved}
    return kept


def _initialisations(work: nn.Module) -> Iterator[tuple[str, nn.Module, Callable[[], Any]]]:
    """The outermost modules that have an initialisation of all their weights, and that initialisation."""
    done: tuple[str, ...] = ()
    for name, module in work.named_modules():
        if name.startswith(done) or not _trained(module):
            continue
        whole, each = (getattr(type(module), method, None) for method in ("init_weights", "_init_weights"))
        begin: Callable[[], Any] | None = None
        if _takes(whole, module):
            begin = module.init_weights
        elif _takes(each, module, module):
            begin = lambda module=module: module.apply(module._init_weights)  # noqa: E731
        if begin is not None:
            yield name, module, begin
            if not name:
                return
            done += (f"{name}.",)


def _takes(method: Any, *given: Any) -> bool:
    if not callable(method):
        return False
    with suppress(TypeError, ValueError):
        inspect.signature(method).bind(*given)
        return True
    return False


def _initialise(name: str, module: nn.Module, begin: Callable[[], Any]) -> str:
    for marked in (*module.modules(), *module.parameters()):
        vars(marked).pop("_is_hf_initialized", None)  # Hugging Face initialises nothing twice
    what = f"the initialisation of {type(module).__name__}"
    try:
        begin()
    except Exception as error:  # the user's code
        where = f"vanilla='redraw' cannot draw the weights of {name or 'the model itself'}"
        raise ValueError(f"{where}: {what} failed ({type(error).__name__}: {error}). Instead, {_PASS}") from error
    return what


_ADAPTER = re.compile(r"reset_\w+_parameters")


def _reset_adapters(work: nn.Module) -> None:
    """Initialise adapters as PEFT does: by a method that takes the adapter's name, and how to initialise it."""
    configs: Any = next((found for module in work.modules() if (found := vars(module).get("peft_config"))), {})
    for layer in work.modules():
        for name in filter(_ADAPTER.fullmatch, dir(type(layer))):
            arguments = list(inspect.signature(getattr(layer, name)).parameters)
            if arguments[:1] != ["adapter_name"] or not _trained(layer):
                continue
            for adapter in _adapters_of(layer):
                ways = [getattr(configs.get(adapter), way, True) for way in arguments[1:]]
                _reset_adapter(layer, name, adapter, ways)


def _reset_adapter(layer: nn.Module, method: str, adapter: str, ways: list[Any]) -> None:
    for path, part in layer.named_modules():
        reset = getattr(part, "reset_parameters", None)
        if path.endswith(f".{adapter}") and callable(reset) and _trained(part):
            reset()
    try:
        getattr(layer, method)(adapter, *ways)
    except Exception as error:  # ways that depend on data or on the frozen weights
        how = f"{method}({', '.join(map(repr, [adapter, *ways]))})"
        raise ValueError(
            f"vanilla='redraw' cannot draw an adapter: {how} failed ({error}). Instead, {_PASS}"
        ) from error


def _adapters_of(layer: nn.Module) -> list[str]:
    """The names of the adapters in a layer: the keys of its containers."""
    containers = [child for child in layer.children() if isinstance(child, (nn.ModuleDict, nn.ParameterDict))]
    return sorted({key for container in containers for key in container})


def _check_drawn(work: nn.Module) -> None:
    """Raise with the parameters that nothing has set."""
    stuck = []
    for path, module in work.named_modules():
        left = [
            name
            for name, p in module.named_parameters(recurse=False)
            if p.requires_grad and not is_lazy(p) and p.isnan().any()
        ]
        if left:
            stuck.append(f"{path or 'the model itself'} ({type(module).__name__}: {', '.join(left)})")
    if stuck:
        raise ValueError(
            f"vanilla='redraw' cannot draw the parameters of {', '.join(stuck)}: no reset_parameters method, or one "
            f"that does not set them. Add one, or {_PASS}"
        )


def _check_new(work: nn.Module, model: nn.Module) -> None:
    """Raise with the parameters that have the model's own values again; small or constant ones can by chance."""
    own = dict(model.named_parameters())
    drawn = [(name, p) for name, p in work.named_parameters() if p.requires_grad and not is_lazy(p)]
    varied = [(name, p) for name, p in drawn if p.numel() > 1 and (p != p.flatten()[0]).any()]
    same = [name for name, p in varied if torch.equal(p, own[name])]
    large = [name for name, p in varied if name in same and p.numel() > _LARGE]
    if large or (same and all(torch.equal(p, own[name]) for name, p in drawn)):
        raise ValueError(
            f"vanilla='redraw' drew the model's own current weights of {', '.join((large or same)[:5])}: does an "
            f"init_weights load a saved state, or start from a fixed seed? Rewinding would change nothing there. {_FIX}"
        )


_LARGE = 100
_FIX = f"Instead, {_PASS}"
