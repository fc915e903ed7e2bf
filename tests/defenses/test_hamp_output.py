"""HAMP's test-time part: the classes' order stays, ties included, and the noise belongs to the example."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_cwrf.auditing import audit
from lightning_cwrf.defenses import HAMPOutput
from lightning_cwrf.defenses.hamp import _GOLDEN, _mix, example_noise
from lightning_cwrf.defenses.output import next_above
from tests.helpers import Classifier, loader, part


class Table(nn.Module):
    """Gives the logits that it is asked for, and those of noise by rounding it: both with ties."""

    def __init__(self, levels=2):
        super().__init__()
        self.levels = levels

    def forward(self, x):
        return (x * self.levels).round()


def images(begin=0, end=16):
    return next(iter(loader(begin, end, batch_size=end - begin)))[0]


def test_every_rank_is_kept_and_the_values_are_those_of_noise():
    model = Classifier().eval()
    x = images()
    rng = torch.get_rng_state()
    with torch.no_grad():
        plain, shown = model(x), HAMPOutput(model)(x)
        noise = model(example_noise(x, 0))
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(plain.argsort(), shown.argsort())
    torch.testing.assert_close(shown.sort().values, noise.sort().values)
    assert not torch.allclose(plain, shown)


@given(
    st.integers(0, 9999),
    st.integers(1, 4),
    st.integers(2, 6),
    st.sampled_from(["float32", "float64", "bfloat16", "float16"]),
)
def test_the_predicted_class_is_kept_when_logits_and_values_tie(seed, levels, classes, dtype):
    torch.manual_seed(seed)
    x = (torch.rand(6, classes) - 0.5).to(getattr(torch, dtype))
    model = Table(levels)
    for low, high in ((0.0, 1.0), (-1.0, 0.0), (-0.1, 0.1)):
        shown = HAMPOutput(model, low, high, seed=seed)(x)
        assert shown.dtype == x.dtype
        assert torch.equal(shown.argmax(-1), model(x).argmax(-1))
        weaker = model(x)[:, :, None] < model(x)[:, None, :]  # whatever was below another is not above it now
        assert not (weaker & (shown[:, :, None] > shown[:, None, :])).any()


def test_tied_logits_by_hand():
    class Flat(nn.Module):
        def forward(self, x):
            return x.new_zeros(len(x), 3) if self.first() else x.new_tensor([[5.0, 7.0, 6.0]]).expand(len(x), 3)

        calls = 0

        def first(self):
            self.calls += 1
            return self.calls % 2 == 1

    shown = HAMPOutput(Flat())(torch.rand(2, 4))
    assert shown.tolist() == [[7.0, 6.0, 5.0]] * 2  # the first of equal classes is the predicted one
    assert next_above(torch.tensor([0.0, 1.0, -1.0])).tolist() == [
        pytest.approx(1.4e-45), 1.0 + 2**-23, -1.0 + 2**-24]  # fmt: skip


def test_the_same_example_is_shown_the_same_output_in_any_call_batch_and_order():
    model = Classifier().double().eval()
    x = images(0, 24).double()
    shown = HAMPOutput(model, seed=3)
    first = shown(x)
    assert torch.equal(shown(x), first)
    torch.testing.assert_close(torch.cat([shown(x[:7]), shown(x[7:])]), first)
    order = torch.randperm(24)
    torch.testing.assert_close(shown(x[order]), first[order])
    again = HAMPOutput(Classifier().double().eval(), seed=3)
    again.load_state_dict(shown.state_dict())
    for other in (copy.deepcopy(shown), again):
        assert torch.equal(other(x), first)
    assert not torch.allclose(HAMPOutput(model, seed=4)(x), first)


def test_a_model_in_training_mode_is_shown_as_it_predicts():
    model = Classifier().train()
    before = copy.deepcopy(model.state_dict())
    x = images()
    shown = HAMPOutput(model)
    assert torch.equal(shown(x), shown(x))  # dropout is off
    assert model.training
    assert model.net[4].training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())  # BatchNorm saw no noise


def test_an_audit_of_one_object_gives_one_result():
    model = HAMPOutput(Classifier())
    found = [audit(model, members=part(0, 64), nonmembers=part(100, 164)) for _ in range(2)]
    assert torch.equal(found[0].scores["loss"], found[1].scores["loss"])


def test_the_noise_is_uniform_and_a_function_of_content_and_seed():
    x = torch.rand(400, 50)
    noise = example_noise(x, 0)
    assert noise.shape == x.shape
    assert noise.dtype == torch.float32
    assert 0 <= float(noise.min()) < 1e-3
    assert 0.999 < float(noise.max()) < 1
    # 20,000 draws: the mean has a standard error of 0.002, the variance one of 0.0005.
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(noise.var()) == pytest.approx(1 / 12, abs=0.0025)
    assert float(torch.corrcoef(noise).triu(1).abs().max()) < 5.5 / 50**0.5
    assert float(torch.corrcoef(noise.T).triu(1).abs().max()) < 5.5 / 400**0.5
    for changed in (x.roll(1, 1), x + 1e-3 * torch.eye(400, 50)):
        rows = (changed != x).any(1)
        assert ((example_noise(changed, 0) == noise).float().mean(1)[rows] < 0.1).all()
    assert (example_noise(x, 1) == noise).float().mean() < 1e-3
    assert torch.equal(example_noise(x, 2**64 + 5), example_noise(x, 5))  # seeds count modulo 2^64
    assert torch.equal(example_noise(-torch.zeros(2, 3), 0), example_noise(torch.zeros(2, 3), 0))
    assert torch.equal(example_noise(x.double(), 0), noise)
    assert example_noise(torch.zeros(0, 3), 0).shape == (0, 3)
    assert example_noise(torch.zeros(2), 0).shape == (2,)


def test_the_hash_is_splitmix64():
    """The first numbers of the generator's reference implementation, seed 0."""
    states = torch.tensor([1, 2]) * _GOLDEN
    assert [int(v) % 2**64 for v in _mix(states)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"low": 1.0}, ValueError, "low must be below high, not 1.0 and 1.0"),
        ({"low": float("nan")}, ValueError, "low must be a finite number"),
        ({"high": float("inf")}, ValueError, "high must be a finite number"),
        ({"high": "1"}, TypeError, "high must be a number"),
        ({"low": True}, TypeError, "low must be a number"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"seed": None}, TypeError, "seed must be an integer, not None"),
    ],
)
def test_wrong_arguments(settings, error, message):
    with pytest.raises(error, match=message):
        HAMPOutput(Classifier(), **settings)


def test_wrong_models_and_inputs():
    with pytest.raises(TypeError, match=r"wraps a model, an nn\.Module"):
        HAMPOutput(Classifier)
    with pytest.raises(TypeError, match=r"random float inputs, and has none for torch\.int64"):
        HAMPOutput(nn.Embedding(3, 2))(torch.tensor([1]))
    with pytest.raises(TypeError, match="has none for dict"):
        HAMPOutput(Classifier())({"x": images()})


def test_the_noise_lies_between_low_and_high():
    """A model that shows its inputs: the values are those of the noise, stretched to the range."""
    x = torch.rand(40, 6)
    shown = HAMPOutput(nn.Identity(), low=-2.0, high=6.0, seed=3)(x)
    torch.testing.assert_close(shown.sort(-1).values, (example_noise(x, 3) * 8 - 2).sort(-1).values)
