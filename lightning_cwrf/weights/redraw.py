"""Initial weights for a model whose own are lost, drawn again as its layers, its class and its adapters draw them."""

from __future__ import annotations

import inspect
import math
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_cwrf.data import isolated_rng
from lightning_cwrf.weights.copies import capture, copied

_REDRAW = "pass the initial weights (VanillaSnapshotCallback saves them), or a factory of untrained modules."
_FRESH = "leave values at 'initial'."


class _CannotDraw(Exception):
    """Why weights cannot be drawn again; what to do instead depends on the setting that asked for it."""


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
    drawn, own = _draw(model, model.named_parameters(), "vanilla='redraw'", _REDRAW)
    warnings.warn(
        "vanilla='redraw': the initial weights are drawn again by each layer's reset_parameters"
        f"{''.join(f' and {each}' for each in own)}. They are not those that training started from, and your own "
        "initialisation elsewhere (for example in __init__) is not applied.",
        UserWarning,
        stacklevel=2,
    )
    return drawn


def fresh_weights(model: nn.Module, seed: int, initial: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Another draw of the initialisation, as :func:`redraw` draws, but from a seed.

    It is drawn on the CPU, so it is the same on every device. It is not what building the model after
    ``torch.manual_seed(seed)`` gives: the seed is mixed first. A warning names parameters that are spread unlike the
    initial ones, where these are known: an initialisation in ``__init__``, for example, is not applied.

    Args:
        model: the finished model; it is not changed.
        seed: of the draw, at least 0.
        initial: the weights that training started from, where they are known.

    Returns:
        A state dict (parameters and buffers) on the CPU, with the model's names and shapes.

    Raises:
        ValueError: as :func:`redraw`; or the draw gives the initial weights again.

    >>> model = nn.Linear(4, 2)
    >>> first, again, other = (fresh_weights(model, seed)["weight"] for seed in (1, 1, 2))
    >>> torch.equal(first, again), torch.equal(first, other)
    (True, False)
    """
    parameters = dict(model.named_parameters())
    drawn, _ = _draw(model, parameters.items(), "values='fresh'", _FRESH, seed)
    if initial is not None:
        fresh = {name: drawn[name] for name, p in parameters.items() if _is_drawn(p)}
        with _told("values='fresh'", _FRESH):
            _check_new(fresh, initial, "initial")
        _warn_of_spread(fresh, initial)
    return drawn


def _draw(
    model: nn.Module, own: Iterable[tuple[str, Tensor]], setting: str, instead: str, seed: int | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """A draw that differs from the model's ``own`` weights, and the initialisations that were applied.

    With a seed it is drawn on the CPU, from that seed; else on the model's device, from the caller's random state.
    """
    work = copied(model)
    work = work if seed is None else work.cpu()
    kept = _kept(work)
    device = next((p.device for p in work.parameters()), None)
    with _told(setting, instead), isolated_rng(device), torch.no_grad():
        if seed is not None:
            _seed(seed)
        for p in _trained(work):
            p.fill_(math.nan)
        for layer in work.modules():
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if callable(reset) and _draws(layer):
                reset()
        applied = [_initialise(name, module, begin) for name, module, begin in _initialisations(work)]
        _reset_adapters(work)
        _check_drawn(work)
        drawn = {name: p for name, p in work.named_parameters() if _is_drawn(p)}
        _check_new(drawn, dict(own), "own current")
    return {**capture(work), **kept}, applied


@contextmanager
def _told(setting: str, instead: str) -> Iterator[None]:
    try:
        yield
    except _CannotDraw as error:
        raise ValueError(f"{setting} {error} {instead}") from error.__cause__


def _seed(seed: int) -> None:
    """Seed Python, NumPy and torch's generator of the CPU; a seed gives other numbers than ``manual_seed`` with it."""
    mixed = int(np.random.SeedSequence([seed, 2]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002 - an initialisation may draw from the global state
    torch.default_generator.manual_seed(mixed)


def _is_drawn(p: nn.Parameter) -> bool:
    return p.requires_grad and not is_lazy(p)  # scoring reports lazy ones


def _trained(module: nn.Module, *, recurse: bool = True) -> list[nn.Parameter]:
    return [p for p in module.parameters(recurse) if _is_drawn(p)]


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
        where = f"cannot draw the weights of {name or 'the model itself'}"
        raise _CannotDraw(f"{where}: {what} failed ({type(error).__name__}: {error}). Instead,") from error
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
        raise _CannotDraw(f"cannot draw an adapter: {how} failed ({error}). Instead,") from error


def _adapters_of(layer: nn.Module) -> list[str]:
    """The names of the adapters in a layer: the keys of its containers."""
    containers = [child for child in layer.children() if isinstance(child, (nn.ModuleDict, nn.ParameterDict))]
    return sorted({key for container in containers for key in container})


def _check_drawn(work: nn.Module) -> None:
    """Raise with the parameters that nothing has set."""
    stuck = []
    for path, module in work.named_modules():
        left = [name for name, p in module.named_parameters(recurse=False) if _is_drawn(p) and p.isnan().any()]
        if left:
            stuck.append(f"{path or 'the model itself'} ({type(module).__name__}: {', '.join(left)})")
    if stuck:
        raise _CannotDraw(
            f"cannot draw the parameters of {', '.join(stuck)}: no reset_parameters method, or one that does not set "
            "them. Add one, or"
        )


def _check_new(drawn: Mapping[str, Tensor], old: Mapping[str, Tensor], which: str) -> None:
    """Raise with the parameters that have the old values again; small or constant ones can by chance."""
    varied = [name for name, p in drawn.items() if p.numel() > 1 and (p != p.flatten()[0]).any()]
    again = {name for name, p in drawn.items() if torch.equal(p, old[name].detach().to(p.device, p.dtype))}
    same = [name for name in varied if name in again]
    large = [name for name in same if drawn[name].numel() > _LARGE]
    if large or (same and len(again) == len(drawn)):
        raise _CannotDraw(
            f"drew the model's {which} weights of {', '.join((large or same)[:5])}: does an init_weights load a saved "
            "state, or start from a fixed seed? Rewinding would change nothing there. Instead,"
        )


def _warn_of_spread(fresh: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> None:
    unlike = []
    for name, p in fresh.items():
        now, then = (float(values.float().std(correction=0)) for values in (p, initial[name]))
        if p.numel() >= _LARGE and max(now, then) > _SPREAD * min(now, then):
            unlike.append(f"{name} {now:.2g} instead of {then:.2g}")
    if unlike:
        warnings.warn(
            f"values='fresh': the fresh values are spread unlike the initial ones (standard deviations: "
            f"{', '.join(unlike[:3])}): your own initialisation (for example in __init__) is not applied. Put it into "
            "init_weights(), or leave values at 'initial'.",
            UserWarning,
            stacklevel=3,
        )


_LARGE = 100
_SPREAD = 1.5  # of 100 normal values, standard deviations differ by this factor with a probability below 1e-4
