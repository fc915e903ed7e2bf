"""What a training step costs under each defense, against the same Trainer with plain cross-entropy.

All sides train the CIFAR ResNet-18 by Adam, in turns; the best step of each counts. PAST is also compared with a plain
step that runs the non-member batch as well, which it cannot do without: at most 1.25 times that. DP-SGD replaces
BatchNorm by GroupNorm; its logical batches are drawn at random, of 64 on average, so its time is taken per example.

    python benchmarks/defenses.py
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from common import Row, image_batches, overhead, run
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from step import BATCH, STEPS, Classifier, StepTimer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf.defenses import create_defense, defense_class

FITS = 2
DEFENSES: dict[str, dict[str, Any]] = {
    "relaxloss": {"alpha": 1.0},
    "hamp": {},
    "ccl": {},
    "label_smoothing": {},
    "confidence_penalty": {},
    "weight_penalty": {"l1": 1e-5},
    "past": {},
    "adversarial_regularization": {},
    "mixup_mmd": {},
    "dmp": {},
    "dpsgd": {"noise_multiplier": 1.0, "fix": True},
    "dpsgd, ghost": {"noise_multiplier": 1.0, "fix": True, "ghost": True},
}


class WithNonmembers(Classifier):
    """The floor of PAST: cross-entropy of the members, and a forward and backward pass of the non-members."""

    def __init__(self, nonmembers: DataLoader[Any]) -> None:
        super().__init__()
        self.others = nonmembers

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = next(iter(self.others))
        return super().training_step(batch, batch_idx) + F.cross_entropy(self.net(images), labels)


class Seen(Callback):
    """How many examples each step trained on."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sizes.append(len(batch[1]))


def per_batch(model: Classifier, batches: DataLoader[Any]) -> float:
    """The best time of a step, scaled to a batch of BATCH examples."""
    timer, seen = StepTimer(), Seen()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[seen, timer],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(model, batches)
    steps = timer.steps()
    return min(time * BATCH / size for time, size in zip(steps, seen.sizes[-len(steps) :], strict=True))


def benchmark() -> list[Row]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    (members,) = image_batches(1, STEPS * BATCH, seed=1)
    (others,) = image_batches(1, STEPS * BATCH, seed=2)
    batches, nonmembers = (DataLoader(TensorDataset(*data), batch_size=BATCH) for data in (members, others))

    def defended(name: str) -> Classifier:
        kind = name.partition(",")[0]
        data: dict[str, Any] = dict.fromkeys(defense_class(kind).data_names(), nonmembers)
        if kind == "dmp":
            data = {"teacher": Classifier()}
        return create_defense(kind, **DEFENSES[name], **data).attach(Classifier())

    best: dict[str, float] = {}
    for _ in range(FITS):
        sides = {"plain": Classifier(), "both": WithNonmembers(nonmembers), **{n: defended(n) for n in DEFENSES}}
        for name, model in sides.items():
            best[name] = min(best.get(name, float("inf")), per_batch(model, batches))
    against = f"plain cross-entropy, ResNet-18, batch {BATCH}"
    return [
        overhead(
            "step under past",
            best["past"],
            "a plain step that also runs the non-member batch",
            best["both"],
            at_most=1.25,
        ),
        *(overhead(f"step under {name}", best[name], against, best["plain"]) for name in DEFENSES),
    ]


if __name__ == "__main__":
    run(benchmark, __doc__)
