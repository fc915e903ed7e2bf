"""The settings of DP-SGD."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from lightning_cwrf.checks import check_choice, check_flag, check_integer, check_number
from lightning_cwrf.defenses.composition import check_on
from lightning_cwrf.defenses.dpsgd.ledger import ACCOUNTANTS
from lightning_cwrf.defenses.registry import register_defense
from lightning_cwrf.defenses.settings import Defense

CLIPPINGS = ("flat", "per_layer", "adaptive", "automatic")
# The settings that one kind of clipping has.
_OF_CLIPPING = {
    "layer_norms": "per_layer",
    "target_unclipped_quantile": "adaptive",
    "clipbound_learning_rate": "adaptive",
    "unclipped_num_std": "adaptive",
    "stability": "automatic",
}


@register_defense("dpsgd")
@dataclass(frozen=True, kw_only=True)
class DPSGD(Defense):
    """Settings of :class:`DPSGDMixin`.

    Args:
        target_epsilon: ε to end with, after all steps of the Trainer; the noise follows from it. Either this
        noise_multiplier: or σ, the noise's standard deviation in units of ``max_grad_norm``. 0: no noise, ε = ∞.
        target_delta: δ; below 1 / (number of training examples).
        max_grad_norm: C, the largest norm of an example's gradient, or the first one of adaptive clipping. Common: 0.1
            to 1.5.
        clipping: ``"flat"`` (Abadi et al. 2016); ``"per_layer"``: each layer to a bound of its own; ``"adaptive"``: to
            a norm that follows a quantile of the norms (Andrew et al. 2021); ``"automatic"``: each gradient times
            ``C / (norm + stability)`` (Bu et al. 2023), so that only the learning rate is left to tune.
        layer_norms: of per-layer clipping: the bound of each layer by its name, instead of ``max_grad_norm``. None:
            ``max_grad_norm / √(number of trained layers)`` each.
        target_unclipped_quantile: of adaptive clipping: the share of examples that are not clipped.
        clipbound_learning_rate: of adaptive clipping: the largest change of the clip norm's logarithm in a step.
        unclipped_num_std: of adaptive clipping: the standard deviation of the noise on the count of unclipped examples.
            None: a twentieth of the expected batch size, or the noise multiplier where that is more.
        stability: of automatic clipping: γ, below which a gradient's norm counts less.
        noise_gamma: what the noise multiplier is multiplied by every ``noise_step_size`` epochs.
        noise_step_size: see ``noise_gamma``.
        accountant: ``"prv"`` (tightest), ``"rdp"`` or ``"gdp"`` (an approximation that may understate ε).
        max_physical_batch_size: split logical batches so that no more examples than this are in memory at once.
        ghost: clip by norms alone (ghost clipping), in one backward pass where the layers allow it, else in two: less
            memory. In two passes with frozen weights, norms are taken layer by layer from masked gradients.
        fix: replace layers that mix examples, such as BatchNorm (by GroupNorm), instead of refusing them.
        from_scratch: say so if the start weights have seen no private data: ε then covers the whole training.
        on: the defense whose loss of each example is trained on; None: cross-entropy.

    Raises:
        ValueError: neither or both of ``target_epsilon`` and ``noise_multiplier``, or a value out of range.

    >>> DPSGD(noise_multiplier=1.0, max_grad_norm=0.5).accountant
    'prv'
    """

    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    target_delta: float = 1e-5
    max_grad_norm: float = 1.0
    clipping: str = "flat"
    layer_norms: dict[str, float] | None = None
    target_unclipped_quantile: float = 0.5
    clipbound_learning_rate: float = 0.2
    unclipped_num_std: float | None = None
    stability: float = 0.01
    noise_gamma: float = 1.0
    noise_step_size: int = 1
    accountant: str = "prv"
    max_physical_batch_size: int | None = None
    ghost: bool = False
    fix: bool = False
    from_scratch: bool = False
    on: Defense | None = None

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("DP-SGD needs one of target_epsilon and noise_multiplier, and not both.")
        if self.target_epsilon is not None:
            hint = "A larger one promises nothing; pass noise_multiplier for so little noise."
            check_number("target_epsilon", self.target_epsilon, low=0, high=100, low_open=True, hint=hint)
        if self.noise_multiplier is not None:
            check_number("noise_multiplier", self.noise_multiplier, low=0)
        hint = "It is the chance that the guarantee fails: take less than 1 / (number of training examples)."
        check_number("target_delta", self.target_delta, low=0, high=1, low_open=True, high_open=True, hint=hint)
        _check_clipping(self)
        check_number("noise_gamma", self.noise_gamma, low=0, low_open=True)
        check_integer("noise_step_size", self.noise_step_size, low=1)
        check_choice("accountant", self.accountant, ACCOUNTANTS)
        if self.max_physical_batch_size is not None:
            check_integer("max_physical_batch_size", self.max_physical_batch_size, low=1)
        for name in ("ghost", "fix", "from_scratch"):
            check_flag(name, getattr(self, name))
        check_on(self, per_example=True)


def _check_clipping(settings: DPSGD) -> None:
    """Raise a TypeError or ValueError for settings of clipping that are out of range, or of another kind."""
    kind = settings.clipping
    check_choice("clipping", kind, CLIPPINGS)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, of in _OF_CLIPPING.items():
        if kind != of and getattr(settings, name) != defaults[name]:
            raise ValueError(f'{name} is of clipping="{of}" and does nothing with "{kind}"; leave it out.')
    # Without noise there is no guarantee, and without clipping as well it is plain SGD.
    clip, plain = settings.max_grad_norm, kind in ("flat", "per_layer")
    if not (plain and isinstance(clip, float) and clip == math.inf and settings.noise_multiplier == 0):
        hint = "It may be infinite where noise_multiplier is 0." if plain else ""
        check_number("max_grad_norm", clip, low=0, low_open=True, hint=hint)
    quantile = settings.target_unclipped_quantile
    check_number("target_unclipped_quantile", quantile, low=0, high=1, low_open=True, high_open=True)
    check_number("clipbound_learning_rate", settings.clipbound_learning_rate, low=0, low_open=True)
    check_number("stability", settings.stability, low=0, low_open=True)
    if settings.unclipped_num_std is not None:
        check_number("unclipped_num_std", settings.unclipped_num_std, low=0, low_open=True)
        if settings.noise_multiplier == 0:
            raise ValueError("noise_multiplier=0 is without any noise: leave out unclipped_num_std.")
    if settings.layer_norms is not None:
        _check_layer_norms(settings.layer_norms, settings.max_grad_norm != defaults["max_grad_norm"])


def _check_layer_norms(norms: dict[str, float], whole: bool) -> None:
    if not isinstance(norms, dict):
        raise TypeError(f"layer_norms must be a dict of a bound for each layer's name, not {norms!r}.")
    for name, bound in norms.items():
        if not isinstance(name, str):
            raise TypeError(f"layer_norms must have names of layers as keys, not {name!r}.")
        check_number(f"layer_norms[{name!r}]", bound, low=0, low_open=True)
    if whole:
        raise ValueError(
            "layer_norms gives every layer its bound, and max_grad_norm follows from them (√ of the sum of their "
            "squares): pass one of the two."
        )
