"""What a step of ghost clipping costs, against Opacus' own in a loop without a Trainer.

Both sides train by SGD on Poisson batches of 64 on average, in one thread; the best of several rounds of CPU time
counts, which other jobs on the machine change least.

    python benchmarks/dpsgd.py
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import Row, overhead, run
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf.defenses import DPSGD

BATCH, STEPS, ROUNDS = 64, 20, 3
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a small CNN, 6,000 weights, 8×8 images": lambda: nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    ),
    "a wide network, 4.3 M weights, linear layers": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)
    ),
}


class Model(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Clock(Callback):
    """CPU time at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.process_time())


def data() -> DataLoader[Any]:
    torch.manual_seed(0)
    size = BATCH * STEPS
    return DataLoader(TensorDataset(torch.rand(size, 1, 8, 8), torch.randint(10, (size,))), batch_size=BATCH)


def ours(network: nn.Module, ghost: bool) -> float:
    clock = Clock()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    model = DPSGD(noise_multiplier=1.0, accountant="rdp", ghost=ghost).attach(Model(network))
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[clock], enable_checkpointing=False, logger=False, **quiet
    )
    trainer.fit(model, data())
    return _step(clock.times)


def opacus(network: nn.Module, ghost: bool) -> float:
    from opacus import PrivacyEngine

    given: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "data_loader": data()}
    optimizer, criterion = torch.optim.SGD(network.parameters(), 0.01), nn.CrossEntropyLoss()
    if ghost:
        given |= {"criterion": criterion, "grad_sample_mode": "ghost"}
    made = PrivacyEngine(accountant="rdp").make_private(module=network, optimizer=optimizer, **given)
    model, optimizer, batches = made[0], made[1], made[-1]
    criterion = made[2] if ghost else criterion
    times = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss: Any = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        times.append(time.process_time())
    return _step(times)


def _step(times: list[float]) -> float:
    """The mean of the steps after the first few."""
    return (times[-1] - times[4]) / (len(times) - 5)


def benchmark() -> list[Row]:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = []
    for name, network in NETWORKS.items():
        best = [float("inf")] * 2
        for _ in range(ROUNDS):
            for i, side in enumerate((ours, opacus)):
                best[i] = min(best[i], side(network(), ghost=True))
        text = f"CPU time of a step of ghost clipping: {name}, batch {BATCH}"
        rows.append(overhead(text, best[0], "Opacus' own, in a bare loop", best[1], at_most=1.0))
    return rows


if __name__ == "__main__":
    run(benchmark, __doc__)
