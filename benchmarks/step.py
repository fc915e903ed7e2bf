"""A fine-tuning step with the callbacks of CWRF against the same Trainer without them.

Both sides train the CIFAR ResNet-18 by Adam; ours rewinds and freezes 5 % of its weights. A step is the time from one
``on_train_batch_end`` to the next, without the rewind at the start and the check at the end of an epoch. The cost of
the mask alone (zeroing gradients before the optimizer's step, writing values back after it) is measured separately,
because it is small compared with the noise of whole steps.

    python benchmarks/step.py
"""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from typing import Any

import torch
from common import Row, best_of, cifar_resnet18, image_batches, overhead, run
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback
from lightning_cwrf.weights.masks import WeightMask

BATCH, RATE = 64, 0.05
STEPS, WARM_UP, FITS = 6, 2, 5


class Classifier(LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = cifar_resnet18(seed)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class StepTimer(Callback):
    """Stands on both sides, and notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def steps(self) -> list[float]:
        return [end - begin for begin, end in itertools.pairwise(self.ends[WARM_UP - 1 :])]


def fit(model: Classifier, batches: DataLoader[Any], callbacks: list[Callback]) -> list[float]:
    timer = StepTimer()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[*callbacks, timer],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(model, batches)
    return timer.steps()


def benchmark() -> list[Row]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|number of training batches|treespec).*")
    images, labels = image_batches(1, STEPS * BATCH, seed=1)[0]
    batches = DataLoader(TensorDataset(images, labels), batch_size=BATCH)
    vanilla = Classifier(seed=1).state_dict()
    model = Classifier()
    mask = WeightMask.top({name: torch.rand_like(p) for name, p in model.named_parameters()}, RATE)

    with_callbacks: list[float] = []
    without: list[float] = []
    for _ in range(FITS):
        callbacks = [CriticalRewindCallback(mask=mask, vanilla=vanilla), GradientMaskCallback()]
        model = Classifier()
        with_callbacks += fit(model, batches, callbacks)
        without += fit(Classifier(), batches, [])

    def hold() -> None:
        mask.zero_grad_(model)
        mask.restore_(model)

    (alone,) = best_of(10, hold)  # the gradients of the last step are still there
    plain = min(without)
    name = f"fine-tuning step: ResNet-18, batch {BATCH}, {RATE:.0%} of {mask.total / 1e6:.1f} M weights frozen"
    return [
        overhead(name, min(with_callbacks), "the Trainer without callbacks", plain, at_most=1.03),
        overhead(
            "the mask alone, per step: zero_grad_ + restore_", alone, "a step of the Trainer without callbacks", plain
        ),
    ]


if __name__ == "__main__":
    run(benchmark, __doc__)
