"""What the studies train: data sets and their splits, networks, and how long, by scale.

``cpu`` is for two cores overnight, ``gpu`` for one GPU, ``paper`` has the papers' data, sizes and epochs.
"""

from __future__ import annotations

import functools
import gzip
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits import DigitsClassifier, Split, digits, split
from digits import quiet as quiet

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""


class Classifier(DigitsClassifier):
    """The digits' LightningModule with another network, and Adam's weight decay."""

    def __init__(self, build_net: Callable[[], nn.Module], epochs: int, lr: float, weight_decay: float) -> None:
        super().__init__(epochs, lr)
        self.net = build_net()

    def configure_optimizers(self) -> Any:
        (optimizer,), schedulers = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["weight_decay"] = self.hparams["weight_decay"]
        return [optimizer], schedulers


class WideClassifier(Classifier):
    """With SGD, as the papers on LiRA and RMIA train Wide ResNets."""

    def configure_optimizers(self) -> Any:
        decay = self.hparams["weight_decay"]
        optimizer = torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9, weight_decay=decay)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams["epochs"])]


def flip_and_shift(example: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """An example whose image is mirrored with probability 1/2, and moved by up to four pixels in each direction."""
    image, label = example
    image = image.flip(-1) if torch.rand(()) < 0.5 else image
    padded = nn.functional.pad(image[None], (4, 4, 4, 4), mode="reflect")[0]
    y, x = torch.randint(9, (2,)).tolist()
    return padded[:, y : y + image.shape[-2], x : x + image.shape[-1]], label


def mlp(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 256), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, classes),
    )  # fmt: skip


def resnet8(inputs: int, classes: int) -> nn.Module:
    """One basic block at each of 16, 32 and 64 channels."""
    block = torchvision.models.resnet.BasicBlock

    def smaller(before: int, after: int) -> nn.Module:
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after))
        return block(before, after, stride=2, downsample=shortcut)

    return nn.Sequential(
        nn.Conv2d(inputs, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        block(16, 16), smaller(16, 32), smaller(32, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


def resnet18(inputs: int, classes: int) -> nn.Module:
    """With the stem for small images: a 3x3 convolution, and no pooling."""
    net = torchvision.models.resnet18(num_classes=classes)
    net.conv1 = nn.Conv2d(inputs, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


class WideBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut (Zagoruyko & Komodakis 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.rest = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
        )  # fmt: skip
        same = before == after and stride == 1
        self.shortcut = None if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        active = self.first(images)
        return self.rest(active) + (images if self.shortcut is None else self.shortcut(active))


def wide_resnet(inputs: int, classes: int, depth: int = 28, width: int = 2) -> nn.Module:
    """WRN-28-2: three groups of four blocks of 32, 64 and 128 channels."""
    blocks, channels = (depth - 4) // 6, [16, *(width * each for each in (16, 32, 64))]
    groups = [
        WideBlock(channels[group] if i == 0 else channels[group + 1], channels[group + 1], 2 if i == 0 < group else 1)
        for group in range(3)
        for i in range(blocks)
    ]
    return nn.Sequential(
        nn.Conv2d(inputs, 16, 3, padding=1, bias=False), *groups, nn.BatchNorm2d(channels[-1]), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes),
    )  # fmt: skip


class ViT(nn.Module):
    """A vision transformer with 4x4 patches for images of 28 or 32 pixels."""

    def __init__(self, inputs: int, classes: int, size: int = 28, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.net = torchvision.models.VisionTransformer(size, 4, layers, 4, width, 2 * width, num_classes=classes)
        self.net.conv_proj = nn.Conv2d(inputs, width, 4, stride=4)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


NETWORKS: dict[str, Any] = {"mlp": mlp, "resnet8": resnet8, "resnet18": resnet18, "vit": ViT, "wide": wide_resnet}


def fashion(folder: Path | None) -> TensorDataset:
    """The 70,000 images of Fashion-MNIST, (N, 1, 28, 28) in [0, 1]."""
    if folder is None and FASHION_MNIST.is_dir():
        folder = FASHION_MNIST
    if folder is None:
        parts = [torchvision.datasets.FashionMNIST("out/data", train=train, download=True) for train in (True, False)]
        images, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("data", "targets"))
    else:
        images, labels = (
            torch.cat([_idx(folder / f"{part}-{kind}-ubyte.gz") for part in ("train", "t10k")])
            for kind in ("images-idx3", "labels-idx1")
        )
    return TensorDataset(images.unsqueeze(1).float() / 255, labels.long())


def _idx(path: Path) -> Tensor:
    """A file of MNIST's format: two bytes of 0, the type, the number of dimensions, their sizes, and the bytes."""
    content = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(content, ">i4", content[3], 4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes).copy())


def tabular(folder: Path | None) -> TensorDataset:
    """The 569 cases of scikit-learn's breast cancer data, 30 standardised columns, two classes."""
    found = load_breast_cancer()
    columns = (found.data - found.data.mean(0)) / found.data.std(0)
    return TensorDataset(torch.tensor(columns, dtype=torch.float32), torch.tensor(found.target))


def cifar(name: str, folder: Path | None) -> Dataset[Any]:
    """All 60,000 images of CIFAR-10 or CIFAR-100, downloaded by torchvision if the folder lacks them."""
    cls = getattr(torchvision.datasets, name)
    to_tensor = torchvision.transforms.ToTensor()
    return ConcatDataset([cls(folder or "out/data", train, to_tensor, download=True) for train in (True, False)])


def cinic(folder: Path | None) -> Dataset[Any]:
    """The images of CINIC-10, in a folder for each split and class, as its authors give them."""
    if folder is None:
        raise SystemExit("CINIC-10 has no download here: unpack its archive, and pass the folder as --folder.")
    to_tensor = torchvision.transforms.ToTensor()
    return ConcatDataset([torchvision.datasets.ImageFolder(str(part), to_tensor) for part in sorted(folder.iterdir())])


DATA: dict[str, Any] = {
    "digits": lambda folder: digits(),
    "fashion": fashion,
    "tabular": tabular,
    "cifar10": functools.partial(cifar, "CIFAR10"),
    "cifar100": functools.partial(cifar, "CIFAR100"),
    "cinic10": cinic,
}


@dataclass(frozen=True)
class Task:
    """A data set, its split, a network and its training.

    Attributes:
        sizes: of members, non-members and reference data; the population has ``population`` more, None: the rest.
        inputs: channels or columns.
        lam: λ of the scoring, by the number of classes as in the paper; steps: its T.
        augment: whether images are mirrored and moved in training (:func:`flip_and_shift`).
    """

    data: str
    network: str
    sizes: tuple[int, int, int]
    population: int | None
    inputs: int
    classes: int
    epochs: int
    tune_epochs: int
    batch: int
    models: int
    weight_decay: float = 0.0
    lam: float = 0.7
    steps: int = 30
    augment: bool = False

    def parts(self, seed: int, folder: Path | None, *, fake: bool = False) -> Split:
        """The disjoint parts of its data set, or of fake images."""
        data: Any = self.fake_images() if fake else DATA[self.data](folder)
        found = split(data, seed, self.sizes)
        return found._replace(population=Subset(data, found.population.indices[: self.population]))

    def fake_images(self) -> TensorDataset:
        """As many images as the task needs, of noise."""
        size = sum(self.sizes) + (self.population or 0)
        images = torch.rand(size, self.inputs, 32, 32, generator=torch.Generator().manual_seed(0))
        return TensorDataset(images, torch.arange(size) % self.classes)

    def build(self, epochs: int, lr: float = 1e-3) -> Callable[[], DigitsClassifier]:
        """What builds the untrained module."""
        if self.network == "digits":
            return functools.partial(DigitsClassifier, epochs, lr)
        sizes = {"size": 32} if self.network == "vit" and self.inputs == 3 else {}
        net = functools.partial(NETWORKS[self.network], self.inputs, self.classes, **sizes)
        if self.network == "wide":
            return functools.partial(WideClassifier, net, epochs, 100 * lr, self.weight_decay)  # SGD: 0.1
        return functools.partial(Classifier, net, epochs, lr, self.weight_decay)


_WIDE = Task("cifar10", "wide", (25_000, 25_000, 2_000), None, 3, 10, 100, 40, 256, 64, 5e-4, augment=True)
_CIFAR = Task("cifar10", "resnet18", (18_000, 18_000, 2_000), None, 3, 10, 100, 40, 256, 8, 5e-4)
SCALES: dict[str, dict[str, Task]] = {
    "cpu": {
        "digits": Task("digits", "digits", (300, 300, 200), None, 1, 10, 60, 40, 32, 32),
        "fashion": Task("fashion", "resnet8", (1_500, 1_500, 1_000), 2_000, 1, 10, 40, 25, 64, 16),
        "tabular": Task("tabular", "mlp", (150, 150, 100), None, 30, 2, 60, 40, 32, 32),
    },
    "gpu": {
        "fashion": Task("fashion", "resnet18", (25_000, 25_000, 10_000), None, 1, 10, 100, 40, 256, 16, 5e-4),
    },
    "paper": {
        "cifar10": _CIFAR,
        "cifar100": replace(_CIFAR, data="cifar100", sizes=(18_000, 18_000, 4_000), classes=100, lam=0.9),
        "cifar10-wide": _WIDE,
        "cinic10": replace(_CIFAR, data="cinic10", sizes=(25_000, 25_000, 5_000)),
    },
}


def quick(task: Task) -> Task:
    """Few examples, models and epochs, to try a script."""
    small = {"sizes": (32, 32, 32), "population": 32, "epochs": 2, "tune_epochs": 1, "batch": 16}
    return replace(task, **small, models=8, steps=2)
