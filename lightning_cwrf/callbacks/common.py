"""What the callbacks share: finding one another, knowing when their work is done, and refusing what cannot work."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_cwrf.data import check_batches, first_batches
from lightning_cwrf.data.poisson import PoissonBatches, users_loader
from lightning_cwrf.data.sampling import support
from lightning_cwrf.defenses.state import saved_defense

C = TypeVar("C", bound=Callback)
_START_ANEW = (
    "what was scored and rewound then is kept by a run that goes on. Pass the old settings; or, to harden anew, load "
    "the finished weights (load_from_checkpoint) and fit them without ckpt_path, with new callbacks."
)


class CheckedCallback(Callback):
    """A callback that tells, in words, when it cannot work where it was put."""

    def setup(self, *given: Any, **stage: Any) -> None:
        """Refuse a class instead of an instance, a second callback of this class, and sharding; then :meth:`prepare`.

        Lightning calls it with the trainer, the module and ``stage=``.
        """
        first: Any = self  # where the class was put in place of an instance, the trainer
        _refuse_classes(given[0] if isinstance(first, Callback) else first)
        self._set_up(*given, **stage)

    def _set_up(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_sharding(trainer, self)
        self.prepare(trainer, pl_module, stage)

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What a callback does in ``setup``."""

    def on_exception(self, *given: Any) -> None:
        """Nothing; but an error of ``setup`` is not hidden by another where a class was put in place of a callback."""


class OncePerModule(CheckedCallback):
    """A callback that does its work once for a module, however often that module is fitted or resumed.

    Another module in the same callback begins anew. Subclasses define :meth:`reset`; what they set afterwards
    (``state_dict``) tells a resumed run that the work is done. Those whose work depends on settings define
    :meth:`settings`, set :attr:`done_with` to them when it is done, and have them in their state: a later run with
    other settings is an error, because the work would be kept as it is.
    """

    several = ""
    """How a Trainer can have more than one of them; where it can."""
    done_with: dict[str, Any] | None = None
    _module: weakref.ref[LightningModule] | None = None

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        twins = sum(type(other) is type(self) and other.state_key == self.state_key for other in callbacks)
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
        """What the work depends on, as plain values; None is not compared."""
        return {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        holder = "GradientMaskCallback"
        here = {type(other).__name__ for other in trainer.callbacks}  # type: ignore[attr-defined]
        if holder in checkpoint.get("callbacks", {}) and holder not in here:
            raise MisconfigurationException(
                f"this run was made with {holder}, which is not in this Trainer: nothing would hold the rewound "
                "weights. Put it in; or load the weights (load_from_checkpoint) instead of resuming."
            )
        defense = saved_defense(checkpoint)
        if defense is not None and not hasattr(pl_module, "defense_settings"):
            raise MisconfigurationException(
                f"this run was made with the defense {defense['name']}, and {type(pl_module).__name__} has none. "
                "Attach it with its settings before the fit, or by DefenseCallback; or load the weights "
                "(load_from_checkpoint) instead of resuming."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.done_with is None:
            return
        for name, now in self.settings().items():
            before = self.done_with.get(name)
            if before is not None and now is not None and before != now:
                raise MisconfigurationException(
                    f"{type(self).__name__} did its work with {name}={before!r}, and now it has {name}={now!r}: "
                    f"{_START_ANEW}"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}  # a weak reference cannot be copied or sent to another process


def saved_state(method: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Mark a ``state_dict`` of which a Trainer may meet two.

    Lightning answers two stateful callbacks of one class by advice about ``state_key``, as soon as the Trainer is
    made. A method that says it wraps ``Callback.state_dict`` passes, and ``OncePerModule`` says what is wrong.
    """
    method.__wrapped__ = Callback.state_dict  # type: ignore[attr-defined]
    return method


def earlier(trainer: Trainer, callback: Callback, kind: type[C], needs: str) -> C | None:
    """The callback of ``kind`` in the trainer, which must stand before ``callback``; None where there is none."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found = [other for other in callbacks if isinstance(other, kind)]
    if len(found) > 1:
        raise MisconfigurationException(f"there are {len(found)} {kind.__name__}s in this Trainer; keep one.")
    if found and callbacks.index(found[0]) > callbacks.index(callback):
        name = type(callback).__name__
        raise MisconfigurationException(
            f"{name} takes {needs} from {kind.__name__}, which stands after it; put {kind.__name__} before {name}."
        )
    return found[0] if found else None


def refuse_sharding(trainer: Trainer, callback: Callback) -> None:
    """Raise where a strategy shards or flattens parameters, so that a mask of the full shape does not fit them."""
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        raise MisconfigurationException(
            f"{type(callback).__name__} does not work with {type(trainer.strategy).__name__}: it shards the weights, "
            "and a mask over whole parameters cannot follow. Use one device or DDP."
        )


def refuse_averaging(trainer: Trainer, callback: Callback) -> None:
    """Raise where weights are averaged over time: an average is not bit-identical to the vanilla weights."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, (StochasticWeightAveraging, WeightAveraging)):
            raise MisconfigurationException(
                f"{type(callback).__name__} does not work with {type(other).__name__}: an average over training moves "
                "the frozen weights away from their vanilla values. Take one of the two out of the Trainer."
            )


def training_data(trainer: Trainer, callback: Callback) -> Any:
    """What the trainer's own loader gives in the batches that are used; callbacks read a fresh copy (``as_loader``)."""
    loader = trainer.train_dataloader
    name = type(callback).__name__
    if loader is None:
        raise MisconfigurationException(f"{name} found no training data; pass members=...")
    try:
        check_batches(users_loader(loader))
    except TypeError as error:
        raise MisconfigurationException(
            f"{name} cannot read the training data, {error} Pass {name}(members=...), one loader or data set."
        ) from error
    if isinstance(loader, PoissonBatches):
        return loader.loader
    return first_batches(loader, trainer.num_training_batches)


def unseen_share(trainer: Trainer, *, so_far: bool = False) -> float:
    """The share of what the training loader can give that the whole training is expected to leave out.

    Poisson batches leave none out: with them, a member is what can be drawn.

    Args:
        trainer: in a fit.
        so_far: by the batches that there were, instead of those that there will be: a training may be stopped.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return 0.0
    batches = trainer.num_training_batches
    if math.isinf(batches) or batches == 0:
        return 0.0
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    if trainer.max_steps != -1:
        epochs = min(epochs, trainer.max_steps * trainer.accumulate_grad_batches / batches)
    if so_far:
        epochs = (trainer.fit_loop.epoch_loop.total_batch_idx + 1) / batches
    given = support(loader, int(batches))
    if epochs >= 1 or not given.places:
        return given.unseen(epochs)
    part = support(loader, max(1, math.ceil(epochs * batches)))
    return 1 - len(part.places) * (1 - part.unseen(1)) / len(given.places)


def _refuse_classes(trainer: Any) -> None:
    for kind in trainer.callbacks:
        if isinstance(kind, type):
            raise MisconfigurationException(
                f"the Trainer was given the class {kind.__name__}: pass an instance, {kind.__name__}(...)."
            )
