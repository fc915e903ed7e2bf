"""How the gradients of examples are scaled, and what noise that asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cwrf.defenses.dpsgd.ledger import Ledger
from lightning_cwrf.defenses.dpsgd.settings import DPSGD

_TINY = 1e-6  # Opacus adds it to a norm before dividing by it


class Clipping:
    """Flat clipping (Abadi et al. 2016): ``g · min(1, C / |g|)``, where ``|g|`` is over all parameters.

    ``norms`` and the factors of a batch have the shape ``(parameters, n)``.
    """

    def __init__(self, max_grad_norm: float) -> None:
        self.max_grad_norm = max_grad_norm

    @property
    def sensitivity(self) -> float:
        """The largest norm of what one example adds to the sum of the gradients."""
        return self.max_grad_norm

    def factors(self, norms: Tensor) -> Tensor:
        """What each example's gradient is multiplied by, for each parameter."""
        return self.of_whole(norms.norm(2, dim=0)).expand_as(norms)

    def of_whole(self, norms: Tensor) -> Tensor:
        """The factors by the norms of whole gradients, shape ``(n,)``."""
        return (self.max_grad_norm / (norms + _TINY)).clamp(max=1.0)

    def gradient_noise(self, noise_multiplier: float) -> float:
        """The gradients' share of a step's noise multiplier, in units of :attr:`sensitivity`."""
        return noise_multiplier

    def end_step(self, noise_multiplier: float, generator: torch.Generator, distributed: bool) -> None:
        """Called after the noise of a step has been added."""


class AutomaticClipping(Clipping):
    """Automatic clipping (AUTO-S, Bu et al. 2023): ``g · C / (|g| + γ)``, where ``γ`` is ``stability``."""

    def __init__(self, max_grad_norm: float, stability: float) -> None:
        super().__init__(max_grad_norm)
        self.stability = stability

    def of_whole(self, norms: Tensor) -> Tensor:
        return self.max_grad_norm / (norms + self.stability)


class PerLayerClipping(Clipping):
    """Each layer's part of a gradient is clipped to a bound of its own, so that the whole is at most √(Σ C_l²).

    Args:
        layers: for each parameter, the number of its layer.
        bounds: the bound of each layer.
    """

    def __init__(self, layers: Sequence[int], bounds: Sequence[float]) -> None:
        super().__init__(math.sqrt(sum(bound**2 for bound in bounds)))
        self.layers, self.bounds = layers, bounds

    def factors(self, norms: Tensor) -> Tensor:
        layers = torch.tensor(self.layers, device=norms.device)
        squares = norms.new_zeros(len(self.bounds), norms.shape[1]).index_add(0, layers, norms.square())
        return (norms.new_tensor(self.bounds)[:, None] / (squares.sqrt() + _TINY)).clamp(max=1.0)[layers]


class AdaptiveClipping(Clipping):
    """Flat clipping to a norm that follows a quantile of the gradients' norms (Andrew et al. 2021).

    Each step also releases a noisy count of the examples that were not clipped. Each example adds ½ or -½ to it, so
    its sensitivity is ½, also where the size of the batch is private, as in Poisson sampling. The two releases together
    are one Gaussian mechanism with the step's noise multiplier ``z``: the gradients' own is
    ``(z⁻² - (2σ_b)⁻²)^(-½)`` (their Theorem 1), where ``σ_b`` is the standard deviation of the count's noise.
    """

    def __init__(
        self,
        ledger: Ledger,
        max_grad_norm: float,
        *,
        quantile: float,
        learning_rate: float,
        count_std: float | None,
        expected_size: float,
    ) -> None:
        self.ledger = ledger
        if ledger.clip_norm is None:
            ledger.clip_norm = ledger.first_clip_norm = max_grad_norm
        super().__init__(ledger.clip_norm)
        self.quantile, self.learning_rate = quantile, learning_rate
        self.count_std, self.expected_size = count_std, expected_size
        self.count: Tensor | None = None  # unclipped minus clipped examples of the logical batch, halved

    def count_noise(self, noise_multiplier: float) -> float:
        """σ_b of a step: as given, or 1/20 of the batch (Andrew et al.) and never less than the noise multiplier."""
        if not noise_multiplier:
            return 0.0
        return self.count_std or max(self.expected_size / 20, noise_multiplier)

    def gradient_noise(self, noise_multiplier: float) -> float:
        if not noise_multiplier:
            return 0.0
        count_std = self.count_noise(noise_multiplier)
        rest = noise_multiplier**-2 - (2 * count_std) ** -2
        if rest <= 0:
            raise MisconfigurationException(
                f"unclipped_num_std={count_std:g} is too small for a noise multiplier of {noise_multiplier:g}: the "
                f"count alone would spend the whole budget. Take more than {noise_multiplier / 2:g}."
            )
        return float(rest**-0.5)

    def factors(self, norms: Tensor) -> Tensor:
        whole = norms.norm(2, dim=0)
        count = (whole <= self.max_grad_norm).double().sub(0.5).sum()
        self.count = count if self.count is None else self.count + count
        return self.of_whole(whole).expand_as(norms)

    def end_step(self, noise_multiplier: float, generator: torch.Generator, distributed: bool) -> None:
        device = generator.device
        count = torch.zeros((), dtype=torch.float64, device=device) if self.count is None else self.count
        if noise_multiplier and not (distributed and torch.distributed.get_rank()):
            noise = torch.randn((), generator=generator, dtype=torch.float64, device=device)
            count = count + self.count_noise(noise_multiplier) * noise
        if distributed:
            count = count.clone()
            torch.distributed.all_reduce(count)
        self.count = None
        unclipped = 0.5 + float(count) / self.expected_size
        norm = self.max_grad_norm * math.exp(-self.learning_rate * (unclipped - self.quantile))
        if not 1e-30 < norm < 1e30:
            raise MisconfigurationException(
                f"adaptive clipping has moved the clip norm to {norm:g}, beyond what float32 can clip to. Lower "
                "clipbound_learning_rate, or take larger batches."
            )
        self.max_grad_norm = self.ledger.clip_norm = norm


def make_clipping(
    settings: DPSGD, ledger: Ledger, layers: Sequence[str], frozen: Sequence[bool], expected_size: float
) -> Clipping:
    """The clipping of a fit. ``layers`` names the layer of each parameter; ``frozen``: no weight of it is trained."""
    if settings.clipping == "adaptive":
        return AdaptiveClipping(
            ledger,
            settings.max_grad_norm,
            quantile=settings.target_unclipped_quantile,
            learning_rate=settings.clipbound_learning_rate,
            count_std=settings.unclipped_num_std,
            expected_size=expected_size,
        )
    if settings.clipping == "automatic":
        return AutomaticClipping(settings.max_grad_norm, settings.stability)
    if settings.clipping == "per_layer":
        names = list(dict.fromkeys(layers))
        live = {layer for layer, held in zip(layers, frozen, strict=True) if not held}
        bounds = _bounds(names, live, settings.max_grad_norm, settings.layer_norms)
        return PerLayerClipping([names.index(layer) for layer in layers], bounds)
    return Clipping(settings.max_grad_norm)


def _bounds(names: list[str], live: set[str], whole: float, given: dict[str, float] | None) -> list[float]:
    """The bound of each layer; 0 for a layer whose weights are all frozen, which has no gradient."""
    if given is None:
        return [whole / math.sqrt(len(live)) if name in live else 0.0 for name in names]
    unknown, missing = sorted(set(given) - set(names)), [name for name in names if name in live - set(given)]
    if unknown or missing:
        wrong = [f"lacks {', '.join(map(repr, missing))}"] * bool(missing)
        wrong += [f"names {', '.join(map(repr, unknown))}"] * bool(unknown)
        raise MisconfigurationException(
            f"layer_norms needs a bound for each trained layer, and {' and '.join(wrong)}. The layers are "
            f"{', '.join(map(repr, names))}."
        )
    return [float(given[name]) if name in live else 0.0 for name in names]
