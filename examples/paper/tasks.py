"""What the studies train: data sets and their splits, networks, and how long, by scale.

``cpu`` is for two cores overnight, ``gpu`` for one GPU, ``paper`` has the papers' data, sizes and epochs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from data_sets import DATA, VOCABULARY, WORDS
from digits import DigitsClassifier, Split, network, split
from digits import quiet as quiet
from networks import COLUMNS, IMAGES, NETWORKS, TEXTS, Classifier, WarmedUp, WithSGD
from torch.utils.data import Subset, TensorDataset


@dataclass(frozen=True)
class Task:
    """A data set, its split, a network and its training.

    Attributes:
        sizes: of members, non-members and reference data; the population has ``population`` more, None: the rest.
        inputs: channels, columns, or words of the vocabulary.
        lam: λ of the scoring, by the number of classes as in the paper; steps: its T.
        augment: whether images are mirrored and moved in training (:func:`flip_and_shift`).
        optimizer: ``adam`` at ``lr``, or ``sgd`` with momentum at ``sgd_lr``.
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
    lr: float = 1e-3
    lam: float = 0.7
    steps: int = 30
    augment: bool = False
    optimizer: str = "adam"
    sgd_lr: float = 0.05

    def parts(self, seed: int, folder: Path | None, *, fake: bool = False) -> Split:
        """The disjoint parts of its data set, or of noise."""
        data: Any = self.fake() if fake else DATA[self.data](folder)
        found = split(data, seed, self.sizes)
        return found._replace(population=Subset(data, found.population.indices[: self.population]))

    def with_network(self, name: str) -> Task:
        """The task with another network, which must be one for its kind of data.

        Raises:
            ValueError: the network is not for such data.
        """
        kinds = [{"digits", *IMAGES}, set(COLUMNS), set(TEXTS)]
        fits = any({name, self.network} <= kind for kind in kinds) and (name != "digits" or self.data == "digits")
        if not fits:
            raise ValueError(f"--network {name} does not take the {self.data}.")
        if self.data == "digits" and name == "vit":
            raise ValueError("--network vit is for images of 28 or 32 pixels, and the digits have 8.")
        task = replace(self, network=name)
        return replace(task.with_optimizer("sgd"), sgd_lr=0.1) if name == "wide" else task

    def with_optimizer(self, name: str) -> Task:
        """The task with ``adam``, or with ``sgd`` and the papers' weight decay where the task has none."""
        decay = self.weight_decay or 5e-4 if name == "sgd" else self.weight_decay
        return replace(self, optimizer=name, weight_decay=decay)

    def fake(self) -> TensorDataset:
        """As many examples as the task needs, of noise."""
        size = sum(self.sizes) + (self.population or 0)
        generator = torch.Generator().manual_seed(0)
        if self.network in TEXTS:
            inputs = torch.randint(1, self.inputs, (size, WORDS), generator=generator)
        else:
            inputs = torch.rand(size, self.inputs, 32, 32, generator=generator)
        return TensorDataset(inputs, torch.arange(size) % self.classes)

    def build(self, epochs: int, lr: float | None = None, warmup: int = 0) -> Callable[[], DigitsClassifier]:
        """What builds the untrained module; ``lr``: other than the task's; ``warmup``: epochs, of the digits' alone."""
        if self.optimizer == "sgd" and lr is not None:
            raise SystemExit("other learning rates are there for Adam alone.")
        lr = self.lr if lr is None else lr
        if warmup:
            if self.network != "digits" or self.optimizer != "adam":
                raise SystemExit("a warm-up is there for the digits' network with Adam alone.")
            return functools.partial(WarmedUp, epochs, lr, warmup)
        if self.optimizer == "sgd":
            return functools.partial(WithSGD, self._net(), epochs, self.sgd_lr, self.weight_decay)
        if self.network == "digits":
            return functools.partial(DigitsClassifier, epochs, lr)
        return functools.partial(Classifier, self._net(), epochs, lr, self.weight_decay)

    def _net(self) -> Callable[[], torch.nn.Module]:
        if self.network == "digits":
            return network
        sizes = {"size": 32} if self.network == "vit" and self.inputs == 3 else {}
        return functools.partial(NETWORKS[self.network], self.inputs, self.classes, **sizes)


_WIDE = Task(
    "cifar10", "wide", (25_000, 25_000, 2_000), None, 3, 10, 100, 40, 256, 64, 5e-4,
    augment=True, optimizer="sgd", sgd_lr=0.1,
)  # fmt: skip
_CIFAR = Task("cifar10", "resnet18", (18_000, 18_000, 2_000), None, 3, 10, 100, 40, 256, 8, 5e-4)
SCALES: dict[str, dict[str, Task]] = {
    "cpu": {
        "digits": Task("digits", "digits", (300, 300, 200), None, 1, 10, 60, 40, 32, 32),
        "fashion": Task("fashion", "resnet8", (1_500, 1_500, 1_000), 2_000, 1, 10, 40, 25, 64, 16),
        "tabular": Task("tabular", "mlp", (150, 150, 100), None, 30, 2, 60, 40, 32, 32),
        "news": Task("news", "transformer", (500, 500, 300), None, VOCABULARY, 5, 20, 15, 32, 16, lr=3e-3),
    },
    "gpu": {
        "fashion": Task("fashion", "resnet18", (25_000, 25_000, 10_000), None, 1, 10, 100, 40, 256, 16, 5e-4),
    },
    "paper": {
        "cifar10": _CIFAR,
        "cifar100": replace(_CIFAR, data="cifar100", sizes=(18_000, 18_000, 4_000), classes=100, lam=0.9),
        "cifar10-wide": _WIDE,
        "cinic10": replace(_CIFAR, data="cinic10", sizes=(25_000, 25_000, 5_000)),
        "dbpedia14": Task("dbpedia14", "transformer", (140_000, 140_000, 14_000), None, VOCABULARY, 14, 30, 20, 256, 8),
    },
}


def quick(task: Task) -> Task:
    """Few examples, models and epochs, to try a script."""
    small = {"sizes": (32, 32, 32), "population": 32, "epochs": 2, "tune_epochs": 1, "batch": 16}
    return replace(task, **small, models=8, steps=2)
