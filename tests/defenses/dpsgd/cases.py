"""Networks and an oracle for the tests of DP-SGD."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import Classifier, digits, loader


class Conv(Classifier):
    """A classifier that DP-SGD can train as it is."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def fresh(cls=Conv, seed=0, **kwargs):
    torch.manual_seed(seed)
    return cls(**kwargs)


def wide(begin=0, end=96, **kwargs):
    data = digits()[begin:end]
    return DataLoader(TensorDataset(data[0].double(), data[1]), **{"batch_size": 16, **kwargs})


def by_hand(model, batches, steps, clip, frozen=None, loss=F.cross_entropy):
    """DP-SGD without noise, one example at a time (Abadi et al. 2016, Algorithm 1)."""
    optimizer = model.configure_optimizers()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = frozen.masks if frozen else {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    names = [n for n, _ in model.named_parameters()]
    for step in range(steps):
        total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for i in batches.drawn(step):
            x, y = batches.loader.dataset[i]
            value = loss(model(x[None]), torch.tensor([y]))
            own = dict(zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True))
            own = {n: torch.where(masks[n], 0.0, g) for n, g in own.items()}
            norm = math.sqrt(sum(float(g.square().sum()) for g in own.values()))
            for n, g in own.items():
                total[n] += g * min(1.0, clip / norm)
        for n, p in model.named_parameters():
            p.grad = total[n] / batches.expected_size
        optimizer.step()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(torch.where(masks[n], kept[n], p))
    return model.state_dict()


class Tokens(Classifier):
    """A transformer over the rows of an image, with parameters that stand in no layer of their own."""

    def __init__(self):
        super().__init__(optimizer="sgd", lr=0.5)
        self.net = None
        self.scale = nn.Parameter(torch.ones(8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.encoder(x.squeeze(1) * self.scale)[:, 0])


def wide_float():
    return loader(0, 192, shuffle=True)


class Merged(Classifier):
    """Hides that its rows belong together: each would be clipped as if it were an example of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 10)

    def forward(self, x):
        return self.net(x.reshape(-1, 8)).view(len(x), 8, 10).sum(1)
