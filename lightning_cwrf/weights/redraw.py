"""Initial weights for a model whose own are lost, by ``reset_parameters``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_cwrf.data import isolated_rng
from lightning_cwrf.weights.copies import capture, copied


def redraw(model: nn.Module) -> dict[str, Tensor]:
    """Draw new initial weights by ``reset_parameters`` of every layer, on a copy; the caller's RNG is not advanced.

    Parameters that are not trained (``requires_grad`` is False), such as those of a frozen backbone, keep the model's
    values, and so do the buffers of layers whose parameters are all frozen. The running statistics of other BatchNorm
    layers are reset, as before training.

    These are not the weights that training started from. The paper (§4.4) finds that the position of a critical weight
    matters rather than its value; hence a warning, not an error.

    Raises:
        ValueError: a module owns parameters but has no ``reset_parameters``, or one that does not set all of them, as
            with ``spectral_norm``.
    """
    work = copied(model)
    stuck = []
    kept = {name: p.detach().clone() for name, p in work.named_parameters() if not p.requires_grad}
    device = next((p.device for p in work.parameters()), None)
    with isolated_rng(device):
        for name, module in work.named_modules():
            own = list(module.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                continue
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                left = f": {', '.join(names)}" if (names := _left_by(reset, module)) else None
            else:
                left = "" if own else None
            if left is not None:
                stuck.append(f"{name or 'the model itself'} ({type(module).__name__}{left})")
    if stuck:
        raise ValueError(
            f"vanilla='redraw' cannot draw the parameters of {', '.join(stuck)}: no reset_parameters method, or one "
            "that does not set them. Add one, "
            "or pass the initial weights (VanillaSnapshotCallback saves them), or a factory of untrained modules."
        )
    warnings.warn(
        "vanilla='redraw': the initial weights are drawn again by each layer's reset_parameters. They are not those "
        "that training started from, and your own initialisation (for example in __init__) is not applied.",
        UserWarning,
        stacklevel=2,
    )
    return {**capture(work), **{name: value.cpu() for name, value in kept.items()}}


@torch.no_grad()
def _left_by(reset: Callable[[], Any], module: nn.Module) -> list[str]:
    """Redraw a module's own parameters; returns the names of those that its ``reset_parameters`` does not set."""
    own = [(name, p) for name, p in module.named_parameters(recurse=False) if not is_lazy(p)]
    for _, p in own:
        p.fill_(math.nan)
    reset()
    return [name for name, p in own if p.isnan().any()]  # a lazy one has no values, which scoring reports
