"""Audit DP-SGD with canaries in one training, by someone who sees every noisy gradient.

    python examples/audit_dpsgd.py

The accountant's ε is an upper bound that assumes a right implementation; this is a lower bound that does not. Each of
m canaries is included with probability 1/2, and the gradient of each lies on a coordinate of its own (a Dirac canary,
Nasr et al. 2023), which has a learning rate of 0, so that the model trains as it does without. The auditor reads these
coordinates at every step, and scores each canary by the likelihood ratio of its noisy gradients. A bound above the
accountant's ε would show a fault: in the sampling, the clipping, the noise, or the accounting.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from digits import digits
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf.defenses import DPSGD
from lightning_cwrf.metrics.functional import gaussian_epsilon, mu_lower_bound, one_run_mu

PIXELS, STRONG = 64, 1e6


class Audited(LightningModule):
    """A classifier of digits, and one more weight for each canary."""

    def __init__(self, canaries: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(PIXELS, 32), nn.ReLU(), nn.Linear(32, 10))
        self.marks = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self.marks.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs[:, :PIXELS])
        return torch.cat([logits[:, :1] + self.marks(inputs[:, PIXELS:]), logits[:, 1:]], 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": self.network.parameters()},
            {"params": self.marks.parameters(), "lr": 0.0},
        ]
        return torch.optim.SGD(groups, 0.5)


class Observer(Callback):
    """Sums, over the steps, each canary's log likelihood ratio: included or not, given its noisy gradient."""

    def __init__(self, canaries: int) -> None:
        self.scores = torch.zeros(canaries, dtype=torch.float64)

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.sensitivity = module.defense_state.step.clipping.sensitivity  # adaptive clipping moves it after a step

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        state = module.defense_state
        step, rate, size = state.step, state.batches.sample_rate, state.batches.expected_size
        noise = step.clipping.gradient_noise(step.noise_multiplier())
        # Sensitivity 1: N(1, noise²) where the canary is in the batch, N(0, noise²) where it is not.
        seen = -module.marks.weight.grad[0].double() * size / self.sensitivity
        ratio = (seen - 0.5) / noise**2
        self.scores += torch.log1p(rate * torch.expm1(ratio))


def audit(arguments: argparse.Namespace) -> dict[str, float]:
    """The accountant's ε, and lower bounds on it from one training."""
    torch.manual_seed(arguments.seed)
    m, data = arguments.canaries, digits()
    images, labels = data.tensors[0].flatten(1)[: arguments.examples], data.tensors[1][: arguments.examples]
    included = torch.rand(m) < 0.5
    # A canary is a black image with a strong input of its own, and the label whose logit it would raise.
    canaries = torch.cat([torch.zeros(m, PIXELS), STRONG * torch.eye(m)], 1)[included]
    inputs = torch.cat([torch.cat([images, torch.zeros(len(images), m)], 1), canaries])
    targets = torch.cat([labels, torch.zeros(len(canaries), dtype=labels.dtype)])
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=math.ceil(len(inputs) / arguments.steps_per_epoch))

    observer = Observer(m)
    defense = DPSGD(
        noise_multiplier=arguments.noise,
        target_delta=arguments.delta,
        clipping=arguments.clipping,
        max_grad_norm=1.0,
        accountant="rdp",  # "prv" is tighter by some per cent, and slower at each epoch's end
        from_scratch=True,
    )
    model: Any = defense.attach(Audited(m))
    Trainer(
        accelerator="cpu",
        max_epochs=arguments.epochs,
        callbacks=[observer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, loader)
    # The first bound holds however canaries depend on one another. The second takes each for a training of its own,
    # which it is here: its coordinate has draws of its own in sampling and noise. Both take DP-SGD for Gaussian DP.
    one_run, independent = one_run_mu(observer.scores, included), mu_lower_bound(observer.scores, included)
    return {
        "accountant": model.privacy_spent.epsilon,
        "one run": gaussian_epsilon(one_run, arguments.delta),
        "independent": gaussian_epsilon(independent, arguments.delta),
        "steps": model.privacy_spent.steps,
    }


def main(arguments: argparse.Namespace) -> None:
    found = audit(arguments)
    print(f"clipping {arguments.clipping}, σ = {arguments.noise:g}, {found['steps']} steps, δ = {arguments.delta:g}")
    print(f"the accountant: ε ≤ {found['accountant']:.2f}")
    print(f"one training, {arguments.canaries} canaries, 95 % confidence, taken for Gaussian DP:")
    for name, text in (("one run", "however they depend on one another"), ("independent", "canaries are independent")):
        share = f" (the accountant's is {found['accountant'] / found[name]:.2f} times it)" if found[name] else ""
        print(f"  ε ≥ {found[name]:.2f}, {text}{share}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=1000, help="digits that are trained on besides the canaries")
    parser.add_argument("--noise", type=float, default=4.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--clipping", default="flat", choices=["flat", "automatic", "adaptive"])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--steps-per-epoch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
