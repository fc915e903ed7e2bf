"""The settings of DP-SGD, and what it keeps on a module."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from lightning_cwrf.checks import check_choice, check_flag, check_integer, check_number
from lightning_cwrf.data.poisson import PoissonBatches
from lightning_cwrf.defenses.composition import check_on
from lightning_cwrf.defenses.dpsgd.checks import refuse_draws, warn_of_plain_steps
from lightning_cwrf.defenses.dpsgd.layers import fix_layers
from lightning_cwrf.defenses.dpsgd.ledger import ACCOUNTANTS, Ledger
from lightning_cwrf.defenses.dpsgd.step import PrivateStep
from lightning_cwrf.defenses.registry import register_defense
from lightning_cwrf.defenses.settings import Defense
from lightning_cwrf.defenses.state import DefenseState
from lightning_cwrf.lightning_private import trainer_of
from lightning_cwrf.weights.masks import WeightMask

_STATE_KEY = "dpsgd"


@register_defense("dpsgd")
@dataclass(frozen=True, kw_only=True)
class DPSGD(Defense):
    """Settings of :class:`DPSGDMixin`.

    Args:
        target_epsilon: ε to end with, after all steps of the Trainer; the noise follows from it. Either this
        noise_multiplier: or σ, the noise's standard deviation in units of ``max_grad_norm``. 0: no noise, ε = ∞.
        target_delta: δ; below 1 / (number of training examples).
        max_grad_norm: C, the largest norm of an example's gradient. Common: 0.1 to 1.5.
        accountant: ``"prv"`` (tightest), ``"rdp"`` or ``"gdp"`` (an approximation that may understate ε).
        max_physical_batch_size: split logical batches so that no more examples than this are in memory at once.
        ghost: clip by norms alone, in two backward passes (ghost clipping): less memory for large layers. With frozen
            weights the norms are taken layer by layer from masked gradients (fast gradient clipping).
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
        # Without noise there is no guarantee, and without clipping as well it is plain SGD.
        clip = self.max_grad_norm
        if not (isinstance(clip, float) and clip == math.inf and self.noise_multiplier == 0):
            hint = "It may be infinite where noise_multiplier is 0."
            check_number("max_grad_norm", clip, low=0, low_open=True, hint=hint)
        check_choice("accountant", self.accountant, ACCOUNTANTS)
        if self.max_physical_batch_size is not None:
            check_integer("max_physical_batch_size", self.max_physical_batch_size, low=1)
        for name in ("ghost", "fix", "from_scratch"):
            check_flag(name, getattr(self, name))
        check_on(self, per_example=True)


class DPSGDState(DefenseState):
    """The ledger, and what a fit needs while it runs.

    The ledger is the module's own as well: what its weights have spent accumulates across attaches.
    """

    def __init__(self, module: Any, defense: DPSGD) -> None:
        super().__init__(module, defense)
        refuse_draws(module)
        earlier = getattr(module, "_dpsgd_ledger", None)
        self.ledger = Ledger(defense.accountant, from_scratch=defense.from_scratch, earlier=earlier)
        self.step: PrivateStep | None = None
        self.batches: PoissonBatches | None = None
        self.frozen: WeightMask | None = None
        self.accumulation: tuple[Trainer, int] | None = None
        trainer = trainer_of(module)
        if defense.from_scratch and trainer is not None and trainer.global_step > self.ledger.steps:
            warn_of_plain_steps("module", trainer.global_step)
        if defense.fix:
            fix_layers(module)
        module._dpsgd_ledger = self.ledger

    def save(self, checkpoint: dict[str, Any]) -> None:
        super().save(checkpoint)
        if self.step is not None:
            self.ledger.noise_state = self.step.noise.get_state()
        checkpoint[_STATE_KEY] = self.ledger.state_dict()

    def load(self, checkpoint: dict[str, Any]) -> None:
        super().load(checkpoint)
        if _STATE_KEY in checkpoint:
            self.ledger.load_state_dict(checkpoint[_STATE_KEY])
        elif self.ledger.from_scratch and checkpoint.get("global_step"):
            warn_of_plain_steps("checkpoint", checkpoint["global_step"])

    def end_step(self) -> None:
        """Remove the hooks, and keep the state of the noise."""
        if self.step is not None:
            self.ledger.noise_state = self.step.noise.get_state()
            self.step.remove()
            self.step = None

    def end(self) -> None:
        self.end_step()
        if self.accumulation is not None:
            trainer, asked = self.accumulation
            trainer.accumulate_grad_batches, self.accumulation = asked, None

    def __getstate__(self) -> dict[str, Any]:
        # A copy is scored or loaded, and a fit of it creates these.
        return {**self.__dict__, "step": None, "batches": None, "accumulation": None}
