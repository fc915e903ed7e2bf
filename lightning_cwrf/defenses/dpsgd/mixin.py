"""DP-SGD (Abadi et al. 2016) through Opacus, inside Lightning's automatic optimization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cwrf.checks import check_flag, check_integer
from lightning_cwrf.classification import classification_step
from lightning_cwrf.data.poisson import PoissonBatches, check_poisson
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.dpsgd.checks import (
    check_dpsgd,
    check_layers,
    check_optimizer,
    check_trainer,
    warn_of_plain_steps,
)
from lightning_cwrf.defenses.dpsgd.independence import check_examples_apart
from lightning_cwrf.defenses.dpsgd.ledger import Ledger, PrivacySpent
from lightning_cwrf.defenses.dpsgd.step import EndPrivateTraining, PrivateStep, fix_layers, is_empty
from lightning_cwrf.weights.masks import WeightMask

_STATE_KEY = "dpsgd"


class DPSGDMixin(DefenseMixin):
    """Trains a LightningModule by DP-SGD: every example's gradient is clipped, and noise is added to their sum.

    The module's optimizer, scheduler, loaders or datamodule stay as they are. The training loader gives the dataset
    and the expected batch size; the batches themselves are drawn by Poisson sampling. One logical batch holds
    ``batch_size × accumulate_grad_batches × processes`` examples on average, and is one optimizer step.

    ε is logged each epoch, as ``epsilon`` or ``epsilon_finetuning``, stands in :attr:`privacy_spent`, and goes on from
    a checkpoint. **Tuning from weights that were trained without DP does not make the result differentially private**:
    ε then covers the fine-tuning phase alone. The logged training loss is not covered by ε.

    ε counts on a loss of each example that depends on no other example. Layers that mix examples are refused by name;
    a forward pass that does it otherwise is found on the first batch, by changing the other examples.

    With the CWRF callbacks, per-example gradients are masked before their norm is taken, so that clipping and noise are
    spent on the live weights alone.

    Args:
        target_epsilon: ε to end with, after all steps of the Trainer; the noise follows from it. Either this
        noise_multiplier: or σ, the noise's standard deviation in units of ``max_grad_norm``. 0: no noise, ε = ∞.
        target_delta: δ; below 1 / (number of training examples).
        max_grad_norm: C, the largest norm of an example's gradient. Common: 0.1 to 1.5.
        accountant: ``"prv"`` (tightest), ``"rdp"`` or ``"gdp"`` (an approximation that may understate ε).
        max_physical_batch_size: split logical batches so that no more examples than this are in memory at once.
        ghost: clip by norms alone, in two backward passes (ghost clipping): less memory for large layers. With frozen
            weights the norms are taken layer by layer from masked gradients (fast gradient clipping).
        fix: replace layers that mix examples, such as BatchNorm (by GroupNorm), instead of refusing them.
        from_scratch: say so if the start weights have seen no private data: ε then covers the whole training.

    Raises:
        ValueError: neither or both of ``target_epsilon`` and ``noise_multiplier``, or a value out of range.
        MisconfigurationException: when a fit starts: layers or a Trainer that DP-SGD cannot work with.

    >>> from lightning_cwrf.defenses import create_defense
    >>> create_defense("dpsgd", noise_multiplier=1.0, max_grad_norm=0.5).settings
    {'noise_multiplier': 1.0, 'max_grad_norm': 0.5}
    """

    _engine: PrivateStep | None = None
    _frozen: WeightMask | None = None

    def __init__(
        self,
        *args: Any,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        target_delta: float = 1e-5,
        max_grad_norm: float = 1.0,
        accountant: str = "prv",
        max_physical_batch_size: int | None = None,
        ghost: bool = False,
        fix: bool = False,
        from_scratch: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            target_epsilon=target_epsilon,
            noise_multiplier=noise_multiplier,
            target_delta=target_delta,
            max_grad_norm=max_grad_norm,
            accountant=accountant,
            max_physical_batch_size=max_physical_batch_size,
            ghost=ghost,
            fix=fix,
            from_scratch=from_scratch,
            **kwargs,
        )

    def configure_defense(
        self,
        *,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        target_delta: float = 1e-5,
        max_grad_norm: float = 1.0,
        accountant: str = "prv",
        max_physical_batch_size: int | None = None,
        ghost: bool = False,
        fix: bool = False,
        from_scratch: bool = False,
    ) -> None:
        """Check and take the settings."""
        check_dpsgd(target_epsilon, noise_multiplier, target_delta, max_grad_norm, accountant)
        if max_physical_batch_size is not None:
            check_integer("max_physical_batch_size", max_physical_batch_size, low=1)
        for name, flag in (("ghost", ghost), ("fix", fix), ("from_scratch", from_scratch)):
            check_flag(name, flag)
        # What the same module has spent before, under another attach, stays spent.
        earlier = getattr(self, "_ledger", None)
        self._ledger = Ledger(accountant, from_scratch=from_scratch, earlier=earlier)
        trainer = getattr(self, "_trainer", None)
        if from_scratch and trainer is not None and trainer.global_step > self._ledger.steps:
            warn_of_plain_steps("module", trainer.global_step)
        if fix and isinstance(self, nn.Module):
            fix_layers(self)
        self._set_defense(
            target_epsilon=target_epsilon,
            noise_multiplier=noise_multiplier,
            target_delta=target_delta,
            max_grad_norm=max_grad_norm,
            accountant=accountant,
            max_physical_batch_size=max_physical_batch_size,
            ghost=ghost,
            fix=fix,
            from_scratch=from_scratch,
        )

    @property
    def privacy_spent(self) -> PrivacySpent:
        """The guarantee of all steps so far, over every fit since the defense was configured."""
        settings = self.defense_settings
        delta = settings["target_delta"]
        return PrivacySpent(
            self._ledger.epsilon(delta), delta, self._ledger.steps, settings["accountant"], settings["from_scratch"]
        )

    def example_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each example, shape ``(n,)``; no example's loss may depend on another example."""
        return F.cross_entropy(logits, targets, reduction="none")

    def defense_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean of :meth:`example_losses`."""
        return self.example_losses(logits, targets).mean()

    def defense_step(self, batch: Any) -> tuple[Tensor, int]:
        """The mean loss of a physical batch, which may be empty."""
        if self._engine is None:
            return super().defense_step(batch)
        if is_empty(batch):  # many models cannot reshape a batch of nothing
            self._engine.losses = None
            return torch.zeros((), device=self.device, requires_grad=True), 0
        if not self._engine.apart:
            self._engine.apart = check_examples_apart(self, batch)
        self._engine.watch()
        losses = self._engine.losses = self.losses_of(batch)
        return losses.mean(), len(losses)

    def losses_of(self, batch: Any) -> Tensor:
        """:meth:`example_losses` of a batch, checked to be one for each example."""
        logits, targets = classification_step(self, batch)
        losses = self.example_losses(logits, targets)
        if losses.shape != targets.shape:
            raise ValueError(
                f"example_losses must give one loss per example, shape {tuple(targets.shape)}, not "
                f"{tuple(losses.shape)}: DP-SGD clips every example's own gradient."
            )
        return losses

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            check_trainer(self.trainer)
            self._draw_poisson_batches(self.trainer)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        check_layers(self)
        check_optimizer(self, self.trainer.optimizers)
        # Frozen weights of an earlier fit: GradientMaskCallback tells again.
        self._frozen = None
        given = self.defense_settings["noise_multiplier"]
        if given is not None:
            self._ledger.noise_multiplier = given
        elif self._ledger.noise_multiplier is None:
            self._ledger.noise_multiplier = self._choose_noise()

    def on_weights_frozen(self, mask: WeightMask) -> None:
        """Mask every example's gradient by ``mask`` before its norm is taken."""
        if self.defense_settings["from_scratch"]:
            raise MisconfigurationException(
                "from_scratch=True says that the start weights have seen no private data, but some are frozen in "
                "places that were chosen by it. Leave it out: ε covers the fine-tuning phase alone."
            )
        self._frozen = mask

    def on_train_start(self) -> None:
        super().on_train_start()
        self._check_budget()
        # Not before: scoring works on deep copies, which hooks would come along with.
        self._engine = PrivateStep(self, self._frozen)
        if isinstance(self.trainer.strategy, DDPStrategy):
            # The private gradients are summed over processes, not the plain ones.
            self.trainer.strategy.model.require_backward_grad_sync = False  # type: ignore[union-attr]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._engine is None:
            super().backward(loss, *args, **kwargs)
        else:
            self._engine.backward(super().backward)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        def private_closure() -> Any:
            loss = optimizer_closure() if optimizer_closure is not None else None
            if self._engine is not None:
                self._engine.privatize()
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, private_closure)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        spent = self.privacy_spent
        name = "epsilon" if spent.from_scratch else "epsilon_finetuning"
        self.log(name, spent.epsilon, prog_bar=True, rank_zero_only=True)

    def on_train_end(self) -> None:
        super().on_train_end()
        self._end_private_training()
        rank_zero_info(str(self.privacy_spent))

    def configure_callbacks(self) -> Any:
        callbacks = super().configure_callbacks()
        return [*(callbacks if isinstance(callbacks, Sequence) else [callbacks]), EndPrivateTraining()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._engine is not None:
            self._ledger.noise_state = self._engine.noise.get_state()
        checkpoint[_STATE_KEY] = self._ledger.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if _STATE_KEY in checkpoint:
            self._ledger.load_state_dict(checkpoint[_STATE_KEY])
        elif self._ledger.from_scratch and checkpoint.get("global_step"):
            warn_of_plain_steps("checkpoint", checkpoint["global_step"])

    def _draw_poisson_batches(self, trainer: Trainer) -> None:
        """Put Poisson batches in the place of the user's training loader."""
        source = trainer.fit_loop._data_source  # Lightning has no public way to replace a loader
        loader = source.dataloader()
        check_poisson(loader)
        examples, size = len(loader.dataset), loader.batch_sampler.batch_size
        batches = examples // size if loader.drop_last else math.ceil(examples / size)
        world, parts = trainer.world_size, trainer.accumulate_grad_batches
        steps = max(1, math.ceil(batches / (parts * world)))
        limit = self.defense_settings["max_physical_batch_size"]
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            parts = 1  # a single batch is all there is
        elif limit is not None:
            mean = examples / steps / world
            parts = max(
                parts, math.ceil((mean + 6 * math.sqrt(mean)) / limit)
            )  # six standard deviations above the mean
        self._asked_accumulation = trainer.accumulate_grad_batches
        trainer.accumulate_grad_batches = parts
        self._batches = PoissonBatches(
            loader,
            steps=steps,
            parts=parts,
            first_step=lambda: self._ledger.steps,
            rank=trainer.global_rank,
            world_size=world,
        )
        source.instance = self._batches
        self._layout = {"examples": examples, "steps": steps, "parts": parts}
        delta = self.defense_settings["target_delta"]
        if delta >= 1 / examples:
            rank_zero_warn(
                f"target_delta={delta:g} is not below 1/n = {1 / examples:.2g} for {examples} training examples: such "
                "a guarantee allows giving away a whole example. Lower it."
            )

    def _choose_noise(self) -> float:
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise MisconfigurationException(
                "target_epsilon is spent over a known number of steps: set max_epochs or max_steps in the Trainer, or "
                "pass noise_multiplier."
            )
        target, delta = self.defense_settings["target_epsilon"], self.defense_settings["target_delta"]
        return self._ledger.noise_for(target, delta, self._batches.sample_rate, int(steps))

    def _steps_ahead(self) -> int:
        """How many steps this fit will still take."""
        trainer, parts = self.trainer, self._batches.parts
        steps = math.inf
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready if self._resumed_in_mid_epoch() else 0
            steps = (trainer.max_epochs - trainer.current_epoch) * (
                trainer.num_training_batches // parts
            ) - done // parts
        if trainer.max_steps >= 0:
            steps = min(steps, trainer.max_steps - trainer.global_step)
        return max(0, int(steps))

    def _resumed_in_mid_epoch(self) -> bool:
        return bool(self.trainer.fit_loop.restarted_mid_epoch)

    def _check_budget(self) -> None:
        parts = self._batches.parts
        if self.trainer.num_training_batches % parts:
            raise MisconfigurationException(
                f"an epoch has {self.trainer.num_training_batches} physical batches, and a logical batch {parts} "
                "(accumulate_grad_batches, or more for max_physical_batch_size): limit_train_batches must be a "
                "multiple of it."
            )
        saved = self._ledger.layout
        if self._resumed_in_mid_epoch() and saved is not None and saved != self._layout:
            raise MisconfigurationException(
                f"the checkpoint was saved in the middle of an epoch of batches {saved}, but now they are "
                f"{self._layout}. Resume with the same data, batch size, accumulate_grad_batches, "
                "max_physical_batch_size and number of processes, or from a checkpoint of an epoch's end."
            )
        self._ledger.layout = self._layout
        target = self.defense_settings["target_epsilon"]
        if target is None or self._ledger.steps == 0:
            return
        ahead = self._steps_ahead()
        plan = (self._ledger.noise_multiplier, self._batches.sample_rate, ahead)
        end = self._ledger.epsilon(self.defense_settings["target_delta"], plan if ahead else None)
        if end > target * 1.01:
            raise MisconfigurationException(
                f"{self._ledger.steps} steps are done and {ahead} to come, which would end with ε = {end:.4g}, above "
                f"target_epsilon={target:g}. Train for fewer steps, or raise target_epsilon."
            )

    def _end_private_training(self) -> None:
        if self._engine is not None:
            self._ledger.noise_state = self._engine.noise.get_state()
            self._engine.remove()
            self._engine = None
