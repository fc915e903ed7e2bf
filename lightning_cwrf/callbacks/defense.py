"""A defense for the length of a fit."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.compile import from_compiled, to_uncompiled
from torch._dynamo import OptimizedModule

from lightning_cwrf.defenses.base import DefenseMixin, save_defense
from lightning_cwrf.defenses.registry import create_defense
from lightning_cwrf.defenses.settings import Defense
from lightning_cwrf.defenses.state import DefenseState
from lightning_cwrf.lightning_private import compile_context, drop_compiled_steps, trainer_of
from lightning_cwrf.trainers import callbacks_of, refuse_pytorch_lightning, warn_if_finished


class DefenseCallback(Callback):
    """Attaches a defense to the module when a fit starts, and detaches it when the fit ends or raises.

    So a hardening is callbacks alone, and the module has its own class before and after. Checkpoints hold the
    defense's settings, and a run resumes from them with the same callback.

    Args:
        defense: a registered name, or a defense object.
        settings: of the defense, where it is given by name.

    Raises:
        TypeError: neither a name nor a defense, an unknown setting, or one of the wrong type.
        ValueError: an unknown name, or a setting out of range.
        MisconfigurationException: when the fit starts, as :meth:`DefenseMixin.attach`.

    >>> DefenseCallback("relaxloss", alpha=0.5).defense
    RelaxLoss(alpha=0.5, upper=1.0)
    """

    def __init__(self, defense: str | Defense, **settings: Any) -> None:
        given: Any = defense
        if not isinstance(given, (str, Defense)):
            raise TypeError(
                "DefenseCallback takes the name of a defense, such as 'relaxloss', or settings, such as "
                f"RelaxLoss(alpha=1.0), not {given!r}. Of a mixin of yours, pass its settings: mixin.defense_class()."
            )
        if isinstance(defense, Defense) and settings:
            name = type(defense).__name__
            raise TypeError(f"DefenseCallback got {', '.join(settings)} beside a {name}: pass it to {name}(...).")
        self.defense = create_defense(defense, **settings) if isinstance(defense, str) else defense
        self._module: weakref.ref[LightningModule] | None = None
        self._state: DefenseState | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(trainer, pl_module)
        if stage != "fit":
            return
        warn_if_finished(trainer)
        with _compiled_as_before(pl_module):
            attached: Any = self.defense.attach(pl_module)
        self._module, self._state = weakref.ref(pl_module), attached.defense_state

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._detach(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """After the fit the module no longer has the defense, but a checkpoint must still hold what it kept."""
        if self._state is not None and self._is_ours(pl_module) and not isinstance(pl_module, DefenseMixin):
            save_defense(pl_module, self._state, checkpoint)

    def _detach(self, module: LightningModule) -> None:
        # Not one that the user attached since.
        if self._state is not None and getattr(module, "defense_state", None) is self._state:
            with _compiled_as_before(module):
                DefenseMixin.detach(module)

    def _is_ours(self, module: LightningModule) -> bool:
        return self._module is not None and self._module() is module

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be copied or sent to another process.
        return {**self.__dict__, "_module": None, "_state": None}


def defense_of(module: LightningModule) -> Defense | None:
    """The defense that a module has, or that a callback gave it in its last fit; None where there is none."""
    if isinstance(module, DefenseMixin):
        defense: Defense = module.defense
        return defense
    trainer = trainer_of(module)
    callbacks = [] if trainer is None else callbacks_of(trainer, DefenseCallback)
    ours = (each for each in callbacks if each._is_ours(module))
    return next((each.defense for each in ours), None)


@contextmanager
def _compiled_as_before(module: LightningModule) -> Iterator[None]:
    """Change the class of a module that may be compiled, and compile its new steps as the old ones were."""
    context = compile_context(module)
    if context is not None:
        step = context["original_training_step"]
        # Of a wrapper that is fitted again, the "original" step is the compiled one of the fit before.
        if hasattr(step, "_torchdynamo_orig_callable") or getattr(step, "__func__", None) is type(module).training_step:
            drop_compiled_steps(module)
        else:
            to_uncompiled(module)
    try:
        yield
    finally:
        if context is not None:
            from_compiled(OptimizedModule(module, context["dynamo_ctx"]))
