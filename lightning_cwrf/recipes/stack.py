"""K modules as one: parameters ``(K, ...)`` and a training step that is vectorised over them (``torch.func``)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn, optim
from torch.func import functional_call, stack_module_state, vmap
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from lightning_cwrf.classification import shapes_only
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.recipes.own_view import OwnView, RandomStates
from lightning_cwrf.trainers import transfer_of
from lightning_cwrf.weights.masks import WeightMask

_ELEMENTWISE = {
    optim.ASGD, optim.Adadelta, optim.Adagrad, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam,
    optim.RMSprop, optim.Rprop, optim.SGD,
}  # fmt: skip
"""Optimizers that treat each weight by itself, so that the weights of K models in one tensor stay K models."""

_FUSED = {optim.Adagrad, optim.Adam, optim.AdamW, optim.SGD}


class Stack(LightningModule):
    """K modules as one: parameters and buffers ``(K, ...)``, one training step vectorised over them."""

    def __init__(self, models: Sequence[LightningModule], seeds: Sequence[int]) -> None:
        super().__init__()
        self.seeds = seeds
        parameters, buffers = stack_module_state(list(models))
        trained = {name: p.requires_grad for name, p in models[0].named_parameters()}
        self.parameter_names, self.buffer_names = list(parameters), list(buffers)
        self.stacked_parameters = nn.ParameterList(
            nn.Parameter(p.detach(), requires_grad=trained[name]) for name, p in parameters.items()
        )
        for i, buffer in enumerate(buffers.values()):
            self.register_buffer(f"stacked_buffer_{i}", buffer)
        template = copy.deepcopy(models[0])
        _silence(template)
        self._template = [_Step(template)]  # in a list, so that its own weights are not this module's

    @property
    def stacked_buffers(self) -> list[Tensor]:
        return [getattr(self, f"stacked_buffer_{i}") for i in range(len(self.buffer_names))]

    def setup(self, stage: str) -> None:
        self._template[0].model.trainer = self.trainer

    def on_train_start(self) -> None:
        self.random = RandomStates(self.seeds, self.device)
        template = self._template[0].train()
        batches = map(transfer_of(self.trainer), itertools.islice(self.trainer.train_dataloader or (), 3))
        try:
            with self.trainer.precision_plugin.train_step_context():
                self._check_first_step(batches)
        except Exception as error:
            reason = f"its training step does not vectorise ({type(error).__name__}: {error})"
            if "randomness" in str(error):
                reason = f"its training step draws random numbers in a way that cannot be done for each model ({error})"
            raise ValueError(f"{type(template.model).__name__} cannot be stacked: {reason}. Leave stack=1.") from error

    def _check_first_step(self, batches: Iterator[Any]) -> None:
        """Raise where losses and gradients are not those of each model by itself.

        A step may vectorise and yet change, for example one that looks at which weights require gradients. But rounding
        may put one activation on the other side of a kink, as that of ReLU. That is so again on the same batch, where
        a step that does something at its first call alone does not, and it is not so on others.
        """
        first = next(batches)
        if self._is_that_of_each(first):
            return
        others = list(batches)
        if self._is_that_of_each(first) or not others or not all(map(self._is_that_of_each, others)):
            raise ValueError("vectorised, its first step is not that of the models one by one")

    def _is_that_of_each(self, batch: Any) -> bool:
        # In units of the largest gradient; 16 bits round.
        tolerance = 5e-2 if "16" in str(self.trainer.precision) else 1e-3
        kept = [buffer.clone() for buffer in self.stacked_buffers]
        with self.random.kept():
            losses = self._losses(batch, 0)
        trained = [p for p in self.stacked_parameters if p.requires_grad]
        gradients = torch.autograd.grad(losses.sum(), trained, materialize_grads=True)
        for buffer, value in zip(self.stacked_buffers, kept, strict=True):
            buffer.copy_(value)
        for k in range(len(losses)):
            own = [p[k].detach().clone().requires_grad_(p.requires_grad) for p in self.stacked_parameters]
            state = self._named(own, [buffer[k].clone() for buffer in kept])
            row = apply_to_collection(batch, Tensor, lambda tensor, k=k: tensor[k])
            with self.random.kept(), self.random.of(k):
                loss = functional_call(self._template[0], state, (row, 0))
            expected = torch.autograd.grad(loss, [p for p in own if p.requires_grad], materialize_grads=True)
            found = torch.cat([losses[k].reshape(1), *(g[k].flatten() for g in gradients)])
            alone = torch.cat([loss.reshape(1), *(g.flatten() for g in expected)])
            reach = tolerance * float(alone.detach().nan_to_num().abs().max())
            if not torch.allclose(found, alone, rtol=tolerance, atol=reach, equal_nan=True):
                return False
        return True

    def on_train_epoch_start(self) -> None:
        self.random.begin_epoch()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of the K losses: each model's gradient is that of its own."""
        return self._losses(batch, batch_idx).sum()

    def _losses(self, batch: Any, batch_idx: int) -> Tensor:
        step = self._template[0]
        trains = [p.requires_grad for p in self.stacked_parameters]

        def one(state: tuple[dict[str, Tensor], ...], batch: Any, row: Tensor) -> tuple[Tensor, list[Tensor]]:
            with OwnView(row, self.random, list(itertools.compress(state[0].values(), trains))):
                loss: Tensor = functional_call(step, state, (batch, batch_idx))
            return loss, step.buffers_after

        with shapes_only():
            state = self._named(self.stacked_parameters, self.stacked_buffers)
            rows = torch.arange(len(self.seeds), device=self.device)
            losses, after = vmap(one, randomness="error")(state, batch, rows)
        for buffer, value in zip(self.stacked_buffers, after, strict=True):
            if value.data_ptr() != buffer.data_ptr():  # the module assigned a new buffer
                buffer.copy_(value.detach())
        return losses

    def _named(self, parameters: Iterable[Tensor], buffers: Iterable[Tensor]) -> tuple[dict[str, Tensor], ...]:
        """Parameters and buffers by their names in the template."""
        return (
            {f"model.{name}": p for name, p in zip(self.parameter_names, parameters, strict=True)},
            {f"model.{name}": b for name, b in zip(self.buffer_names, buffers, strict=True)},
        )

    def configure_optimizers(self) -> Any:
        """What the user's module configures, with its optimizer moved to the stacked parameters."""
        template = self._template[0].model
        first = self.stacked_parameters[0]
        template.to(first.device, first.dtype)  # some optimizers create their state at once
        configured = template.configure_optimizers()
        found: list[Optimizer] = []
        apply_to_collection(configured, Optimizer, found.append)
        optimizers = list(dict.fromkeys(found))
        if len(optimizers) != 1:
            raise ValueError(f"a stack needs one optimizer, not {len(optimizers)}. Leave stack=1.")
        if type(optimizers[0]) not in _ELEMENTWISE:
            raise ValueError(
                f"{type(optimizers[0]).__name__} cannot be stacked: it is not known to treat each weight by itself. "
                "Leave stack=1."
            )
        _move(optimizers[0], dict(zip(template.parameters(), self.stacked_parameters, strict=True)))
        return configured

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip each model's gradient by its own norm."""
        if gradient_clip_val is None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradient_clip_algorithm == "value":
            torch._foreach_clamp_min_(gradients, -gradient_clip_val)
            torch._foreach_clamp_max_(gradients, gradient_clip_val)
            return
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        factors = (gradient_clip_val / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))

    def joint_mask(self, masks: Sequence[WeightMask]) -> WeightMask:
        """The models' masks as one of the stacked parameters."""
        joint = {}
        for i, (name, p) in enumerate(zip(self.parameter_names, self.stacked_parameters, strict=True)):
            none = torch.zeros(p.shape[1:], dtype=torch.bool)
            joint[f"stacked_parameters.{i}"] = torch.stack([mask.masks.get(name, none) for mask in masks])
        return WeightMask(joint)

    @torch.no_grad()
    def unstack(self, models: Sequence[nn.Module]) -> None:
        """Give each module its own row."""
        names = [*self.parameter_names, *self.buffer_names]
        values = [*self.stacked_parameters, *self.stacked_buffers]
        for k, model in enumerate(models):
            own = dict(model.named_parameters()) | dict(model.named_buffers())
            for name, value in zip(names, values, strict=True):
                own[name].data = value[k].clone()  # in the precision of the training


class _Step(nn.Module):
    """A training step as a forward, for ``functional_call``."""

    def __init__(self, model: LightningModule) -> None:
        super().__init__()
        self.model = model
        self.buffers_after: list[Tensor] = []

    def forward(self, batch: Any, batch_idx: int) -> Tensor:
        model = self.model
        # A defense's training_step checks that its loss is finite, which is impossible for K losses inside vmap.
        loss = (
            model.defense_step(batch)[0] if isinstance(model, DefenseMixin) else model.training_step(batch, batch_idx)
        )
        loss = loss["loss"] if isinstance(loss, dict) else loss
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            raise TypeError(f"the training step returned {type(loss).__name__} rather than a scalar loss")
        self.buffers_after = list(model.buffers())
        return loss


def _silence(template: LightningModule) -> None:
    """Turn logging and metrics off, which would see K models at once."""
    for name in ("log", "log_dict"):
        setattr(template, name, _nothing)
    for module in list(template.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (Metric, MetricCollection)):
                setattr(module, name, _NoMetric())


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


class _NoMetric(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())

    update = reset = _nothing
    compute = forward


def _move(optimizer: Optimizer, stacked: dict[Tensor, nn.Parameter]) -> None:
    """Let an optimizer, and the schedulers that hold it, train other parameters; existing state is repeated K times."""
    for group in optimizer.param_groups:
        group["params"] = [stacked[p] for p in group["params"]]
        if type(optimizer) in _FUSED and group.get("foreach") is None and group.get("fused") is None:
            group["fused"] = True
    for p, state in list(optimizer.state.items()):
        optimizer.state[stacked[p]] = {
            name: torch.stack([value] * len(stacked[p])) if getattr(value, "shape", None) == p.shape else value
            for name, value in state.items()
        }
        del optimizer.state[p]
