"""The steps of a private fit: Poisson batches instead of the user's loader, the noise they need, and their budget."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator

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


def noise_factor(schedule: Callable[[int], float], epoch: int) -> float:
    """What the noise multiplier of an epoch is of the first one, checked."""
    factor: object = schedule(epoch)
    if not (isinstance(factor, numbers.Real) and math.isfinite(factor) and float(factor) > 0):
        raise ValueError(f"noise_schedule must give a number above 0 for every epoch, not {factor!r} for {epoch}.")
    return float(factor)


class NoisePlan:
    """The noise of the epochs of a fit, as the schedule gave it when the fit started; it must not answer otherwise."""

    def __init__(self, schedule: Callable[[int], float], epochs: Iterable[int]) -> None:
        self.schedule = schedule
        self.factors = {epoch: noise_factor(schedule, epoch) for epoch in epochs}

    def factor(self, epoch: int) -> float:
        """What the noise multiplier of an epoch is of the first one."""
        found = noise_factor(self.schedule, epoch)
        planned = self.factors.setdefault(epoch, found)
        if found != planned:
            raise MisconfigurationException(
                f"noise_schedule gave {planned:g} for epoch {epoch} before, and {found:g} now. The noise, and the ε "
                "that it leads to, are planned at the start: let it depend on the epoch alone."
            )
        return found


def noise_for(
    trainer: Trainer,
    ledger: Ledger,
    batches: PoissonBatches,
    target: float,
    delta: float,
    schedule: Callable[[int], float],
) -> float:
    """The (first) noise multiplier with which the whole fit stays within ε = ``target``."""
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise _endless()
    trainer.fit_loop.setup_data()  # where max_epochs is infinite, it has not been done yet
    per_epoch = math.ceil(trainer.num_training_batches / batches.parts)
    plan = [(noise_factor(schedule, epoch), count) for epoch, count in _epochs(int(steps), per_epoch)]
    _warn_of_slow_prv(ledger, len({factor for factor, _ in plan}))
    return ledger.noise_for(target, delta, batches.sample_rate, plan)


def _endless() -> MisconfigurationException:
    return MisconfigurationException(
        "target_epsilon is spent over a known number of steps: set max_epochs or max_steps in the Trainer, or "
        "pass noise_multiplier."
    )


def _warn_of_slow_prv(ledger: Ledger, levels: int) -> None:
    if levels > 10 and ledger.accountant.mechanism() == "prv":
        rank_zero_warn(
            f"the noise schedule has {levels} noise multipliers, and the prv accountant takes some tenths of a second "
            'for each of them whenever ε is computed, as at each epoch\'s end. accountant="rdp" is fast, and '
            "noise_step_size makes them fewer."
        )


def _epochs(steps: int, per_epoch: int, first: int = 0, done: int = 0) -> Iterator[tuple[int, int]]:
    """The epochs that so many steps are in, each with its number of them; ``done``: of the first one."""
    while steps > 0 and per_epoch > 0:
        count = min(steps, per_epoch - done)
        yield first, count
        first, steps, done = first + 1, steps - count, 0


def check_layout(trainer: Trainer, ledger: Ledger, batches: PoissonBatches) -> None:
    """Raise where a fit's epochs have parts of logical batches, or where it cannot be resumed."""
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


def check_spent(epsilon: float, target: float | None) -> None:
    """Raise where ε has passed ``target``."""
    if target is not None and epsilon > target * 1.01:
        raise MisconfigurationException(
            f"the steps so far have spent ε = {epsilon:.4g}, more than target_epsilon={target:g}: they were not those "
            "that the noise was planned for. Do not change the Trainer, the batches or noise_schedule in a fit."
        )


def check_budget(
    trainer: Trainer,
    ledger: Ledger,
    batches: PoissonBatches,
    target: float | None,
    delta: float,
    schedule: Callable[[int], float],
) -> None:
    """Raise where ε would end above ``target``."""
    noise = ledger.noise_multiplier
    if target is None or noise is None or (ledger.steps == 0 and trainer.current_epoch == 0):
        return
    ahead = [
        (noise * noise_factor(schedule, epoch), batches.sample_rate, count)
        for epoch, count in epochs_ahead(trainer, batches.parts)
    ]
    end = ledger.epsilon(delta, ahead)
    if end > target * 1.01:
        raise MisconfigurationException(
            f"{ledger.steps} steps are done and {sum(count for _, _, count in ahead)} to come, which would end with "
            f"ε = {end:.4g}, above target_epsilon={target:g}. Train for fewer steps, or raise target_epsilon."
        )


def epochs_ahead(trainer: Trainer, parts: int) -> list[tuple[int, int]]:
    """The epochs of the steps that this fit will still take, each with its number of them."""
    per_epoch, first = int(trainer.num_training_batches // parts), trainer.current_epoch
    resumed = trainer.fit_loop.restarted_mid_epoch
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready // parts if resumed else 0
    steps: float = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        steps = (trainer.max_epochs - first) * per_epoch - done
    if trainer.max_steps >= 0:
        steps = min(steps, trainer.max_steps - trainer.global_step)
    if math.isinf(steps):
        raise _endless()
    return list(_epochs(int(steps), per_epoch, first, done))
