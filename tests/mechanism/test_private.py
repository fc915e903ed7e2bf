"""What is made of a private example cannot depend on others: neither its batch, nor the model that has seen others."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lightning_cwrf.mechanism import clipped_sum, draw, exponential_mechanism, public_curvature
from lightning_cwrf.mechanism.private import PrivateExamples
from tests.helpers import same_snapshot, snapshot
from tests.mechanism.cases import data, network


class Pooled(nn.Module):
    """Mean over positions, the padding among them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.embed(tokens).mean(1))


def padded(examples):
    return pad_sequence([x for x, _ in examples], batch_first=True), torch.tensor([y for _, y in examples])


def sequences(n, seed, low=5, high=9):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (n,), generator=generator).tolist()
    return [(torch.randint(1, 50, (length,), generator=generator), i % 3) for i, length in enumerate(lengths)]


def sums(monkeypatch, model, curvature, private, **settings):
    """The sum of clipped gradients of one pass."""
    found = []
    real = draw.quadratic_draw
    monkeypatch.setattr(
        draw, "quadratic_draw", lambda at, total, *a, **k: found.append(total) or real(at, total, *a, **k)
    )
    exponential_mechanism(model, private, curvature, mu=1.0, draws=1, target_delta=1e-6, **settings)
    monkeypatch.undo()
    return found[0]


class Listed(Dataset):
    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, place):
        return self.examples[place]


def test_a_long_example_moves_the_sum_by_the_clipping_norm_at_most(monkeypatch):
    """It would pad all others of its batch."""
    private, longer = sequences(60, 1), sequences(1, 2, 400, 401)
    curvature = public_curvature(Pooled(), DataLoader(Listed(sequences(60, 3)), batch_size=20, collate_fn=padded))
    first, second = (
        sums(monkeypatch, Pooled(), curvature, DataLoader(Listed(each), batch_size=61, collate_fn=padded))
        for each in (private, private + longer)
    )
    assert float((first - second).norm()) <= curvature.clip * (1 + 1e-9)
    batched = [curvature.gradients(Pooled().eval(), padded(each)) for each in (private, private + longer)]
    there, here = (clipped_sum(each, curvature) for each in batched)
    assert float((there - here).norm()) > 2 * curvature.clip  # by the batch, it is not


def mixing(batch):
    x, y = batch
    return (x + x.roll(1, 0)) / 2, y


def sometimes(batch):
    return mixing(batch) if float(torch.rand(())) < 0.5 else batch


def causal(examples):
    x, y = default_collate(examples)
    x = x.clone()
    x[1:] -= 0.9 * x[:-1].clone()
    return x, y


@pytest.mark.parametrize("transfer", [mixing, sometimes])
def test_a_transfer_that_mixes_has_nothing_to_mix(monkeypatch, transfer):
    curvature = public_curvature(network(), data(40, 7))
    plain = sums(monkeypatch, network(), curvature, data(30, 8))
    assert torch.allclose(sums(monkeypatch, network(), curvature, data(30, 8), transfer=transfer), plain)


def test_a_collate_that_mixes_has_nothing_to_mix(monkeypatch):
    curvature = public_curvature(network(), data(40, 7))
    plain = sums(monkeypatch, network(), curvature, data(30, 8))
    assert torch.allclose(
        sums(monkeypatch, network(), curvature, DataLoader(data(30, 8), batch_size=30, collate_fn=causal)), plain
    )


def test_items_that_are_batches_raise():
    whole = data(30, 8).tensors
    items = Listed([tuple(part[i : i + 10] for part in whole) for i in range(0, 30, 10)])
    loader = DataLoader(items, batch_size=1, collate_fn=lambda one: one[0])
    with pytest.raises(ValueError, match="gave 30 examples, and the data set has 3"):
        PrivateExamples(loader).ids()
    with pytest.raises(ValueError, match=r"collated by itself, must give tensors with one row"):
        next(PrivateExamples(loader).groups(8))


class Remembers(nn.Module):
    """A running mean of what it has seen, also in eval mode, as a number or a buffer."""

    def __init__(self, buffer):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3).double()
        if buffer:
            self.register_buffer("mean", torch.zeros(()).double())
        else:
            self.mean = 0.0

    def forward(self, input):
        seen = input.detach().mean()
        self.mean = 0.99 * self.mean + 0.01 * (seen if isinstance(self.mean, torch.Tensor) else float(seen))
        return self.head(input - self.mean)


@pytest.mark.parametrize("buffer", [True, False])
def test_a_model_that_remembers_earlier_examples_is_refused_and_not_changed(buffer):
    inputs, targets = data(30, 8).tensors
    curvature = public_curvature(network(), data(40, 7))
    model = Remembers(buffer)
    names = ["head.weight", "head.bias"]
    given = type(curvature)(torch.eye(15, dtype=torch.float64), 1.0, names)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"keeps? something of the examples that"):
        exponential_mechanism(model, TensorDataset(inputs + 1, targets), given, mu=1.0, target_delta=1e-3)
    same_snapshot(before, snapshot(model))
    assert float(model.mean) == 0.0


class Counts(nn.Linear):
    """Keeps something that no output depends on."""

    last = None

    def forward(self, input):
        self.last = input.detach()
        return super().forward(input)


def test_what_a_model_keeps_of_private_examples_is_not_released():
    torch.manual_seed(0)
    model = Counts(4, 3).double()
    curvature = public_curvature(Counts(4, 3).double(), data(40, 7))
    exponential_mechanism(model, data(30, 8), curvature, mu=1.0, target_delta=1e-3)
    assert model.last is None
    assert math.isfinite(float(model.weight.detach().sum()))
