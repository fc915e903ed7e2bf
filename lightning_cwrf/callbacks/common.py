"""What the callbacks share: finding each other, doing their work once, and errors for set-ups that cannot work."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cwrf.defenses.state import saved_defense
from lightning_cwrf.trainers import (
    callbacks_of,
    refuse_pytorch_lightning,
    warn_if_finished,
)

C = TypeVar("C", bound=Callback)
_START_ANEW = (
    "a resumed run keeps what was scored and rewound then. Pass the old settings; or, to harden again, load the "
    "finished weights (load_from_checkpoint) and fit them without ckpt_path, with new callbacks."
)


class CheckedCallback(Callback):
    """A callback that checks in ``setup`` whether it can work in its Trainer."""

    why_not_sharded = "a mask over whole parameters cannot follow. Use one device or DDP"
    """Why it does not work with strategies that shard the weights, and what to do."""

    def setup(self, *given: Any, **stage: Any) -> None:
        """Raise for a class instead of an instance and for sharding strategies; then :meth:`prepare`.

        Lightning calls it with the trainer, the module and ``stage=``.
        """
        first: Any = self  # the trainer, where the Trainer was given the class instead of an instance
        _refuse_classes(given[0] if isinstance(first, Callback) else first)
        refuse_pytorch_lightning(*given[:2])
        self._set_up(*given, **stage)

    def _set_up(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_sharding(trainer, self)
        if stage == "fit":
            warn_if_finished(trainer)
        self.prepare(trainer, pl_module, stage)

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What a callback does in ``setup``."""

    def on_exception(self, *given: Any) -> None:
        """Do nothing, with any arguments: called on a class, it must not hide the error of ``setup``."""


class OncePerModule(CheckedCallback):
    """A callback that does its work once for a module, however often that module is fitted or resumed.

    With another module, the same callback starts over. Subclasses define :meth:`reset`; their ``state_dict`` says in a
    resumed run that the work is done. Those whose work depends on settings define :meth:`settings`, set
    :attr:`done_with` to them when the work is done, and save them in their state: a later run with other settings is an
    error, because it would keep the old work.
    """

    several = ""
    """The end of the error about two of them in one Trainer: how to have more than one, where that is possible."""
    done_with: dict[str, Any] | None = None
    later: ClassVar[dict[str, Any]] = {}
    """Settings that came after others, with the values that work done without them had."""
    _module: weakref.ref[LightningModule] | None = None

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        twins = sum(other.state_key == self.state_key for other in callbacks_of(trainer, OncePerModule))
        if twins > 1:
            raise MisconfigurationException(
                f"there are {twins} {type(self).__name__}s in this Trainer; keep one{self.several}."
            )
        if stage != "fit":
            return
        if self._module is None or self._module() is not pl_module:
            self.done_with = None
            self.reset()
        self._module = weakref.ref(pl_module)

    def reset(self) -> None:
        """Forget the work done for another module."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What the work depends on, as plain values. None is not compared."""
        return {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if HOLDER in checkpoint.get("callbacks", {}) and not callbacks_of(trainer, HoldsWeights):
            raise MisconfigurationException(
                f"this run was made with {HOLDER}, which is not in this Trainer: nothing would hold the rewound "
                "weights. Add it; or load the weights (load_from_checkpoint) instead of resuming."
            )
        defense = saved_defense(checkpoint)
        if defense is not None and not hasattr(pl_module, "defense_settings"):
            raise MisconfigurationException(
                f"this run was made with the defense {defense['name']}, and {type(pl_module).__name__} has none. "
                "Attach it with its settings before the fit, or by DefenseCallback; or load the weights "
                "(load_from_checkpoint) instead of resuming."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.done_with:  # also of early versions, whose checkpoints have no settings
            return
        done_with = {**self.later, **self.done_with}
        for name, now in self.settings().items():
            before = done_with.get(name)
            if before is not None and now is not None and before != now:
                raise MisconfigurationException(
                    f"{type(self).__name__} did its work with {name}={before!r}, and now it has {name}={now!r}: "
                    f"{_START_ANEW}"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}  # a weak reference cannot be copied or sent to another process


class RewindsWeights(OncePerModule):
    """What :class:`CriticalRewindCallback` is to callbacks that it imports."""


class HoldsWeights(OncePerModule):
    """What :class:`GradientMaskCallback` is to callbacks that it imports. Subclasses have its state in a checkpoint."""

    @property
    def state_key(self) -> str:
        return HOLDER


HOLDER = "GradientMaskCallback"


def saved_state(method: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Mark a ``state_dict`` so that Lightning leaves the error about two callbacks of one class to this package.

    Lightning raises as soon as the Trainer is made, with advice about ``state_key`` that is of no use here. It passes
    methods that wrap ``Callback.state_dict``; :class:`OncePerModule` raises in ``setup`` instead.
    """
    method.__wrapped__ = Callback.state_dict  # type: ignore[attr-defined]
    return method


def earlier(trainer: Trainer, callback: Callback, kind: type[C], needs: str) -> C | None:
    """The callback of ``kind`` in the trainer, which must come before ``callback``; None where there is none."""
    found = callbacks_of(trainer, kind)
    if len(found) > 1:
        raise MisconfigurationException(f"there are {len(found)} {kind.__name__}s in this Trainer; keep one.")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if found and callbacks.index(found[0]) > callbacks.index(callback):
        name = type(callback).__name__
        raise MisconfigurationException(
            f"{name} takes {needs} from {kind.__name__}, which comes after it; put {kind.__name__} before {name}."
        )
    return found[0] if found else None


def refuse_sharding(trainer: Trainer, callback: CheckedCallback) -> None:
    """Raise where a strategy shards or flattens parameters."""
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        ours, theirs = type(callback).__name__, type(trainer.strategy).__name__
        raise MisconfigurationException(
            f"{ours} does not work with {theirs}, which shards the weights: {callback.why_not_sharded}."
        )


def averaging_in(trainer: Trainer) -> Callback | None:
    """The callback that replaces the last weights by an average over the training, where there is one."""
    found: list[Callback] = callbacks_of(trainer, StochasticWeightAveraging, WeightAveraging)
    return found[0] if found else None


def refuse_moved_weights(trainer: Trainer, callback: Callback) -> None:
    """Raise where a callback averages weights over time, or prunes them: they cannot stay at their vanilla values."""
    if callbacks_of(trainer, ModelPruning):
        raise MisconfigurationException(
            f"{type(callback).__name__} does not work with ModelPruning, which renames the weights and sets some of "
            "them to zero. Harden the model first, and prune it in a later fit; or prune it before, and make that "
            "permanent (torch.nn.utils.prune.remove)."
        )
    averaging = averaging_in(trainer)
    if averaging is not None:
        raise MisconfigurationException(
            f"{type(callback).__name__} does not work with {type(averaging).__name__}: an average over training moves "
            "the frozen weights away from their vanilla values. Remove one of the two from the Trainer."
        )


def _refuse_classes(trainer: Any) -> None:
    for kind in trainer.callbacks:
        if isinstance(kind, type):
            raise MisconfigurationException(
                f"the Trainer was given the class {kind.__name__}: pass an instance, {kind.__name__}(...)."
            )
