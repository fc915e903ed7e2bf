"""Memory of a hardening per weight: a fit with the callbacks of CWRF, in a fresh process.

The model is an MLP of 24 equal layers; float32; the vanilla weights come from a file. Counted is the peak of resident
memory above that of the process with the model: "before the first step" (scoring, the choice of the weights, rewinding
and freezing), less one set of vanilla weights; and in the fine-tuning steps, less the peak of the same fit without
callbacks (gradients and the optimizer's state, which training needs anyway) and the vanilla weights.

    python benchmarks/memory.py [--json FILE]

``LIGHTNING_CWRF_WEIGHTS`` sets the number of weights, in millions (default: 100). One billion need 18 GB of memory.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import Row, in_fresh_process, run, verdict
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback
from lightning_cwrf.weights import save_vanilla

DEPTH, RATE, LIMIT = 24, 0.03, 5.0
MILLIONS = int(os.environ.get("LIGHTNING_CWRF_WEIGHTS", "100"))
WIDTH = round((MILLIONS * 1e6 / DEPTH) ** 0.5)


class Network(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(WIDTH, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def resident(key: str) -> int:
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(key))
    return int(line.split()[1]) * 1024


class Peaks(Callback):
    """Peak memory before the first step and in the steps; last among the callbacks."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.base = resident("VmRSS")
        self.start = self.steps = 0

    def on_train_start(self, *_: Any) -> None:
        self.start = resident("VmHWM") - self.base
        Path("/proc/self/clear_refs").write_text("5")

    def on_train_end(self, *_: Any) -> None:
        self.steps = resident("VmHWM") - self.base


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, WIDTH, generator=generator), torch.arange(8) % 2) for _ in range(2)]


def fit(vanilla: str, hardens: bool) -> tuple[float, float]:
    """Peak bytes per weight above the model, before the first step and in the steps."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = Network()
    with torch.no_grad():  # it is not trained, but moved a little: the vanilla weights correlate with it
        for parameter in model.parameters():
            parameter.mul_(1.01)
    callbacks: list[Callback] = []
    if hardens:
        scoring = PrivacyScoringCallback(batches(1), vanilla, steps=2)
        callbacks = [scoring, CriticalRewindCallback(rate=RATE), GradientMaskCallback()]
    peaks = Peaks()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[*callbacks, peaks], **quiet)
    trainer.fit(model, DataLoader(TensorDataset(*map(torch.cat, zip(*batches(2), strict=True))), batch_size=8))
    weights = sum(p.numel() for p in model.parameters())
    return peaks.start / weights, peaks.steps / weights


def write_vanilla(path: str) -> None:
    torch.manual_seed(0)
    save_vanilla(Network(), path)


def benchmark() -> list[Row]:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"  # else glibc keeps what was freed, and that would be counted
    with tempfile.TemporaryDirectory() as folder:
        vanilla = str(Path(folder) / "vanilla.safetensors")
        in_fresh_process(write_vanilla, vanilla)
        start, steps = in_fresh_process(fit, vanilla, True)
        _, plain = in_fresh_process(fit, vanilla, False)
    return [
        row("scoring, choice, rewinding", start - 4, "model and vanilla weights"),
        row("a fine-tuning step", steps - plain - 4, "the same, gradients and optimizer"),
    ]


def row(what: str, ours: float, beside: str) -> Row:
    name = f"memory of a hardening, {MILLIONS:,} M weights: {what}"
    target, met = f"≤ {LIMIT:g} bytes per weight", verdict(ours <= LIMIT)
    return Row(name, f"{ours:.2f} bytes per weight", f"beside {beside}", "", "", target, met)


if __name__ == "__main__":
    run(benchmark, __doc__)
