"""What the callbacks share: finding one another, knowing when their work is done, and refusing what cannot work."""

from __future__ import annotations

import math
import weakref
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_cwrf.data import check_batches, first_batches
from lightning_cwrf.poisson import PoissonBatches, users_loader
from lightning_cwrf.sampling import support

C = TypeVar("C", bound=Callback)


class OncePerModule(Callback):
    """A callback that does its work once for a module, however often that module is fitted or resumed.

    Another module in the same callback begins anew. Subclasses define :meth:`reset`; what they set afterwards
    (``state_dict``) tells a resumed run that the work is done.
    """

    _module: weakref.ref[LightningModule] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_sharding(trainer, self)
        if stage != "fit":
            return
        if self._module is None or self._module() is not pl_module:
            self.reset()
        self._module = weakref.ref(pl_module)

    def reset(self) -> None:
        """Forget the work done for another module."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}  # a weak reference cannot be copied or sent to another process


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


def unseen_share(trainer: Trainer) -> float:
    """The share of what the training loader can give that the whole training is expected to leave out.

    Poisson batches leave none out: with them, a member is what can be drawn.
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
    return support(loader, int(batches)).unseen(epochs)
