"""Models, masks and batches that the tests of weights share."""

import torch
from torch import nn
from torch.nn import functional as F

from lightning_cwrf.weights.masks import WeightMask
from tests.helpers import loader


def batches(begin, end, size=8):
    return list(loader(begin, end, size))


def linear_case():
    members = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    reference = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    return nn.Linear(4, 3), nn.Linear(4, 3), members, reference


class Detached(nn.Module):
    """Uses its weight a second time, detached: the old value is needed when its gradient is known already."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 3)

    def forward(self, x):
        # The way back comes to a's gradient first, and to the detached use, which first's gradient needs, after it.
        return self.b(torch.tanh(self.a(F.linear(self.first(x), self.a.weight.detach()))))


class Counting(nn.Linear):
    def forward(self, x):
        self.sizes.append(len(x))
        return super().forward(x)

    sizes = []


def random_case(layout=torch.contiguous_format):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4)).to(memory_format=layout)
    vanilla = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    scores = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    return model, vanilla, WeightMask.top(scores, 0.3)


def frozen_case():
    model, vanilla, mask = random_case()
    mask.rewind_(model, vanilla)
    return model, vanilla, mask
