"""Reconstruct the training digits of a small network from its weights, with three priors, and split one of them.

    python examples/reconstruct_digits.py

A network of 200 ReLUs is trained on 20 digits with weight decay. An attacker who searches near the average digit reads
most of the 20 off the weights, and none of 20 others. One who begins far away finds, in as many steps, inputs that
explain the weights as well as the members do, and are no members. With the range of the pixels and five times the steps
members are found again. That an attack fails says nothing about another prior, or a longer search.

It writes one picture: the members, beside each its nearest reconstruction, and the non-members that came nearest. At
the end it splits one member in two, which changes neither residual nor logits and moves the data arbitrarily far.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from digits import digits, quiet
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf import ReconstructionAuditCallback, ReconstructionPrior, ReconstructionResult
from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.reconstruction import kkt_residual, split


class Pool(NamedTuple):
    """As many members as non-members, the same number of each class, minus the mean image of all other digits."""

    members: TensorDataset
    nonmembers: TensorDataset
    mean: Tensor


def pool(seed: int, size: int = 20) -> Pool:
    """Members and non-members drawn by a seed, images flattened to (size, 64)."""
    images, labels = digits().tensors
    images = images.flatten(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    by_class = [order[labels[order] == c] for c in range(10)]
    each = size // 10
    inside = torch.cat([places[:each] for places in by_class])
    outside = torch.cat([places[each : 2 * each] for places in by_class])
    mean = images[torch.cat([places[2 * each :] for places in by_class])].mean(0)
    members, nonmembers = (TensorDataset(images[places] - mean, labels[places]) for places in (inside, outside))
    return Pool(members, nonmembers, mean)


def network(outputs: int = 10) -> nn.Sequential:
    """64-200-10, homogeneous in its weights: a bias in the first layer alone; it starts from small weights."""
    net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, outputs, bias=False))
    for parameter in net[0].parameters():
        nn.init.normal_(parameter, std=0.01)
    return net


class Victim(LightningModule):
    """An ordinary classifier, trained by SGD with weight decay on whole batches."""

    def __init__(self, weight_decay: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=self.hparams["weight_decay"])


def priors(steps: int) -> dict[str, dict[str, Any]]:
    """Three attackers, by name: the arguments of their audits."""
    return {
        "searches near the mean digit": {"prior": ReconstructionPrior(scale=0.03), "steps": steps},
        "begins far away": {"prior": ReconstructionPrior(scale=1.0), "steps": steps},
        "begins far away, knows the range of a pixel, and searches longer": {
            "prior": ReconstructionPrior(scale=1.0, box=(-0.8, 0.8)),
            "steps": 5 * steps,
        },
    }


def picture(result: ReconstructionResult, mean: Tensor, path: Path) -> None:
    """Members (first row), the reconstruction nearest to each (second), and the three nearest non-members (last)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n, _ = result.examples
    found = result.reconstruction.inputs
    nearest = torch.cdist(result.pool, found).argmin(1)
    others = n + result.scores[n:].argsort(descending=True)[:3]
    columns = [*range(n), *others.tolist()]
    figure, axes = plt.subplots(2, len(columns), figsize=(0.6 * len(columns), 1.6))
    for column, place in enumerate(columns):
        for row, image in enumerate((result.pool[place], found[nearest[place]])):
            axes[row, column].imshow((image + mean).view(8, 8), cmap="gray_r", vmin=0, vmax=1)
            axes[row, column].set(xticks=[], yticks=[])
        claimed = place in result.claimed
        axes[0, column].set_title("non" if place >= n else "hit" if claimed else "", fontsize=6)
    figure.suptitle("first row: members and three non-members; second: the nearest reconstruction", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def split_one(model: nn.Module, members: TensorDataset) -> list[str]:
    """Split the first member along the direction that the first layer sees least, and say what changes."""
    images, labels = (tensor.to(torch.float64 if tensor.is_floating_point() else None) for tensor in members.tensors)
    first = next(p for p in model.parameters() if p.ndim > 1).detach().double()
    direction = torch.linalg.svd(first).Vh[-1]
    size = float(images.norm(dim=1).mean())
    found = kkt_residual(model, images, labels)
    lines = [f"{'distance in norms of a digit':32}residual of the members"]
    lines.append(f"{'not split':32}{found.residual:.4f}")
    for distance in (0.5, 1.0, 5.0):
        halves = split(
            images, labels, found.multipliers, 0, direction, forward=distance * size, backward=distance * size
        )
        lines.append(f"{distance:<32g}{kkt_residual(model, *halves).residual:.4f}")
    return lines


def main(arguments: argparse.Namespace) -> None:
    quiet()
    data = pool(arguments.seed)
    seed_everything(arguments.seed, verbose=False)
    audits = {
        name: ReconstructionAuditCallback(data.nonmembers, name=name, seed=arguments.seed, **settings)
        for name, settings in priors(arguments.attack_steps).items()
    }
    victim = Victim()
    trainer = Trainer(
        max_epochs=arguments.steps,
        accelerator="cpu",
        callbacks=list(audits.values()),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(victim, DataLoader(data.members, batch_size=len(data.members)))
    accuracy = float(collect_outputs(victim, data.members).correct.double().mean())
    print(f"20 digits, {arguments.steps} steps, training accuracy {accuracy:.2f}\n")
    for name, audit in audits.items():
        print(f"An attacker who {name}\n{audit.result}\n")
    path = arguments.out / "reconstructions.png"
    picture(audits["searches near the mean digit"].result, data.mean, path)
    print("One member split along the direction that the first layer sees least:")
    print("\n".join(split_one(victim, data.members)))
    print(f"\nsaved: {path}")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000, help="of the training")
    parser.add_argument(
        "--attack-steps", type=int, default=2000, help="of the first two attacks; five times as many of the third"
    )
    parser.add_argument("--out", type=Path, default=Path("out/reconstruct"))
    parser.add_argument(
        "--quick", action="store_true", help="300 steps of training and 200 of the attack: seconds, and weaker"
    )
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.steps, arguments.attack_steps = 300, 200
    return arguments


if __name__ == "__main__":
    main(parse_arguments())
