"""Recording each training example's loss over a training."""

from __future__ import annotations

import hashlib
import weakref
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_cwrf.attacks import example_losses
from lightning_cwrf.attacks.loss_trace import LossTraces
from lightning_cwrf.callbacks.common import saved_state
from lightning_cwrf.callbacks.coverage import check_coverage
from lightning_cwrf.callbacks.reading import SavesResult, training_data
from lightning_cwrf.checks import check_integer
from lightning_cwrf.classification import classification_step
from lightning_cwrf.data import Batches, OverlapCheck, all_ids, as_loader, bring_to, check_side
from lightning_cwrf.files import check_place
from lightning_cwrf.outputs import evaluating
from lightning_cwrf.trainers import Split, transfer_of


class LossTraceCallback(SavesResult):
    """Records every training example's loss over a training, which tells who is at risk without shadow models.

    Add it to a first training or a hardening. Before the first step, after every ``every_n_epochs`` epochs and at the
    end, the training examples are run through the model in eval mode, in order and without gradients. So the losses are
    those of the plain examples, whatever dropout, batches, accumulation, augmentation in ``training_step`` or a defense
    do to the training loss; they are cross-entropies. :attr:`result` has them, and :meth:`LossTraces.lt_iqr` and
    :meth:`LossTraces.loss_tnr` are computed from them.

    An example is known by its place in that order: that of the data set for most loaders, and the one in which
    :class:`~lightning_cwrf.MIAAuditCallback` and :func:`~lightning_cwrf.audit` have the members.

    **Cost.** Each measurement is one pass over the training data without gradients, about a third of an epoch's time.
    With several processes each does its share, with its own BatchNorm statistics, as in validation. Memory, and the
    size of the state in each checkpoint: 2 bytes for each example and measurement (50,000 examples over 200 epochs:
    20 MB).

    A resumed run continues the trace of its checkpoint. A new fit starts a new one. The trace is that of the weights
    that are trained; where a callback replaces them by an average at the end, only the last measurement is of these,
    and only if that callback comes before this one.

    Args:
        members: the training examples, without augmentation: a loader or a dataset, the name of a split, or a
            DataModule. Default: those that the trainer's own loader gives. Needed where these are augmented at random.
        nonmembers: examples that the model never saw, likewise, for :meth:`LossTraces.loss_tnr`; measured at the end.
        every_n_epochs: how often to measure. LT-IQR needs enough points for quartiles, so at least about 8 in all.
        save: a file for the result (:meth:`LossTraces.save`), for runs from YAML, and for strategies whose processes do
            not return :attr:`result` to the caller: ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook``.
        overwrite: replace a file of an earlier run; otherwise it is an error before the training.

    Raises:
        TypeError: data that are none of these, or a setting of the wrong type.
        ValueError: a setting out of range. When the fit starts: examples that read differently each time; non-members
            that are members.
        MisconfigurationException: when the fit starts: a training loader that is recreated, or leaves out more than a
            tenth of its examples; a checkpoint with the trace of other examples; a file that exists.

    >>> LossTraceCallback(every_n_epochs=5).every_n_epochs
    5
    """

    why_lost = "the losses are recorded in processes that the strategy starts, which do not return them"
    reads = "LossTraces.load"
    why_not_sharded = (
        "each process runs the model by itself here, which only all of them together can. Record the losses in a "
        "training on one device or DDP"
    )

    def __init__(
        self,
        members: Split | LightningDataModule | Batches | None = None,
        nonmembers: Split | LightningDataModule | Batches | None = None,
        every_n_epochs: int = 1,
        save: str | PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        check_integer("every_n_epochs", every_n_epochs, low=1)
        others = {} if nonmembers is None else {"nonmembers": nonmembers}
        self.nonmembers = None
        self.take_data(members=members, **others)
        self.every_n_epochs = every_n_epochs
        if save is not None:
            check_place(save)
        self.take_file(None if save is None else Path(save), overwrite)
        self.reset()

    def reset(self) -> None:
        self.result: LossTraces | None = None
        self._losses: list[Tensor] = []
        self._steps: list[int] = []
        self._digest = ""
        self._resumed = False
        self._fitted_by: weakref.ref[Trainer] | None = None
        self._trained = True  # since the last measurement

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().prepare(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.members is None and trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "the training loader is recreated during the training, so its examples have no fixed places: pass "
                f"{type(self).__name__}(members=...), a data set of all of them."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the data, and that a resumed run has the examples of its checkpoint."""
        goes_on = bool(self._steps) and self._fitted_by is not None and self._fitted_by() is trainer
        if goes_on:
            self._trained = True  # its weights may have been changed since
        elif not self._resumed:
            self.reset()
        earlier = "checkpoint" if self._resumed else "earlier fit of this Trainer"
        self._fitted_by, self._resumed = weakref.ref(trainer), False
        if trainer.global_step > 0 and not self._steps:
            rank_zero_warn(
                f"{type(self).__name__} was not in the run that this one resumes: the loss traces begin at step "
                f"{trainer.global_step}, and LT-IQR does not see what the model learned before."
            )
        self._find_data(trainer, earlier)

    def _find_data(self, trainer: Trainer, earlier: str) -> None:
        """The examples to measure, which must be those of the ``earlier`` run."""
        if self.members is None:
            check_coverage(trainer, type(self).__name__)
            self._data = training_data(trainer, self)
        else:
            self._data = self.members
        transfer = transfer_of(trainer)
        check_side(self._data, "members", transfer)
        ids = all_ids(self._data)
        if ids is None:
            raise MisconfigurationException(
                f"{type(self).__name__} needs training data whose examples have fixed places, not a stream: pass "
                "members=, a data set, a loader of one, or a list of batches."
            )
        digest = hashlib.blake2b(repr(ids).encode(), digest_size=16).hexdigest()
        if self._digest not in ("", digest):
            raise MisconfigurationException(
                f"the {earlier} has the loss traces of other training examples, or of another order: "
                f"{type(self).__name__} numbers them. Go on with the same data, or take a new callback."
            )
        self._digest = digest
        if self.nonmembers is not None:
            check_side(self.nonmembers, "nonmembers", transfer)
            OverlapCheck(self._data, self.nonmembers, "nonmembers")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not on_train_epoch_start, which a run that resumes from the last batch of an epoch leaves out.
        if batch_idx == 0 and trainer.current_epoch % self.every_n_epochs == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(self, *_: Any) -> None:
        self._trained = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure(trainer, pl_module)
        self._conclude(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed and self._losses:  # from the end of a training, so that no step was run
            self._resumed = False
            self._find_data(trainer, "checkpoint")
            self._measure(trainer, pl_module)  # a checkpoint of the last epoch is written before the last measurement
            self._conclude(trainer, pl_module)

    def _conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        others = None
        if self.nonmembers is not None:
            others = _compact(_losses_of(trainer, pl_module, self.nonmembers))
        exact = any(each.dtype == torch.float32 for each in self._losses)
        losses = torch.stack([each.float() if exact else each for each in self._losses])
        self.result = LossTraces(losses, torch.tensor(self._steps), others, self._digest)
        if self.save is not None and trainer.is_global_zero:
            self.result.save(self.save)

    @saved_state
    def state_dict(self) -> dict[str, Any]:
        if not self._losses:
            return {}
        return {
            "losses": list(self._losses),
            "steps": list(self._steps),
            "examples": self._digest,
            "trained": self._trained,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses, self._steps = list(state_dict["losses"]), list(state_dict["steps"])
        self._digest, self._trained, self._resumed = state_dict["examples"], state_dict["trained"], True

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._trained:  # a resumed run has this one
            return
        self._trained = False
        losses = _compact(_losses_of(trainer, pl_module, self._data))
        if self._steps[-1:] == [trainer.global_step] and torch.equal(losses.float(), self._losses[-1].float()):
            return  # a further fit begins with the weights that the one before ended with
        self._losses.append(losses)
        self._steps.append(trainer.global_step)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in super().__getstate__().items() if name != "_data"}
        return {**kept, "_fitted_by": None}


def _compact(losses: Tensor) -> Tensor:
    """The losses in float16, unless one is too large for it."""
    half = losses.half()
    return half if bool(half.isfinite().all()) else losses


def _losses_of(trainer: Trainer, module: LightningModule, data: Batches) -> Tensor:
    """The cross-entropy of each example, float32 ``(n,)`` on the CPU; each process runs its share of the batches."""
    bring = bring_to(module, transfer_of(trainer))
    mine: dict[int, Tensor] = {}
    with trainer.precision_plugin.forward_context(), evaluating(module):
        for number, batch in enumerate(as_loader(data, shuffle=False)):
            if number % trainer.world_size == trainer.global_rank:
                logits, targets = classification_step(module, bring(batch))
                mine[number] = example_losses(logits.float().cpu(), targets.cpu()).float()
    shares: list[Any] = [mine]
    if trainer.world_size > 1:
        shares = [None] * trainer.world_size
        torch.distributed.all_gather_object(shares, mine)
    whole = {number: losses for share in shares for number, losses in share.items()}
    return torch.cat([whole[number] for number in sorted(whole)])
