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


class Flat:
    """How one example's gradient is scaled, in plain numbers; the other rules of clipping inherit it."""

    def __init__(self, clip):
        self.clip = clip

    def scaled(self, own):
        norm = norm_of(own)
        return {n: g * min(1.0, self.clip / norm) for n, g in own.items()}

    def end_step(self, expected_size):
        pass


class PerLayer(Flat):
    """``clip``: a bound for each layer's name."""

    def scaled(self, own):
        scaled = {}
        for layer, bound in self.clip.items():
            part = {n: g for n, g in own.items() if n.rpartition(".")[0] == layer}
            norm = norm_of(part)
            scaled.update({n: g * (min(1.0, bound / norm) if norm else 0.0) for n, g in part.items()})
        return scaled


class Automatic(Flat):
    def __init__(self, clip, stability):
        super().__init__(clip)
        self.stability = stability

    def scaled(self, own):
        norm = norm_of(own)
        return {n: g * self.clip / (norm + self.stability) for n, g in own.items()}


class Adaptive(Flat):
    """Andrew et al. 2021, Algorithm 1, without noise; an example adds ½ or -½ to the count."""

    def __init__(self, clip, quantile, learning_rate):
        super().__init__(clip)
        self.quantile, self.learning_rate, self.count = quantile, learning_rate, 0.0

    def scaled(self, own):
        self.count += 0.5 if norm_of(own) <= self.clip else -0.5
        return super().scaled(own)

    def end_step(self, expected_size):
        unclipped = 0.5 + self.count / expected_size
        self.clip *= math.exp(-self.learning_rate * (unclipped - self.quantile))
        self.count = 0.0


def norm_of(own):
    return math.sqrt(sum(float(g.square().sum()) for g in own.values()))


def by_hand(model, batches, steps, clip, frozen=None, loss=F.cross_entropy):
    """DP-SGD without noise, one example at a time (Abadi et al. 2016, Algorithm 1)."""
    rule = clip if isinstance(clip, Flat) else Flat(clip)
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
            for n, g in rule.scaled(own).items():
                total[n] += g
        rule.end_step(batches.expected_size)
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
