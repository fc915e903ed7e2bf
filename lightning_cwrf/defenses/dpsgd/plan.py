"""The steps of a private fit: Poisson batches instead of the user's loader, the noise they need, and their budget."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cwrf.data.poisson import PoissonBatches, check_poisson
from lightning_cwrf.defenses.dpsgd.ledger import Ledger
from lightning_cwrf.lightning_private import training_source
from lightning_cwrf.mechanism.spent import large_delta


def draw_poisson_batches(trainer: Trainer, limit: int | None, first_step: Callable[[], int]) -> PoissonBatches:
    """Put Poisson batches in the place of the user's training loader, and accumulate over their parts.

    ``limit`` is the most examples of a physical batch; None: a logical batch is as many as the Trainer accumulates.
    """
    source = training_source(trainer)
    loader = source.dataloader()
    check_poisson(loader)
    examples, size = len(loader.dataset), loader.batch_sampler.batch_size
    per_epoch = examples // size if loader.drop_last else math.ceil(examples / size)
    world, parts = trainer.world_size, trainer.accumulate_grad_batches
    steps = max(1, math.ceil(per_epoch / (parts * world)))
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        parts = 1  # there is only one batch
    elif limit is not None:
        mean = examples / steps / world
        parts = max(parts, math.ceil((mean + 6 * math.sqrt(mean)) / limit))  # six standard deviations above the mean
    trainer.accumulate_grad_batches = parts
    rank = trainer.global_rank
    batches = PoissonBatches(loader, steps=steps, parts=parts, first_step=first_step, rank=rank, world_size=world)
    source.instance = batches
    return batches


def warn_of_large_delta(delta: float, examples: int) -> None:
    """Warn of a δ at which the guarantee says nothing about single examples."""
    message = large_delta(delta, examples)
    if message:
        rank_zero_warn(message)


def noise_for(trainer: Trainer, ledger: Ledger, batches: PoissonBatches, target: float, delta: float) -> float:
    """The noise multiplier with which the whole fit stays within ε = ``target``."""
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise MisconfigurationException(
            "target_epsilon is spent over a known number of steps: set max_epochs or max_steps in the Trainer, or "
            "pass noise_multiplier."
        )
    return ledger.noise_for(target, delta, batches.sample_rate, int(steps))


def check_budget(trainer: Trainer, ledger: Ledger, batches: PoissonBatches, target: float | None, delta: float) -> None:
    """Raise where a fit's epochs have parts of logical batches, where it cannot be resumed, or where ε would end above
    ``target``.
    """
    parts = batches.parts
    # What a run that resumes in the middle of an epoch must have in common with the interrupted one.
    layout = {"examples": len(batches.loader.dataset), "steps": batches.steps, "parts": parts}  # type: ignore[arg-type]
    if trainer.num_training_batches % parts:
        raise MisconfigurationException(
            f"an epoch has {trainer.num_training_batches} physical batches, and a logical batch {parts} "
            "(accumulate_grad_batches, or more for max_physical_batch_size): limit_train_batches must be a "
            "multiple of it."
        )
    if trainer.fit_loop.restarted_mid_epoch and ledger.layout is not None and ledger.layout != layout:
        raise MisconfigurationException(
            f"the checkpoint was saved in the middle of an epoch of batches {ledger.layout}, but now they are "
            f"{layout}. Resume with the same data, batch size, accumulate_grad_batches, max_physical_batch_size and "
            "number of processes, or from a checkpoint of an epoch's end."
        )
    ledger.layout = layout
    if target is None or ledger.steps == 0:
        return
    ahead = _steps_ahead(trainer, parts)
    end = ledger.epsilon(delta, (ledger.noise_multiplier, batches.sample_rate, ahead) if ahead else None)
    if end > target * 1.01:
        raise MisconfigurationException(
            f"{ledger.steps} steps are done and {ahead} to come, which would end with ε = {end:.4g}, above "
            f"target_epsilon={target:g}. Train for fewer steps, or raise target_epsilon."
        )


def _steps_ahead(trainer: Trainer, parts: int) -> int:
    """How many steps this fit will still take."""
    steps = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        resumed = trainer.fit_loop.restarted_mid_epoch
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready if resumed else 0
        steps = (trainer.max_epochs - trainer.current_epoch) * (trainer.num_training_batches // parts) - done // parts
    if trainer.max_steps >= 0:
        steps = min(steps, trainer.max_steps - trainer.global_step)
    return max(0, int(steps))
