"""DP-SGD (Abadi et al. 2016) through Opacus, inside Lightning's automatic optimization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from lightning_cwrf.classification import checked_at_once, classification_step, shapes_only
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.composition import base_loss
from lightning_cwrf.defenses.dpsgd import plan
from lightning_cwrf.defenses.dpsgd.checks import check_optimizer, check_trainer
from lightning_cwrf.defenses.dpsgd.layers import check_layers
from lightning_cwrf.defenses.dpsgd.ledger import PrivacySpent
from lightning_cwrf.defenses.dpsgd.settings import DPSGD
from lightning_cwrf.defenses.dpsgd.state import DPSGDState
from lightning_cwrf.defenses.dpsgd.step import PrivateStep, is_empty
from lightning_cwrf.weights.masks import WeightMask


class DPSGDMixin(DefenseMixin, settings=DPSGD):
    """Trains a LightningModule by DP-SGD: every example's gradient is clipped, and noise is added to their sum.

    The module's optimizer, scheduler, loaders or datamodule stay as they are. The training loader gives the dataset
    and the expected batch size; the batches themselves are drawn by Poisson sampling. One logical batch holds
    ``batch_size × accumulate_grad_batches × processes`` examples on average, and is one optimizer step.

    ε is logged each epoch, as ``epsilon`` or ``epsilon_finetuning``, is in :attr:`privacy_spent`, and continues from a
    checkpoint. **Tuning from weights that were trained without DP does not make the result differentially private**:
    ε then covers the fine-tuning phase alone. The logged training loss is not covered by ε.

    ε assumes that the loss of an example depends on no other example. Layers that mix examples are refused by name;
    a forward pass that does it otherwise is found on the first batch, by changing the other examples.

    With the CWRF callbacks, per-example gradients are masked before their norm is taken, so that clipping and noise are
    spent on the live weights alone.

    Raises:
        MisconfigurationException: when a fit starts: layers or a Trainer that DP-SGD cannot work with.
    """

    state_class = DPSGDState
    more_than_loss = "it clips the gradient of each example and adds noise, which its accountant counts"

    @property
    def privacy_spent(self) -> PrivacySpent:
        """The guarantee of all steps so far, over every fit of these weights with DP-SGD."""
        settings, ledger = self.defense, self.defense_state.ledger
        epsilon = ledger.epsilon(settings.target_delta)
        return PrivacySpent(epsilon, settings.target_delta, ledger.steps, settings.accountant, settings.from_scratch)

    def example_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each example, shape ``(n,)``; no example's loss may depend on another example."""
        if self.defense.on is None:
            return F.cross_entropy(logits, targets, reduction="none")
        with shapes_only():
            losses: Tensor = torch.vmap(lambda z, y: base_loss(self, z[None], y[None]))(logits, targets)
        return losses

    def defense_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean of :meth:`example_losses`."""
        return self.example_losses(logits, targets).mean()

    def defense_step(self, batch: Any) -> tuple[Tensor, int]:
        """The mean loss of a physical batch, which may be empty."""
        step: PrivateStep | None = self.defense_state.step
        if step is None:
            return super().defense_step(batch)
        if is_empty(batch):  # many models cannot reshape an empty batch
            step.losses = None
            return torch.zeros((), device=self.device, requires_grad=True), 0
        if not step.independent:
            with checked_at_once():  # NaN would look like examples that depend on one another
                step.check(self.losses_of, batch)
        step.watch()
        losses = step.losses = self.losses_of(batch)
        return losses.mean(), len(losses)

    def noise_schedule(self, epoch: int) -> float:
        """The noise multiplier of an epoch, in multiples of the first one; override it for a schedule of your own.

        It must be known before the training, and not depend on private data.
        """
        settings = self.defense
        return float(settings.noise_gamma ** (epoch // settings.noise_step_size))

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
        if stage != "fit":
            return
        trainer, state, settings = self.trainer, self.defense_state, self.defense
        check_trainer(trainer)
        state.accumulation = trainer, trainer.accumulate_grad_batches
        ledger = state.ledger
        state.batches = plan.draw_poisson_batches(trainer, settings.max_physical_batch_size, lambda: ledger.steps)
        plan.warn_of_large_delta(settings.target_delta, len(state.batches.loader.dataset))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        check_layers(self)
        check_optimizer(self, self.trainer.optimizers)
        settings, state, ledger = self.defense, self.defense_state, self.defense_state.ledger
        state.frozen = None  # of an earlier fit: GradientMaskCallback calls on_weights_frozen again
        if settings.noise_multiplier is not None:
            ledger.noise_multiplier = settings.noise_multiplier
        elif ledger.noise_multiplier is None:
            ledger.noise_multiplier = plan.noise_for(
                self.trainer,
                ledger,
                state.batches,
                settings.target_epsilon,
                settings.target_delta,
                self.noise_schedule,
            )

    def on_weights_frozen(self, mask: WeightMask) -> None:
        """Mask every example's gradient by ``mask`` before its norm is taken."""
        if self.defense.from_scratch:
            raise MisconfigurationException(
                "from_scratch=True says that the start weights have seen no private data, but some are frozen in "
                "places that were chosen by it. Leave it out: ε covers the fine-tuning phase alone."
            )
        self.defense_state.frozen = mask

    def on_train_start(self) -> None:
        super().on_train_start()
        trainer, settings, state, ledger = self.trainer, self.defense, self.defense_state, self.defense_state.ledger
        epsilon, delta, schedule = settings.target_epsilon, settings.target_delta, self.noise_schedule
        plan.check_layout(trainer, ledger, state.batches)
        plan.check_budget(trainer, ledger, state.batches, epsilon, delta, schedule)
        endless = trainer.max_steps < 0 and (trainer.max_epochs is None or trainer.max_epochs < 0)
        first = trainer.current_epoch
        noises = plan.NoisePlan(
            schedule, [first] if endless else [e for e, _ in plan.epochs_ahead(trainer, state.batches.parts)]
        )
        # Not before: scoring works on deep copies, which would carry the hooks along.
        state.step = PrivateStep(
            self,
            ledger,
            state.batches,
            settings,
            noise_multiplier=lambda: ledger.noise_multiplier * noises.factor(trainer.current_epoch),
            frozen=state.frozen,
        )
        for factor in noises.factors.values():
            state.step.clipping.gradient_noise(ledger.noise_multiplier * factor)  # an error now, not in mid-training
        if isinstance(self.trainer.strategy, DDPStrategy):
            # The private gradients are summed over processes, not the plain ones.
            self.trainer.strategy.model.require_backward_grad_sync = False  # type: ignore[union-attr]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.defense_state.step is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.defense_state.step.backward(super().backward)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        def private_closure() -> Any:
            loss = optimizer_closure() if optimizer_closure is not None else None
            if self.defense_state.step is not None:
                self.defense_state.step.privatize()
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, private_closure)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        spent = self.privacy_spent
        plan.check_spent(spent.epsilon, self.defense.target_epsilon)
        name = "epsilon" if spent.from_scratch else "epsilon_finetuning"
        self.log(name, spent.epsilon, prog_bar=True, rank_zero_only=True)
        if self.defense.clipping == "adaptive":
            self.log("clip_norm", self.defense_state.ledger.clip_norm, rank_zero_only=True)

    def on_train_end(self) -> None:
        super().on_train_end()
        self.defense_state.end_step()
        rank_zero_info(str(self.privacy_spent))

    def configure_callbacks(self) -> Any:
        callbacks = super().configure_callbacks()
        return [*(callbacks if isinstance(callbacks, Sequence) else [callbacks]), EndPrivateTraining()]


class EndPrivateTraining(Callback):
    """Restores module and Trainer when a fit ends, however it ends."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)

    def _restore(self, pl_module: LightningModule) -> None:
        if isinstance(pl_module, DPSGDMixin):
            pl_module.defense_state.end()
