"""Which share of its examples a training draws: those it never draws are no members, though its loader has them."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lightning_cwrf.data.sampling import support

_UNKNOWN = "and which ones is unknown: counted as members, they make attacks look weak"


def unseen_share(trainer: Trainer, *, so_far: bool = False) -> float:
    """The share of the examples that the training loader can give, but that training is expected not to draw.

    It is 0 for Poisson batches: with them, every example that can be drawn is a member.

    Args:
        trainer: in a fit.
        so_far: count the batches so far, because training may be stopped early; else those that are planned.
    """
    batches = trainer.num_training_batches
    if math.isinf(batches) or batches == 0:
        return 0.0
    done = (trainer.fit_loop.epoch_loop.total_batch_idx + 1) / batches if so_far else None
    return _unseen(trainer, trainer.train_dataloader, int(batches), done)


def planned_share(trainer: Trainer, loader: DataLoader[Any]) -> float:
    """:func:`unseen_share` of a fit of this loader that has not begun."""
    limit: int | float = trainer.limit_train_batches
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        limit = trainer.overfit_batches  # type: ignore[attr-defined]
    whole = len(loader)
    batches = min(whole, limit) if isinstance(limit, int) else int(whole * limit)
    return _unseen(trainer, loader, batches, None) if batches else 0.0


def _unseen(trainer: Trainer, loader: Any, batches: int, epochs: float | None) -> float:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return 0.0
    if epochs is None:
        epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
        if trainer.max_steps != -1:
            epochs = min(epochs, trainer.max_steps * trainer.accumulate_grad_batches / batches)
    given = support(loader, batches)
    if epochs >= 1 or not given.places:
        return given.unseen(epochs)
    part = support(loader, max(1, math.ceil(epochs * batches)))
    return 1 - len(part.places) * (1 - part.unseen(1)) / len(given.places)


def check_coverage(trainer: Trainer, callback: str = "MIAAuditCallback") -> float:
    """The planned :func:`unseen_share`: above 1 % it is a warning, above 10 % an error, with advice to ``callback``."""
    reload_every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    if reload_every:
        rank_zero_warn(
            f"the training loader is recreated every {reload_every} epochs, and the members are those that the one in "
            "use at the audit can give. If an earlier one gives others, pass MIAAuditCallback(members=...)."
        )
    unseen = unseen_share(trainer)
    if unseen > 0.01:
        problem = (
            f"the training leaves out about {unseen:.0%} of the examples that its loader can give "
            f"(limit_train_batches, a sampler that draws at random, or drop_last), {_UNKNOWN}"
        )
        if unseen > 0.1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"{problem}. Train on a Subset instead of setting a limit, or pass {callback}(members=...)."
            )
        rank_zero_warn(f"{problem}. Pass {callback}(members=...).")
    return unseen


def undrawn(trainer: Trainer, expected: float) -> list[str]:
    """A remark where training ended before it had drawn all but the ``expected`` share of the examples."""
    unseen = unseen_share(trainer, so_far=True)
    if unseen <= max(0.01, expected + 0.001):
        return []
    return [
        f"the training ended before it had drawn about {unseen:.0%} of the examples that its loader can give, "
        f"{_UNKNOWN}. Pass MIAAuditCallback(members=...), or train longer."
    ]
