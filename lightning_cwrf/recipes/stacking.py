"""K models of one architecture trained as one vectorised model, each with its own data and state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_cwrf.callbacks import GradientMaskCallback
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.recipes.fit import fit
from lightning_cwrf.recipes.stack import Stack
from lightning_cwrf.weights.masks import WeightMask

_HOOKS = (
    "backward", "configure_callbacks", "configure_gradient_clipping", "configure_model", "lr_scheduler_step",
    "on_after_backward", "on_after_batch_transfer", "on_before_backward", "on_before_batch_transfer",
    "on_before_optimizer_step", "on_before_zero_grad", "on_fit_end", "on_fit_start", "on_train_batch_end",
    "on_train_batch_start", "on_train_end", "on_train_epoch_end", "on_train_epoch_start", "on_train_start",
    "optimizer_step", "optimizer_zero_grad", "setup", "teardown", "transfer_batch_to_device",
)  # fmt: skip
"""Hooks around a training step; a stack calls the step alone."""


_NOT_STACKED = {
    "callbacks": "further callbacks look at one model",
    "augment": "augmentation draws for one model at a time",
    "collate_fn": "batches are cut from one tensor",
}
"""Fields of a recipe that a stack cannot have, and why."""


def train_stack(
    models: Sequence[LightningModule],
    seeds: Sequence[int],
    batches: StackedBatches,
    masks: Sequence[WeightMask],
    trainer_kwargs: Mapping[str, Any],
) -> list[LightningModule]:
    """Train models in place, all in one loop; each result is that of training it alone, up to rounding.

    Their optimizer, scheduler and training step are the first one's. ``masks`` has the weights of each model that are
    held at the values they have, or is empty.
    """
    stack = Stack(models, seeds)
    callbacks: list[Callback] = [GradientMaskCallback(stack.joint_mask(masks))] if masks else []
    fit(stack, batches, callbacks, trainer_kwargs, *models)
    stack.unstack(models)
    return list(models)


def check_stackable(recipe: Any, model: LightningModule) -> None:
    """Raise a ValueError if the training of a recipe's module is more than its training step, with the reason."""
    for field, why in _NOT_STACKED.items():
        given = getattr(recipe, field)
        if given is not None and not (field == "callbacks" and not given()):
            raise ValueError(f"a recipe with {field} cannot be stacked: {why}. Leave stack=1.")
    name = type(model).__name__
    if not model.automatic_optimization:
        raise ValueError(f"{name} cannot be stacked: it uses manual optimization. Leave stack=1.")
    if isinstance(model, DefenseMixin) and (more := model.why_not_stacked()) is not None:
        raise ValueError(f"a recipe with {type(model.defense).__name__} cannot be stacked: {more}. Leave stack=1.")
    bases = [base for base in type(model).__mro__ if base not in (DefenseMixin, *LightningModule.__mro__)]
    hooks = [hook for hook in _HOOKS if any(hook in vars(base) for base in bases)]
    if hooks:
        raise ValueError(
            f"{name} cannot be stacked: it has {', '.join(hooks)}, which would see all models at once. Leave stack=1."
        )


class StackedBatches:
    """Batches whose tensors are ``(K, B, ...)``: row k holds the next B examples of model k.

    ``orders`` has, for each model, the order of its examples, and is iterated once per epoch.
    """

    def __init__(
        self,
        pool: Dataset[Any],
        members: Sequence[Sequence[int]],
        orders: Sequence[Iterable[int]],
        batch_size: int,
        drop_last: bool,
    ) -> None:
        if len({len(places) for places in members}) != 1:
            raise ValueError("stacked models need equally many members, so that their batches have the same length.")
        used = sorted(set().union(*members))
        place = {example: i for i, example in enumerate(used)}
        self.examples = default_collate([pool[i] for i in used])
        self.members = torch.tensor([[place[example] for example in row] for row in members])
        self.orders = orders
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        for order in self.orders:
            if hasattr(order, "set_epoch"):
                order.set_epoch(epoch)

    def __len__(self) -> int:
        whole, rest = divmod(self.members.shape[1], self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        order = torch.tensor([list(order) for order in self.orders])
        rows = self.members.gather(1, order)
        for step in range(len(self)):
            chosen = rows[:, step * self.batch_size : (step + 1) * self.batch_size]
            yield apply_to_collection(self.examples, Tensor, lambda tensor, chosen=chosen: tensor[chosen])
