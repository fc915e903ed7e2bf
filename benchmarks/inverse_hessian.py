"""The inverse Hessian attack against the loss attack, on small networks.

A network of one hidden layer (16 units) is trained by SGD on 100 digits, to a loss near zero; 100 others are the
non-members. The AUCs of three such networks. The attacker of the inverse Hessian attack knows the weights and all the
other training examples, that of the loss attack one output at a time.

    python benchmarks/inverse_hessian.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from digits import digits

from lightning_cwrf.attacks import example_losses, inverse_hessian_attack
from lightning_cwrf.metrics.functional import membership_auroc


def aucs(seed: int) -> tuple[float, float]:
    images, labels = digits()[:]
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    members, others = (TensorDataset(images[rows].flatten(1), labels[rows]) for rows in (order[:100], order[100:200]))
    x, y = members.tensors
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(300):
        for rows in torch.randperm(100).split(25):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    scores = inverse_hessian_attack(model, members, others, learning_rate=0.1, momentum=0.9)
    is_member = torch.arange(200) < 100
    with torch.no_grad():
        logits = model(torch.cat([x, others.tensors[0]]))
    losses = example_losses(logits, torch.cat([y, others.tensors[1]]))
    return float(membership_auroc(torch.cat(scores), is_member)), float(membership_auroc(-losses, is_member))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in range(3):
        print("seed {}: inverse Hessian {:.3f}, loss {:.3f}".format(seed, *aucs(seed)))
