"""What DP-SGD keeps on a module."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_cwrf.data.poisson import PoissonBatches
from lightning_cwrf.defenses.dpsgd.checks import refuse_draws, warn_of_plain_steps
from lightning_cwrf.defenses.dpsgd.layers import fix_layers
from lightning_cwrf.defenses.dpsgd.ledger import Ledger
from lightning_cwrf.defenses.dpsgd.settings import DPSGD
from lightning_cwrf.defenses.dpsgd.step import PrivateStep
from lightning_cwrf.defenses.state import DefenseState
from lightning_cwrf.lightning_private import trainer_of
from lightning_cwrf.weights.masks import WeightMask

_STATE_KEY = "dpsgd"


class DPSGDState(DefenseState):
    """The ledger, and what a fit needs while it runs.

    The ledger is the module's own as well: what its weights have spent accumulates across attaches.
    """

    def __init__(self, module: Any, defense: DPSGD) -> None:
        super().__init__(module, defense)
        refuse_draws(module)
        earlier = getattr(module, "_dpsgd_ledger", None)
        self.ledger = Ledger(defense.accountant, from_scratch=defense.from_scratch, earlier=earlier)
        if earlier is not None and defense.clipping == "adaptive" and earlier.first_clip_norm == defense.max_grad_norm:
            # It comes from counts that are accounted for; DefenseCallback attaches anew for each fit.
            self.ledger.clip_norm, self.ledger.first_clip_norm = earlier.clip_norm, earlier.first_clip_norm
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
