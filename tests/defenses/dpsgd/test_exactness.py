"""What a step adds for an example is its own gradient, and never longer than the clip norm."""

import warnings

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf.defenses import DPSGD, DPSGDMixin
from lightning_cwrf.defenses.dpsgd.clipping import Clipping
from lightning_cwrf.defenses.dpsgd.step import _gradients
from tests.helpers import Classifier, trainer


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


@pytest.mark.parametrize(("two_pass", "offset"), [(False, 1e3), (False, 1e4), (True, 300)])
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


class Net(Classifier):
    def __init__(self, *layers):
        super().__init__(optimizer="sgd", lr=1.0)
        self.net = nn.Sequential(*layers)


class Reused(Net):
    """A weight that is also used outside of its layer."""

    def __init__(self):
        super().__init__(nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(F.linear(self.net(x).tanh(), self.net[0].weight).tanh())


class Tied(Net):
    """An embedding whose weight is the head's as well."""

    def __init__(self):
        super().__init__(nn.Linear(6, 6))
        self.words = nn.Embedding(10, 6)

    def forward(self, x):
        return F.linear(self.net(self.words(x).mean(1)).tanh(), self.words.weight)[:, :3]


class Average(nn.Module):
    """Keeps a moving average of its input, or counts the steps."""

    def __init__(self, counts=False):
        super().__init__()
        self.counts = counts
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean += 1.0 if self.counts else 0.1 * (x.detach().mean() - self.mean)
        return x - self.mean.clone()


class Clamped(nn.Module):
    """Writes into a weight of another layer in its forward pass."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.rand(200, 6) + 1, requires_grad=False)

    def forward(self, x):
        return F.embedding(x, self.rows, max_norm=1.0).mean(1)


def words(different=10):
    return torch.randint(0, different, (32, 5))


def fit(model, x=None, steps=1, **settings):
    torch.manual_seed(0)
    x = torch.randn(32, 6) if x is None else x
    DPSGDMixin.attach(model, **{"noise_multiplier": 1.0, "accountant": "rdp", "target_delta": 1e-3, **settings})
    loader = DataLoader(TensorDataset(x, torch.arange(len(x)) % 3), batch_size=len(x))
    trainer(max_steps=steps).fit(model, loader)
    return model


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize(("make", "x", "name"), [(Reused, None, r"net\.0\.weight"), (Tied, words, r"words\.weight")])
def test_gradients_that_are_not_those_of_autograd_raise_by_name(make, x, name, ghost):
    torch.manual_seed(0)
    with pytest.raises(MisconfigurationException, match=rf"takes of {name} are not those of autograd"):
        fit(make(), x and x(), ghost=ghost)


class TiedLayers(Classifier):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
        self.net[2].weight = self.net[0].weight


class ByKeyword(nn.Module):
    """The layer inside is called with a keyword."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(input=x)


def keyword():
    return Net(ByKeyword(), nn.Linear(6, 3))


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return Net(torch.nn.utils.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("make", "ghost", "message"),
    [
        (TiedLayers, True, r"Parameter tying is not supported.*tied ones work without ghost=True.*Or leave out ghost="),
        (keyword, True, "one input, as a positional argument"),
        (keyword, False, "one input, as a positional argument"),
        (old_weight_norm, False, r"its successor in torch\.nn\.utils\.parametrizations does"),
    ],
)
def test_layers_that_opacus_fails_on_raise_with_the_fix(make, ghost, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(make(), ghost=ghost)


@pytest.mark.parametrize(
    ("make", "ghost"),
    [
        (TiedLayers, False),
        (lambda: Net(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3)), True),
    ],
)
def test_what_the_messages_say_works(make, ghost):
    assert fit(make(), ghost=ghost).privacy_spent.steps == 1


def test_two_passes_that_round_differently_raise():
    model = Net()
    model.net = Pool(two_pass=True)
    with pytest.raises(MisconfigurationException, match=r"small differences of large numbers.*leave out ghost=True"):
        fit(model, torch.randn(16, 4, 64) + 1e5, ghost=True)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(10, 6, max_norm=1.0), r"Embedding\(max_norm"),
        (nn.Embedding(10, 6, max_norm=1.0).requires_grad_(False), r"Embedding\(max_norm"),
        (nn.EmbeddingBag(10, 6, max_norm=1.0), r"EmbeddingBag\(max_norm"),
        (nn.Embedding(10, 6, scale_grad_by_freq=True), r"Embedding\(scale_grad_by_freq=True"),
        (nn.InstanceNorm1d(4, track_running_stats=True), r"InstanceNorm1d\(track_running_stats=True"),
        (nn.Conv1d(4, 4, 3, padding=2, padding_mode="reflect"), r"Conv1d\(padding_mode='reflect'\).*pad before it"),
    ],
)
def test_layers_that_write_or_are_not_seen_raise_by_name(layer, message):
    with pytest.raises(MisconfigurationException, match=rf"through net\.0 \({message}"):
        fit(Net(layer, nn.Flatten(), nn.LazyLinear(3)))


@pytest.mark.parametrize(("layer", "x", "name"), [(Average, None, "mean"), (Clamped, lambda: words(200), "rows")])
def test_state_that_depends_on_the_examples_raises_by_name(layer, x, name):
    with pytest.raises(MisconfigurationException, match=rf"sees of the examples into net\.0\.{name}, without clipping"):
        fit(Net(layer(), nn.Linear(6, 3)), x and x())


def test_a_counter_is_no_statistic_and_the_checks_leave_it():
    model = fit(Net(Average(counts=True), nn.Linear(6, 3)), steps=2)  # each batch has all examples
    assert float(model.net[0].mean) == model.privacy_spent.steps == 2


@pytest.mark.parametrize("ghost", [False, True])
def test_a_padding_row_gets_no_gradient(ghost):
    torch.manual_seed(0)
    model = Net(nn.Embedding(10, 6, padding_idx=0), nn.Flatten(), nn.Linear(30, 3))
    before = model.net[0].weight.detach().clone()
    fit(model, torch.randint(0, 3, (32, 5)), noise_multiplier=0.0, ghost=ghost)
    assert torch.equal(model.net[0].weight[0], before[0])
    assert not torch.equal(model.net[0].weight[1], before[1])


@pytest.mark.parametrize("ghost", [False, True])
def test_a_layer_norm_without_a_bias(ghost):
    model = Net(nn.Linear(6, 6), nn.LayerNorm(6, bias=False), nn.Tanh(), nn.Linear(6, 3))
    assert fit(model, ghost=ghost).privacy_spent.steps == 1
