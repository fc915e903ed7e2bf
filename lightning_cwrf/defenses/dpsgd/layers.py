"""Layers that DP-SGD cannot take per-example gradients through, and what replaces them."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


def unsupported_layers(module: nn.Module) -> dict[str, str]:
    """Why a layer has no per-example gradient, by the layer's name."""
    from opacus.validators import ModuleValidator

    found = {}
    for name, layer in module.named_modules():
        trained = any(p.requires_grad for p in layer.parameters(recurse=False))
        if isinstance(layer, _BatchNorm):
            # Also without weights of its own: it mixes the examples as soon as it is in training mode.
            if layer.training or trained:
                found[name] = f"{type(layer).__name__} mixes the examples of a batch"
        elif getattr(layer, "max_norm", None) is not None:  # also where it is frozen
            found[name] = f"{type(layer).__name__}(max_norm=...) rescales the rows of a batch in place, without noise"
        elif getattr(layer, "track_running_stats", False) and isinstance(layer, _NormBase):
            found[name] = f"{type(layer).__name__}(track_running_stats=True) keeps statistics of examples without noise"
        elif trained and getattr(layer, "scale_grad_by_freq", False):
            found[name] = f"{type(layer).__name__}(scale_grad_by_freq=True) mixes the examples of a batch"
        elif trained and getattr(layer, "padding_mode", "zeros") != "zeros":
            found[name] = (
                f"{type(layer).__name__}(padding_mode={layer.padding_mode!r}), whose gradient Opacus takes as that of "
                "zeros: pad before it, by nn.ReflectionPad2d, nn.CircularPad2d or nn.ReplicationPad2d"
            )
        elif trained and type(layer) in ModuleValidator.VALIDATORS and ModuleValidator.VALIDATORS[type(layer)](layer):
            found[name] = f"{type(layer).__name__} is not supported by Opacus"
        elif trained and any(True for _ in layer.buffers()):
            found[name] = f"{type(layer).__name__} has weights and buffers in one layer"
    return found


def fix_layers(module: nn.Module) -> None:
    """Replace, in place, the layers that Opacus has a substitute for."""
    from opacus.validators import ModuleValidator

    replaced = []
    for name in unsupported_layers(module):
        layer = module.get_submodule(name)
        fixer = ModuleValidator.FIXERS.get(type(layer))
        if fixer is None:
            continue
        substitute = fixer(layer)
        like = next(layer.parameters(), None)
        substitute = substitute.to(like) if like is not None else substitute
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, substitute.train(layer.training))
        replaced.append(f"{name}: {type(layer).__name__} by {type(substitute).__name__}")
    if replaced:
        rank_zero_warn(
            f"fix=True replaced {'; '.join(replaced)}. Their running statistics are lost. A checkpoint fits the class "
            "with the same layers (attach with fix=True before loading), and so must vanilla weights (a factory does)."
        )


def check_layers(module: LightningModule) -> None:
    """Raise a MisconfigurationException that names the layers without a gradient for each example."""
    wrong = unsupported_layers(module)
    if wrong:
        listed = "; ".join(f"{name} ({reason})" for name, reason in wrong.items())
        raise MisconfigurationException(
            f"DP-SGD cannot take per-example gradients through {listed}. Replace these layers (BatchNorm by "
            "GroupNorm, for one) or those settings; fix=True does so for the layers that Opacus has a substitute for."
        )
