"""BatchNorm's running statistics, reset and estimated, against a slow version."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf.weights.batchnorm import estimated_statistics, reset_statistics, tracking_layers
from tests.helpers import Classifier, loader, same_snapshot, snapshot


def data(examples, features=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(examples, features, generator=generator) * 2 + 1, torch.arange(examples) % 2)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))


def by_hand(model, batches):
    """Means over examples of each batch's mean and unbiased variance, layer after layer."""
    sums = {1: [0, 0], 4: [0, 0]}
    examples = 0
    for inputs, _ in batches:
        examples += len(inputs)
        values = inputs.double()
        for i, layer in enumerate(copy.deepcopy(model).double()):
            if i in sums:
                mean, var = values.mean(0), values.var(0, correction=1)
                sums[i][0] = sums[i][0] + len(inputs) * mean
                sums[i][1] = sums[i][1] + len(inputs) * var
                biased = values.var(0, correction=0)
                values = (values - mean) / (biased + layer.eps).sqrt() * layer.weight + layer.bias
            else:
                values = layer(values)
    return {i: (mean / examples, var / examples) for i, (mean, var) in sums.items()}


def test_statistics_are_means_over_the_batches():
    model, examples = net(), data(50)
    batches = [examples[a:b] for a, b in ((0, 20), (20, 45), (45, 50))]
    found = estimated_statistics(model, batches)
    for i, (mean, var) in by_hand(model, batches).items():
        torch.testing.assert_close(found[f"{i}.running_mean"].double(), mean.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[f"{i}.running_var"].double(), var.detach(), rtol=1e-5, atol=1e-6)
        assert int(found[f"{i}.num_batches_tracked"]) == 3


def test_batches_of_one_size_give_what_torch_collects():
    model, examples = net(), data(60)
    batches = [examples[a : a + 20] for a in (0, 20, 40)]
    theirs = copy.deepcopy(model)
    update_bn(batches, theirs)
    for name, value in estimated_statistics(model, batches).items():
        torch.testing.assert_close(value, dict(theirs.named_buffers())[name])


def test_the_model_and_the_random_state_are_untouched():
    model = Classifier().train()
    before, state = snapshot(model), torch.get_rng_state()
    estimated_statistics(model, loader(0, 64, shuffle=True))
    same_snapshot(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())


def test_sorted_data_are_read_in_random_order():
    inputs = torch.linspace(-3, 3, 600).unsqueeze(1)
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2))
    found = estimated_statistics(model, TensorDataset(inputs, torch.zeros(600, dtype=torch.long)), batch_size=60)
    assert float(found["0.running_var"]) == pytest.approx(float(inputs.var()), rel=0.1)  # in order it is 0.03


@pytest.mark.parametrize("examples", [2, 3, 9, 17, 25])
def test_no_batch_has_a_single_example(examples):
    model = net()
    found = estimated_statistics(model, DataLoader(data(examples), batch_size=8), batch_size=8)
    assert all(value.isfinite().all() for value in found.values())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        estimated_statistics(model, data(1))


def test_layers_in_eval_mode_keep_theirs():
    model = net()
    model[1].eval()
    assert {name.partition(".")[0] for name in estimated_statistics(model, data(10))} == {"4"}
    model[1].running_mean.fill_(7.0)
    model[4].running_mean.fill_(7.0)
    reset_statistics(model)
    assert (set(model[1].running_mean.tolist()), set(model[4].running_mean.tolist())) == ({7.0}, {0.0})
    for layers in (model.eval(), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), nn.Linear(2, 2)):
        for act in (tracking_layers, reset_statistics, lambda m: estimated_statistics(m, data(10))):
            with pytest.raises(ValueError, match="no BatchNorm layer in train mode with running statistics"):
                act(layers)


class Skipping(nn.Module):
    """One layer is used twice in each pass, one in every other pass, and one never."""

    def __init__(self):
        super().__init__()
        self.twice, self.some, self.never = nn.BatchNorm1d(1), nn.BatchNorm1d(1), nn.BatchNorm1d(1)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        if self.passes % 2:
            self.some(x)
        self.twice(x)
        self.twice(x + 10)
        return torch.cat([x, -x], dim=1)


def test_layers_that_are_used_twice_seldom_or_never():
    batches = [(torch.tensor([[v], [v + 2.0]]), torch.tensor([0, 1])) for v in (0.0, 4.0, 8.0)]
    found = estimated_statistics(Skipping(), batches)
    assert float(found["twice.running_mean"]) == pytest.approx(10.0)  # of 1, 11, 5, 15, 9, 19
    assert float(found["some.running_mean"]) == pytest.approx(5.0)  # of 1 and 9
    assert not [name for name in found if name.startswith("never")]


def test_data_without_statistics_are_an_error():
    with pytest.raises(ValueError, match="members holds no batch"):
        estimated_statistics(net(), [])
    with pytest.raises(ValueError, match="NaN or infinite"):
        estimated_statistics(Skipping(), [(torch.tensor([[1.0], [torch.inf]]), torch.tensor([0, 1]))])
