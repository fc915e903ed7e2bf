"""Training shadow models: what our store and orchestration cost, what a second worker gives, what a stack gives.

Every side trains the same models by the same recipe, on halves of 600 handwritten digits, in batches of 32, by Adam.
The bare loop builds a Trainer and fits, model after model, and keeps nothing.

    python benchmarks/shadows.py
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Row, best_of, overhead, run, speedup
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from digits import DigitsClassifier, digits

from lightning_cwrf import CWRFConfig, ShadowRecipe, train_shadows
from lightning_cwrf.defenses import create_defense
from lightning_cwrf.shadows import balanced_membership

POOL, BATCH, EPOCHS, MODELS, ROUNDS = 600, 32, 40, 16, 3
TRAINER = {"accelerator": "cpu", "max_epochs": EPOCHS}


class Digits(LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = mlp() if kind == "mlp" else DigitsClassifier(epochs=1).net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def mlp() -> nn.Module:
    sizes = (64, 256, 256, 256)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(256, 10))


def pool(begin: int = 0, end: int = POOL) -> TensorDataset:
    return TensorDataset(*digits()[begin:end])


def bare(kind: str, models: int) -> None:
    data = pool()
    for i, row in enumerate(balanced_membership(models, POOL)):
        torch.manual_seed(i)
        trainer = Trainer(
            **TRAINER,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        members = Subset(data, row.nonzero().flatten().tolist())
        trainer.fit(Digits(kind), DataLoader(members, batch_size=BATCH, shuffle=True))


def ours(kind: str, models: int, workers: int, stack: int = 1) -> None:
    recipe = ShadowRecipe(functools.partial(Digits, kind), TRAINER, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as store:
        train_shadows(recipe, pool(), models, store=store, workers=workers, stack=stack, progress=False)


def hardened(models: int, stack: int) -> None:
    """Base models, and CWRF with RelaxLoss on each."""
    settings = {**TRAINER, "max_epochs": 60}
    base = ShadowRecipe(functools.partial(Digits, "cnn"), settings, batch_size=BATCH)
    cwrf, defense = CWRFConfig(pool(POOL, POOL + 300)), create_defense("relaxloss", alpha=0.6)
    tuned = replace(base, trainer_kwargs=TRAINER, cwrf=cwrf, defense=defense)
    with tempfile.TemporaryDirectory() as store:
        train = functools.partial(train_shadows, store=store, workers=1, stack=stack, progress=False)
        train(tuned, pool(), models, base=train(base, pool(), models, keep_weights=True))


def wait(members: Any, seed: int) -> nn.Module:
    time.sleep(1.0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def start_workers() -> None:
    """Worker processes import torch when they begin, and end when they have nothing to do for minutes."""
    with tempfile.TemporaryDirectory() as store:
        train_shadows(wait, pool(), 2, store=store, workers=2, progress=False)


def with_threads(threads: int, call: Callable[[], None]) -> Callable[[], None]:
    def limited() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            call()
        finally:
            torch.set_num_threads(before)

    return limited


def benchmark() -> list[Row]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(many workers|number of training batches|treespec).*")
    few = functools.partial(ours, "cnn", 4)
    loop, one = best_of(ROUNDS, lambda: bare("cnn", 4), lambda: few(1))
    rows = [overhead("train_shadows, 1 worker, 4 digits CNNs", one, "bare loop of Trainer.fit", loop, at_most=1.05)]
    start_workers()
    more = functools.partial(ours, "cnn", 8)
    one, alone, two = best_of(2, lambda: more(1), with_threads(1, lambda: more(1)), lambda: more(2))
    rows.append(speedup("train_shadows, 2 workers, 8 digits CNNs", two, "1 worker with both cores", one, 1.7))
    rows.append(speedup("train_shadows, 2 workers, 8 digits CNNs", two, "1 worker with one core", alone))
    for kind, name, least in (("mlp", "MLP of 3 × 256", 5.0), ("cnn", "digits CNN", 3.0)):
        sides = (
            lambda kind=kind: bare(kind, MODELS),
            lambda kind=kind: ours(kind, MODELS, 2),
            lambda kind=kind: ours(kind, MODELS, 1, MODELS),
            lambda kind=kind: ours(kind, MODELS, 2, MODELS // 2),
        )
        start_workers()
        loop, apart, stacked, both = best_of(2, *sides)
        what = f"{MODELS} models, {name}"
        rows.append(speedup(f"{what}: 2 workers, a stack of 8 each", both, "bare loop of Trainer.fit", loop, least))
        rows.append(speedup(f"{what}: 1 worker, a stack of 16", stacked, "bare loop of Trainer.fit", loop))
        rows.append(speedup(f"{what}: 2 workers, a stack of 8 each", both, "2 workers, one by one", apart))
    few, many = best_of(1, lambda: hardened(4, 1), lambda: hardened(32, 32))
    what = "32 digits CNNs, 60 epochs and 40 of CWRF with RelaxLoss: a stack of 32"
    rows.append(speedup(what, many, "one by one, 8 times the time of 4 models", 8 * few))
    return rows


if __name__ == "__main__":
    run(benchmark, __doc__)
