"""The networks of the studies, and the LightningModules around them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from data_sets import WORDS
from digits import DigitsClassifier
from torch import Tensor, nn


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


class WarmedUp(DigitsClassifier):
    """The digits' LightningModule, whose learning rate grows in its first epochs."""

    def __init__(self, epochs: int, lr: float, warmup: int) -> None:
        super().__init__(epochs, lr)

    def configure_optimizers(self) -> Any:
        (optimizer,), _ = super().configure_optimizers()
        rate = functools.partial(warmed_cosine, warmup=self.hparams["warmup"], epochs=self.hparams["epochs"])
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, rate)]


def warmed_cosine(epoch: int, *, warmup: int, epochs: int) -> float:
    """The share of the learning rate in an epoch: a cosine from 1 to 0, times a line up to 1 after the warm-up.

    >>> [round(warmed_cosine(epoch, warmup=3, epochs=4), 3) for epoch in range(4)]
    [0.25, 0.427, 0.375, 0.146]
    """
    return min(1.0, (epoch + 1) / (warmup + 1)) * (1 + math.cos(math.pi * epoch / epochs)) / 2


class WithSGD(Classifier):
    """With SGD, momentum and weight decay, as in the papers on LiRA, RMIA and PAST."""

    def configure_optimizers(self) -> Any:
        decay = self.hparams["weight_decay"]
        optimizer = torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9, weight_decay=decay)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams["epochs"])]


def mlp(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 256), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, classes),
    )  # fmt: skip


def resnet8(inputs: int, classes: int) -> nn.Module:
    """One basic block at each of 16, 32 and 64 channels; channels last, which is faster on a CPU."""
    block = torchvision.models.resnet.BasicBlock

    def smaller(before: int, after: int) -> nn.Module:
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after))
        return block(before, after, stride=2, downsample=shortcut)

    net = nn.Sequential(
        nn.Conv2d(inputs, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        block(16, 16), smaller(16, 32), smaller(32, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


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


class TextTransformer(nn.Module):
    """The encoder of Vaswani et al. 2017 on words, with learned positions and the mean over a text's words."""

    def __init__(self, inputs: int, classes: int, words: int = WORDS, width: int = 64, layers: int = 1) -> None:
        super().__init__()
        self.words = nn.Embedding(inputs, width, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(words, width) / width**0.5)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, numbers: Tensor) -> Tensor:
        there = (numbers > 0).unsqueeze(-1).float()
        found = self.encoder(self.words(numbers) + self.positions, src_key_padding_mask=numbers == 0)
        return self.head((found * there).sum(1) / there.sum(1).clamp(min=1))


IMAGES: dict[str, Any] = {"resnet8": resnet8, "resnet18": resnet18, "vit": ViT, "wide": wide_resnet}
COLUMNS: dict[str, Any] = {"mlp": mlp}
TEXTS: dict[str, Any] = {"transformer": TextTransformer}
NETWORKS: dict[str, Any] = IMAGES | COLUMNS | TEXTS
"""By their names; each takes the number of channels, columns or words, and of classes."""
