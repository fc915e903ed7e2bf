"""What a defense keeps on a module while it is attached, and what of it goes into checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cwrf.defenses.settings import Defense
from lightning_cwrf.lightning_private import logs_hparams

CHECKPOINT_KEY = "lightning_cwrf_defense"


class DefenseState:
    """What a defense keeps on a module while it is attached; ``detach`` drops it.

    A defense that needs more than its settings has a subclass, and names it as the mixin's ``state_class``. When it is
    made, the module's class is that of the defense already.
    """

    def __init__(self, module: LightningModule, defense: Defense) -> None:
        self.defense = defense
        self.logged = logs_hparams(module)
        # A hyper-parameter "defense" of the user's own stays what it is.
        self.hparam = CHECKPOINT_KEY if "defense" in module.hparams else "defense"

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the settings, and what a resumed run needs, into a checkpoint."""
        checkpoint[CHECKPOINT_KEY] = self.defense.named()

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take what :meth:`save` put there; a run under other settings is warned about."""
        saved, now = saved_defense(checkpoint), self.defense.named()
        if saved is not None and saved != now:
            rank_zero_warn(f"the checkpoint was trained with the defense {saved}; now it is {now}.")

    def end(self) -> None:
        """Undo what reaches beyond this object."""


def saved_defense(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Name and settings of the defense that a checkpoint was trained with; None where there was none."""
    saved = checkpoint.get(CHECKPOINT_KEY, checkpoint.get("defense"))  # "defense": of the previous release
    return saved if isinstance(saved, dict) and "name" in saved else None
