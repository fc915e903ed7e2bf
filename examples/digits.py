"""What the examples on handwritten digits share: the data, its split, and an ordinary LightningModule."""

from __future__ import annotations

import itertools
import logging
import warnings
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

MEMBERS = NONMEMBERS = 300
REFERENCE = 200
BATCH = 32


def network(*, batchnorm: bool = True) -> nn.Sequential:
    """A small convolutional network for (N, 1, 8, 8) images and ten classes; DP-SGD needs it without BatchNorm."""
    layers = (
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )
    kept = (each for each in layers if batchnorm or not isinstance(each, (nn.BatchNorm1d, nn.BatchNorm2d)))
    return nn.Sequential(*kept)


class DigitsClassifier(LightningModule):
    """An ordinary LightningModule: it knows nothing of privacy."""

    def __init__(self, epochs: int, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams["epochs"])]


class Split(NamedTuple):
    """Disjoint parts of a data set; ``pool`` is the members and the non-members together."""

    members: Subset[Any]
    nonmembers: Subset[Any]
    reference: Subset[Any]
    population: Subset[Any]
    pool: Subset[Any]


def digits() -> TensorDataset:
    """The 1,797 images of scikit-learn, (N, 1, 8, 8) in [0, 1], and their labels, (N,)."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return TensorDataset(images, torch.tensor(found.target))


def split(data: Dataset[Any], seed: int, sizes: tuple[int, int, int] = (MEMBERS, NONMEMBERS, REFERENCE)) -> Split:
    """Members, non-members and reference data of these sizes, and the rest as population, drawn by a seed."""
    size = len(data)  # type: ignore[arg-type]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    edges = [0, *itertools.accumulate(sizes), size]
    parts = (Subset(data, order[a:b]) for a, b in itertools.pairwise(edges))
    return Split(*parts, pool=Subset(data, order[: edges[2]]))


def quiet() -> None:
    """Leave out Lightning's start-up lines on devices and loaders, printed anew for each of many small trainings."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(many workers|number of training batches|treespec|Optimal order).*")
