"""Private fine-tuning of a whole network under shifted inputs: the exponential mechanism beside DP-SGD.

A network 64-16-10 (1,210 weights) is trained on 897 upright digits, which are public. The private data are 720 other
digits, rotated by 60 degrees, and the test 180 more of these. δ = 1e-5, one image more or less; means over seeds. Each
row has, for each ε, the settings with the best mean test accuracy. DP-SGD: 20 epochs of Poisson batches at a rate of
1/8, σ from Opacus' PRV accountant.

    python benchmarks/exponential_whole.py [--seeds 2]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from exponential import grid, sigma
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import rotate

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from digits import digits
from private_finetuning import DELTA, PASSES

from lightning_cwrf.mechanism import PublicCurvature, example_gradients, exponential_mechanism, public_curvature
from lightning_cwrf.mechanism.parameters import flat, write

EPSILONS = (0.5, 2.0, 8.0)
EPOCHS = 20
Data = tuple[Tensor, Tensor]
CURVATURES: dict[tuple[int, float, int | None], PublicCurvature] = {}


class Task(NamedTuple):
    """Pretrained weights, and the three parts of the data."""

    seed: int
    weights: dict[str, Tensor]
    public: Data
    private: Data
    test: Data

    def model(self) -> nn.Module:
        model = network()
        model.load_state_dict(self.weights)
        return model.eval()

    def accuracy(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(self.test[0]).argmax(1) == self.test[1]).float().mean())


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def task(seed: int) -> Task:
    torch.manual_seed(seed)
    images, labels = digits().tensors
    order = torch.randperm(len(images))
    parts = [(images[places], labels[places]) for places in order.split([897, 720, 180])]
    model, (inputs, targets) = network(), parts[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        for places in torch.randperm(len(inputs)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[places]), targets[places]).backward()
            optimizer.step()
    turned = [(rotate(x, 60), y) for x, y in parts[1:]]
    return Task(seed, model.state_dict(), parts[0], *turned)


def by_draws(of: Task, epsilon: float, damping: float, subspace: int | None = None, **settings: Any) -> float:
    key = (of.seed, damping, subspace)  # the curvature sees nothing that is private
    if key not in CURVATURES:
        CURVATURES[key] = public_curvature(
            of.model(), [of.public], parameters="all", damping=damping, subspace=subspace
        )
    return drawn(of, of.model(), CURVATURES[key], epsilon, **settings)


def without_curvature(of: Task, epsilon: float, **settings: Any) -> float:
    model = of.model()
    names = [name for name, _ in model.named_parameters()]
    norm = float(example_gradients(model, of.public, names).norm(dim=1).quantile(0.9))
    identity = torch.eye(len(flat(model, names)), dtype=torch.float64)
    return drawn(of, model, PublicCurvature(identity, norm, names), epsilon, **settings)


def drawn(of: Task, model: nn.Module, curvature: PublicCurvature, epsilon: float, **settings: Any) -> float:
    try:
        private = TensorDataset(*of.private)
        exponential_mechanism(model, private, curvature, target_epsilon=epsilon, target_delta=DELTA, **settings)
    except ValueError as error:  # some settings diverge, which is what this is about
        if "not finite" not in str(error) and "infinite" not in str(error):
            raise
        return 0.0
    return of.accuracy(model)


def dpsgd(of: Task, epsilon: float, lr: float, clip: float) -> float:
    model = of.model()
    names = [name for name, _ in model.named_parameters()]
    weights, (inputs, targets) = flat(model, names), of.private
    expected, noise = len(inputs) / PASSES, sigma(epsilon, EPOCHS) * clip
    for _ in range(EPOCHS * PASSES):
        places = (torch.rand(len(inputs)) < 1 / PASSES).nonzero()[:, 0]
        gradients = example_gradients(model, (inputs[places], targets[places]), names, weights).double()
        total = (gradients * (clip / gradients.norm(dim=1, keepdim=True)).clamp_max(1.0)).sum(0)
        weights = weights - lr * (total + noise * torch.randn_like(weights)) / expected
    write(model, names, weights)
    return of.accuracy(model)


WAYS: dict[str, tuple[Callable[..., float], list[dict[str, Any]]]] = {
    "not fine-tuned": (lambda of, epsilon: of.accuracy(of.model()), [{}]),
    "defaults on all weights (10 draws, damping 0.003)": (by_draws, [{"damping": 3e-3}]),
    "20 draws, all weights": (by_draws, grid(draws=[20], eta=[0.3], damping=(1.0, 10.0))),
    "20 draws, 200 random directions": (by_draws, grid(draws=[20], subspace=[200], eta=[0.3], damping=(0.1, 1.0))),
    "20 draws without curvature (H = I)": (without_curvature, grid(draws=[20], eta=(0.1, 1.0))),
    "DP-SGD": (dpsgd, grid(lr=(0.1, 0.3, 1.0), clip=[1.0])),
}


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    tasks = [task(seed) for seed in range(arguments.seeds)]
    print("| way | " + " | ".join(f"ε = {epsilon:g}" for epsilon in EPSILONS) + " | settings |")
    print("|---" * (2 + len(EPSILONS)) + "|", flush=True)
    for name, (run, settings) in WAYS.items():
        found = torch.zeros(len(EPSILONS), len(settings), len(tasks))
        for i, epsilon in enumerate(EPSILONS):
            for j, each in enumerate(settings):
                for k, of in enumerate(tasks):
                    torch.manual_seed(k)
                    found[i, j, k] = run(of, epsilon, **each)
        means, errors = found.mean(2), found.std(2) / len(tasks) ** 0.5
        picks = means.argmax(1).tolist()
        cells = [f"{means[i, j]:.3f} ± {errors[i, j]:.3f}" for i, j in enumerate(picks)]
        told = "; ".join(", ".join(f"{k}={v:g}" for k, v in settings[j].items()) for j in picks)
        print(f"| {name} | {' | '.join(cells)} | {told} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    main(parser.parse_args())
