"""``cwrf audit`` of a torchvision ResNet-18 checkpoint on 10,000 CIFAR-sized examples, against a bare forward pass.

Both sides take turns in this process; what the command does is loading, the passes over members and non-members, the
attack, its measures, and the JSON file. Images are random tensors; the time does not depend on them.

    python benchmarks/audit_command.py
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import torch
from common import Row, best_of, image_batches, overhead, run
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_cwrf.commands import main

MEMBERS = NONMEMBERS = 5_000
BATCH, ROUNDS = 256, 5


class ResNet(LightningModule):
    """Torchvision's ResNet-18 as it is, with ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18(num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return loader(0, MEMBERS)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return loader(1, NONMEMBERS)


def loader(seed: int, count: int) -> DataLoader[tuple[Tensor, ...]]:
    if seed not in KEPT:
        ((images, _),) = image_batches(1, count, seed)
        KEPT[seed] = TensorDataset(images, predictions(images))
    return DataLoader(KEPT[seed], batch_size=BATCH)


@torch.no_grad()
def predictions(images: Tensor) -> Tensor:
    """The classes that the model predicts: with them as labels it passes for trained, as an audit demands."""
    return torch.cat([finished_model()(part).argmax(1) for part in images.split(BATCH)])


@functools.cache
def finished_model() -> ResNet:
    """A network at random whose predictions are confident and spread over the classes."""
    torch.manual_seed(0)
    model = ResNet().eval()
    ((images, _),) = image_batches(1, BATCH, seed=2)
    with torch.no_grad():
        logits = model(images)
        scale = 5 / logits.std(0)
        model.net.fc.weight.mul_(scale[:, None])
        model.net.fc.bias.sub_(logits.mean(0)).mul_(scale)
    return model


KEPT: dict[int, TensorDataset] = {}


def benchmark() -> list[Row]:
    model, data = finished_model(), Data()
    here = Path(__file__).stem if __name__ == "__main__" else __name__
    os.chdir(Path(__file__).parent)  # so that the command imports this file
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, out = Path(folder) / "resnet.pt", Path(folder) / "audit.json"
        torch.save(model.state_dict(), checkpoint)
        words = ["audit", "--model", f"{here}.ResNet", "--data", f"{here}.Data", "--checkpoint", str(checkpoint)]
        words += ["--accelerator", "cpu", "--out", str(out), "--overwrite"]

        def command() -> None:
            if main(words) != 0:
                raise RuntimeError("the command failed")

        def forward() -> None:
            with torch.no_grad():
                for side in (data.train_dataloader(), data.test_dataloader()):
                    for images, _ in side:
                        model(images)

        command()  # imports, once
        ours, bare = best_of(ROUNDS, command, forward)
    what = f"cwrf audit: ResNet-18, {MEMBERS + NONMEMBERS:,} examples of 32×32, batch {BATCH}"
    return [overhead(what, ours, "a bare forward pass", bare, at_most=1.15)]


if __name__ == "__main__":
    run(benchmark, __doc__)
