"""How many members a reconstruction gives back, by prior and by length of training: the figures of its page.

The victim of ``examples/reconstruct_digits.py``: 20 digits, 64-200-10, SGD on whole batches with weight decay 1e-3. For
each row, hits of members and of as many non-members, the AUC of the distances, the attack's residual and that of the
members themselves, by seed; then other lengths, weight decays and sizes, a secret offset of the inputs, and a network
with one output. At the end one member is split. About half an hour of one core.

    python benchmarks/reconstruction.py
    python benchmarks/reconstruction.py --seeds 1 --lengths 150 4000 --decays --sizes --no-priors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from reconstruct_digits import network, pool, split_one

from lightning_cwrf import ReconstructionPrior, ReconstructionResult, audit_reconstruction

PRIORS = {
    "scale .03": ({"scale": 0.03}, 2_000),
    "scale .3": ({"scale": 0.3}, 2_000),
    "scale 1": ({"scale": 1.0}, 2_000),
    "scale 1, five times the steps": ({"scale": 1.0}, 10_000),
    "the same with box ±.8": ({"scale": 1.0, "box": (-0.8, 0.8)}, 10_000),
    "centre wrong by 5": ({"scale": 0.03, "center": 5 / 8}, 2_000),  # ‖c‖ = 5 in 64 coordinates
}
WEIGHT_DECAY = 1e-3
OFFSET = 5 / 8  # in each coordinate: ‖b‖ = 5, about twice the norm of a digit
Sides = tuple[TensorDataset, TensorDataset]


def sides(seed: int, size: int = 20, offset: float = 0.0, parity: bool = False) -> Sides:
    """Members and non-members; ``parity``: labelled by odd or even, for a network with one output."""
    data = pool(seed, size)
    made = []
    for part in (data.members, data.nonmembers):
        images, labels = part.tensors
        made.append(TensorDataset(images + offset, labels % 2 if parity else labels))
    return made[0], made[1]


def victim(seed: int, steps: int, data: Sides, weight_decay: float = WEIGHT_DECAY, outputs: int = 10) -> nn.Module:
    """The network after so many steps of SGD, in a bare loop."""
    images, labels = data[0].tensors
    torch.manual_seed(seed)
    net = network(outputs)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = net(images)
        if outputs == 1:
            F.binary_cross_entropy_with_logits(logits[:, 0], labels.float()).backward()
        else:
            F.cross_entropy(logits, labels).backward()
        optimizer.step()
    return net


def attack(
    net: nn.Module, seed: int, data: Sides, *, steps: int = 2_000, weight_decay: float = WEIGHT_DECAY, **prior: object
) -> ReconstructionResult:
    return audit_reconstruction(
        net,
        members=data[0],
        nonmembers=data[1],
        prior=ReconstructionPrior(**{"scale": 0.03, **prior}),  # type: ignore[arg-type]
        weight_decay=weight_decay,
        steps=steps,
        seed=seed,
    )


def row(name: str, results: Sequence[ReconstructionResult]) -> str:
    """One line of Markdown: what each seed gave, or the means of many."""

    def shown(values: Sequence[float], digits: int) -> str:
        return ", ".join(f"{value:.{digits}f}" for value in values)

    cells = [
        name,
        ", ".join(f"{each.hits[0]} : {each.hits[1]}" for each in results),
        f"{fmean(each.hits[0] for each in results):.1f}",
        shown([each.estimates["auroc"].value for each in results], 2),
        shown([each.reconstruction.residual for each in results], 4),
        shown([each.truth_residual for each in results], 3),
        ", ".join(str(each.gate_patterns) for each in results),
    ]
    return f"| {' | '.join(cells)} |"


HEADINGS = ("", "hits : non-members", "mean", "AUC", "residual", "of the members", "gate patterns")


def main(arguments: argparse.Namespace) -> None:
    print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}")
    data = {seed: sides(seed) for seed in range(arguments.seeds)}
    for length in arguments.lengths:
        found = [attack(victim(seed, length, each), seed, each) for seed, each in data.items()]
        print(row(f"{length:,} steps of training, scale .03", found), flush=True)
    for decay in arguments.decays:
        found = [
            attack(victim(seed, 4_000, each, decay), seed, each, weight_decay=decay) for seed, each in data.items()
        ]
        print(row(f"4,000 steps, weight decay {decay:g}, scale .03", found), flush=True)
    for size in arguments.sizes:
        larger = {seed: sides(seed, size) for seed in list(data)[:2]}
        found = [attack(victim(seed, 4_000, each), seed, each) for seed, each in larger.items()]
        print(row(f"4,000 steps, scale .03, {size} members", found), flush=True)
    if not arguments.priors:
        return
    nets = {seed: victim(seed, 4_000, each) for seed, each in data.items()}
    for name, (prior, steps) in PRIORS.items():
        found = [attack(net, seed, data[seed], steps=steps, **prior) for seed, net in nets.items()]
        print(row(f"4,000 steps, {name}", found), flush=True)
    moved = {seed: sides(seed, offset=OFFSET) for seed in data}
    nets_moved = {seed: victim(seed, 4_000, each) for seed, each in moved.items()}
    for name, center in (("secret", 0.0), ("known", OFFSET)):
        found = [attack(net, seed, moved[seed], center=center) for seed, net in nets_moved.items()]
        print(row(f"4,000 steps on data with an offset of norm 5, {name}; scale .03", found), flush=True)
    odd = {seed: sides(seed, parity=True) for seed in data}
    found = [attack(victim(seed, 4_000, each, outputs=1), seed, each) for seed, each in odd.items()]
    print(row("4,000 steps, one output (odd or even), scale .03", found), flush=True)
    print()
    print("\n".join(split_one(nets[0], pool(0).members)))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="of all rows; those on size have at most two")
    parser.add_argument("--lengths", type=int, nargs="*", default=[0, 30, 150, 500, 1_500, 4_000, 20_000, 60_000])
    parser.add_argument("--decays", type=float, nargs="*", default=[0.0, 1e-4, 1e-2, 3e-2], help="of weights")
    parser.add_argument("--sizes", type=int, nargs="*", default=[40, 100], help="members, a multiple of ten")
    parser.add_argument("--no-priors", dest="priors", action="store_false", help="leave out priors and split")
    return parser.parse_args(words)


if __name__ == "__main__":
    main(parse_arguments())
