"""What a step adds for an example is its own gradient, and never longer than the clip norm."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_cwrf.defenses import DPSGD
from lightning_cwrf.defenses.dpsgd.clipping import Clipping
from lightning_cwrf.defenses.dpsgd.step import _gradients


def summed(net, losses, clip=1e-3, ghost=True):
    """The norm of the sum of the clipped gradients, in units of the clip norm."""
    names = {p: n for n, p in net.named_parameters() if p.requires_grad}
    gradients = _gradients(net, names, {}, DPSGD(noise_multiplier=1.0, ghost=ghost))
    gradients.watch()
    sums = gradients.sums(losses(), lambda loss, **k: loss.backward(**k), Clipping(clip))
    gradients.clear()
    gradients.remove()
    return float(torch.cat([s.flatten() for s in sums]).norm()) / clip


class Pool(nn.Module):
    """Attention pooling: the gradients of the positions' scores sum to zero, so a constant of the inputs cancels."""

    def __init__(self, two_pass):
        super().__init__()
        self.score, self.head = nn.Linear(64, 8), nn.Linear(64, 3).requires_grad_(False)
        self.extra = nn.PReLU() if two_pass else None

    def forward(self, x):
        logits = self.head((self.score(x).softmax(1).mean(2, keepdim=True) * x).sum(1))
        return logits if self.extra is None else logits + 1e-9 * self.extra(-torch.ones(len(x), 3))


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_ghost_norms_do_not_cancel(offset, two_pass):
    torch.manual_seed(0)
    net = Pool(two_pass)
    for _ in range(8):
        x = torch.randn(1, 4, 64) + offset
        found = summed(net, lambda x=x: F.cross_entropy(net(x), torch.tensor([0]), reduction="none"), 1e-6)
        assert found <= 1.01


@pytest.mark.parametrize("padding", ["same", 1])
def test_hooks_of_the_user_act_once(padding):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 32, 3, padding=padding), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(32, 3).requires_grad_(False))
    calls = []
    net[0].register_forward_hook(lambda layer, inputs, output: calls.append(1) or output * 10)
    x = torch.randn(1, 4, 3, 3)
    assert summed(net, lambda: F.cross_entropy(net(x), torch.tensor([0]), reduction="none")) == pytest.approx(
        1, abs=0.01
    )
    assert len(calls) == 1
