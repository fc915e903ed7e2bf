"""Small real things that the tests share: digits, a classifier, quiet trainers."""

import functools
import importlib.util
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_cwrf import RelaxLossMixin
from lightning_cwrf.data import isolated_rng
from lightning_cwrf.weights.vanilla import capture


@functools.cache
def digits():
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return TensorDataset(images, torch.tensor(data.target))


def part(begin, end):
    return Subset(digits(), list(range(begin, end)))


def loader(begin, end, batch_size=16, shuffle=False):
    return DataLoader(part(begin, end), batch_size=batch_size, shuffle=shuffle)


class Classifier(LightningModule):
    """A user's module: BatchNorm, dropout, own logging, own validation; nothing of the package."""

    def __init__(self, width=8, lr=1e-2, optimizer="adam"):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(width * 16, 10),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("own_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return OPTIMIZERS[self.hparams.optimizer](self.parameters(), self.hparams.lr)


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p, lr: torch.optim.Adam(p, lr, weight_decay=1e-2),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=1e-1),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr, momentum=0.9, weight_decay=1e-2),
    "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr, weight_decay=1e-2),
    "lbfgs": lambda p, lr: torch.optim.LBFGS(p, lr, max_iter=3),
}


class ManualClassifier(Classifier):
    """Manual optimization with two optimizers, one of which is stepped past Lightning's wrapper."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self):
        body, head = self.net[:4].parameters(), self.net[4:].parameters()
        return [OPTIMIZERS["adamw"](body, 1e-2), OPTIMIZERS["sgd"](head, 1e-2)]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        second.optimizer.step()


def trainer(tmp_path=None, **kwargs):
    settings = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    if tmp_path is not None:
        settings["default_root_dir"] = tmp_path
    return Trainer(**{**settings, **kwargs})


def trained(seed=0, epochs=2, cls=Classifier, optimizer="adam", **kwargs):
    """A finished model and its vanilla weights: new ones in each call, of one training for all.

    It was trained with the default optimizer, which ``optimizer`` replaces in further fits.
    """
    vanilla, weights, grads = _training(cls, seed, epochs, tuple(kwargs.items()))
    torch.manual_seed(seed)
    model = cls(optimizer=optimizer, **kwargs)
    model.load_state_dict(weights)
    for name, p in model.named_parameters():
        p.grad = None if grads[name] is None else grads[name].clone()
    return model, {name: value.clone() for name, value in vanilla.items()}


@functools.cache
def _training(cls, seed, epochs, kwargs):
    """The weights before and after a training on the digits 0 to 64, and the gradients that it left."""
    with isolated_rng():
        torch.manual_seed(seed)
        model = cls(**dict(kwargs))
        vanilla = capture(model)
        trainer(max_epochs=epochs).fit(model, loader(0, 64, shuffle=True))
    return vanilla, capture(model), {name: p.grad for name, p in model.named_parameters()}


def snapshot(model):
    """Everything about a module that a visitor must leave as it was."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "requires": {name: p.requires_grad for name, p in model.named_parameters()},
        "ids": {name: id(p) for name, p in model.named_parameters()},
    }


def same_snapshot(a, b):
    for name in a["state"]:
        assert torch.equal(a["state"][name], b["state"][name]), name
    for name, grad in a["grads"].items():
        other = b["grads"][name]
        assert (grad is None) == (other is None), name
        assert grad is None or torch.equal(grad, other), name
    assert a["modes"] == b["modes"]
    assert a["requires"] == b["requires"]
    assert a["ids"] == b["ids"]


class HardenedClassifier(RelaxLossMixin, Classifier):
    """The classifier with its defense, as a class that a YAML file can name."""


class DigitsData(LightningDataModule):
    def train_dataloader(self):
        return loader(0, 64)


class DigitsReference(Dataset):
    """Forty examples, from 100 on, as a data set that a YAML file can name."""

    def __init__(self, begin: int = 100) -> None:
        self.begin = begin

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return digits()[self.begin + i]


def load_benchmark(name):
    """A script of benchmarks/ as a module; other packages install a ``benchmarks`` of their own."""
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUIET_TRAINER = """\
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""
"""The Trainer of one epoch in a YAML file; its callbacks are added below."""
