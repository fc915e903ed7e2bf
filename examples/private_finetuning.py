"""Private fine-tuning of a new head on handwritten digits: a few draws with public curvature, beside DP-SGD.

A small network is trained on the digits 0 to 4, which are public here. Its body is kept, and a new head learns the
digits 5 to 9, which are private: 716 images, 180 for the test. Three ways at each ε (δ = 1e-5, one image more or less):
``ExponentialMechanismCallback`` with its defaults; DP-SGD on the same head; and DP-SGD on the body's features whitened
by the public digits, which takes the same from the public data. DP-SGD has one setting for all ε, the best for most of
them in ``benchmarks/exponential.py``, which has settings for each ε, 80 epochs too, and parts of the mechanism taken
away.

    python examples/private_finetuning.py --epsilon 0.5 1 2 4 8 --seeds 3 --out out/private   # a few minutes
    python examples/private_finetuning.py --quick --out out/private                           # a minute
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from digits import digits, quiet
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf import ExponentialMechanismCallback
from lightning_cwrf.defenses import DPSGDMixin, PrivacySpent

DELTA = 1e-5
TEST = 180
PASSES = 8  # steps of DP-SGD in an epoch: each example is drawn with probability 1/8
FEATURES, CLASSES = 64, 5
EPOCHS = 5  # of the first training; a longer one leaves features that tell the new classes apart less well
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
DPSGD_SETTINGS = {"plain": {"lr": 0.1, "clip": 10.0, "epochs": 20}, "whitened": {"lr": 0.3, "clip": 1.0, "epochs": 20}}


class Classifier(LightningModule):
    """An ordinary classifier: a body, and a head of five classes."""

    def __init__(self, lr: float = 1e-3, pixels: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, CLASSES)
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class NewHead(Classifier):
    """The same with a new head of zeros on a frozen body, which is what DP-SGD trains."""

    def __init__(self, body: nn.Module, lr: float = 1e-3) -> None:
        super().__init__(lr)
        self.body = copy.deepcopy(body).requires_grad_(False)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=self.lr)


class Task(NamedTuple):
    """A pretrained body, the public digits, and the private ones."""

    body: nn.Module
    public: TensorDataset
    private: TensorDataset
    test: TensorDataset


def task(seed: int, data: TensorDataset | None = None, test: int = TEST) -> Task:
    """Digits 0 to 4 and a body that was trained on them; digits 5 to 9 with the labels 0 to 4, divided by a seed.

    ``data``: other digits than the default ones, of which ``test`` private ones are for the test.
    """
    images, labels = (digits() if data is None else data).tensors
    new = labels >= CLASSES
    places = torch.randperm(int(new.sum()), generator=torch.Generator().manual_seed(seed))
    private_images, private_labels = images[new][places], labels[new][places] - CLASSES
    public = TensorDataset(images[~new], labels[~new])
    lightning.seed_everything(seed, verbose=False)
    first = Classifier(pixels=images[0].numel())
    fit(first, public, 32, epochs=EPOCHS)
    return Task(
        first.body.eval(),
        public,
        TensorDataset(private_images[test:], private_labels[test:]),
        TensorDataset(private_images[:test], private_labels[:test]),
    )


def fit(
    model: LightningModule, data: TensorDataset, batch: int, epochs: int, callbacks: Sequence[Callback] = ()
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=batch, shuffle=True))


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def by_draws(of: Task, epsilon: float, **settings: Any) -> tuple[float, PrivacySpent]:
    """Test accuracy after the draws, and what they spent."""
    model = NewHead(of.body)
    callback = ExponentialMechanismCallback(
        DataLoader(of.public, batch_size=256), target_epsilon=epsilon, target_delta=DELTA, **settings
    )
    fit(model, of.private, len(of.private), 1, [callback])
    assert callback.privacy_spent is not None
    return accuracy(model, of.test), callback.privacy_spent


def by_dpsgd(
    of: Task, epsilon: float, *, lr: float, clip: float, epochs: int, accountant: str = "prv"
) -> tuple[float, PrivacySpent]:
    """Test accuracy after DP-SGD on the head, and what it spent."""
    model: Any = NewHead(of.body, lr)
    private = DPSGDMixin.attach(
        model, target_epsilon=epsilon, target_delta=DELTA, max_grad_norm=clip, accountant=accountant
    )
    fit(private, of.private, -(-len(of.private) // PASSES), epochs)
    return accuracy(private, of.test), private.privacy_spent


def whitened(of: Task, damping: float = 3e-3) -> Task:
    """The task with a further fixed layer, after which the public features have the identity as second moments."""
    with torch.no_grad():
        features = of.body(of.public.tensors[0]).double()
    moments = features.mT @ features / len(features)
    moments += damping * moments.trace() / FEATURES * torch.eye(FEATURES, dtype=torch.float64)
    layer = nn.Linear(FEATURES, FEATURES, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.inv(torch.linalg.cholesky(moments)))
    return of._replace(body=nn.Sequential(of.body, layer))


def main(arguments: argparse.Namespace) -> None:
    quiet()
    torch.set_num_threads(1)  # the network is too small for a second thread to help
    ways = ("exponential mechanism", "DP-SGD", "DP-SGD on whitened features")
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    spent: dict[str, PrivacySpent] = {}
    for seed in range(arguments.seeds):
        of = task(seed)
        both = {ways[1]: (of, DPSGD_SETTINGS["plain"]), ways[2]: (whitened(of), DPSGD_SETTINGS["whitened"])}
        for way in ways:
            row = []
            for epsilon in arguments.epsilon:
                lightning.seed_everything(seed, verbose=False)
                if way in both:
                    which, settings = both[way]
                    settings = {**settings, "epochs": 2, "accountant": "rdp"} if arguments.quick else settings
                    reached, spent[way] = by_dpsgd(which, epsilon, **settings)
                else:
                    reached, spent[way] = by_draws(of, epsilon)
                row.append(reached)
            found[way].append(row)
    lines = ["| test accuracy at ε = | " + " | ".join(f"{epsilon:g}" for epsilon in arguments.epsilon) + " |"]
    lines.append("|---" * (1 + len(arguments.epsilon)) + "|")
    for way in ways:
        means = torch.tensor(found[way]).mean(0).tolist()
        lines.append(f"| {way} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    table = "\n".join(lines)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    for way in ways:
        print(f"{way}, the last: {spent[way]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epsilon", type=float, nargs="+", default=None, help="the ε of each column")
    parser.add_argument("--seeds", type=int, default=None, help="the mean is over so many divisions and trainings")
    parser.add_argument("--out", type=Path, default=Path("out/private"), help="where table.md is written")
    parser.add_argument("--quick", action="store_true", help="one seed, ε = 2, 2 epochs of DP-SGD")
    chosen = parser.parse_args()
    chosen.epsilon = chosen.epsilon or ([2.0] if chosen.quick else list(EPSILONS))
    chosen.seeds = chosen.seeds or (1 if chosen.quick else 3)
    main(chosen)
