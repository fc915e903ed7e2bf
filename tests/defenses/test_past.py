"""PAST's choices beyond the paper: frozen weights do not count, and running statistics are the members'."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_cwrf import GradientMaskCallback, WeightMask
from lightning_cwrf.defenses import PASTMixin, create_defense, mixup_mmd, past_penalty, past_weights
from lightning_cwrf.defenses.past import running_statistics_kept
from tests.defenses.test_defense_training import Plain, Record, twin_of
from tests.helpers import Classifier, loader, part, trainer
from tests.oracles import formulas

GAP = {"a.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), "a.bias": torch.tensor([2.0, -1, 0])}


def test_weights_by_hand():
    """|gap| 3, 1, 2 have the mean 2; without the 3 the mean is 1.5."""
    gap = {"m.w": torch.tensor([3.0, -1.0]), "m.b": torch.tensor([2.0]), "n.w": torch.tensor([10.0, 30.0])}
    found = past_weights(gap, alpha=2.0)
    assert list(found) == list(gap)
    assert found["m.w"].tolist() == [2.25, 0.25]
    assert found["m.b"].tolist() == [1.0]
    assert found["n.w"].tolist() == [0.25, 2.25]
    held = past_weights(gap, alpha=1.0, frozen={"m.w": torch.tensor([True, False])})
    assert held["m.w"].tolist() == [0.0, pytest.approx(2 / 3)]
    assert held["m.b"].tolist() == [pytest.approx(4 / 3)]
    assert held["n.w"].tolist() == [0.5, 1.5]
    assert float(past_penalty({"m.w": torch.tensor([5.0, -3.0])}, {"m.w": found["m.w"]}, lam=0.1)) == pytest.approx(1.2)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_frozen_weights_count_neither_in_the_size_nor_in_the_sum(alpha):
    torch.manual_seed(1)
    frozen = {name: torch.rand(g.shape) < 0.6 for name, g in GAP.items()}
    found = past_weights(GAP, alpha=alpha, frozen=frozen)
    live = {name: GAP[name][~frozen[name]] for name in GAP}
    expected = past_weights(live, alpha=alpha)  # as if the frozen weights did not exist
    for name in GAP:
        torch.testing.assert_close(found[name][~frozen[name]], expected[name])
        assert (found[name][frozen[name]] == 0).all()
    if alpha == 1:
        assert float(torch.cat([found[n][~frozen[n]] for n in GAP]).mean()) == pytest.approx(1.0)


def test_modules_without_a_gap_or_without_a_live_weight():
    flat = past_weights({"a.w": torch.zeros(3)}, alpha=2.0, frozen={"a.w": torch.tensor([True, False, False])})
    assert flat["a.w"].tolist() == [0, 1, 1]
    every = past_weights({"a.w": torch.ones(2), "b.w": torch.ones(2)}, alpha=2.0, frozen={"a.w": torch.ones(2).bool()})
    assert every["a.w"].tolist() == [0, 0]
    assert every["b.w"].tolist() == [1, 1]
    one = past_weights({"a.w": torch.tensor([0.0, 5.0])}, alpha=1.0, frozen={"a.w": torch.tensor([False, True])})
    assert one["a.w"].tolist() == [1, 0]  # the only live weight has no gap


@pytest.mark.parametrize(
    ("optimizer", "alpha", "warns"), [("adam", 2.5, True), ("adam", 0.0, False), ("sgd", 2.5, False)]
)
def test_an_optimizer_that_undoes_the_weights_is_warned_about(optimizer, alpha, warns):
    model = Classifier(optimizer=optimizer)
    PASTMixin.attach(model, nonmembers=loader(40, 60), alpha=alpha)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_epochs=1).fit(model, loader(0, 40))
    assert any("PAST with Adam, which divides every gradient" in str(each.message) for each in caught) is warns


def test_with_cwrf_the_penalty_is_that_of_the_live_weights():
    """Through a real Trainer; and a later fit without frozen weights counts them all again."""
    torch.manual_seed(0)
    other = next(iter(loader(300, 320, batch_size=20)))
    model = PASTMixin.attach(Plain(), nonmembers=[other], lam=0.05, alpha=1.5)
    mask = WeightMask({n: torch.rand(p.shape) < 0.7 for n, p in model.named_parameters()})
    none = {n: torch.zeros_like(m) for n, m in mask.masks.items()}
    for frozen, callbacks in ((mask.masks, [GradientMaskCallback(mask)]), (none, [])):
        record = Record()
        trainer(max_epochs=1, precision="64-true", callbacks=[*callbacks, record]).fit(
            model, loader(0, 24, batch_size=12)
        )
        assert len(record.steps) == 2
        for step in record.steps:
            twin = twin_of(step)
            expected = formulas.past(twin, step["batch"], (other[0].double(), other[1]), 0.05, 1.5, frozen)
            assert float(step["loss"]) == pytest.approx(float(expected.detach()), rel=1e-9)
            expected.backward()
            for name, p in twin.named_parameters():
                gradient = p.grad.masked_fill(frozen[name], 0)
                torch.testing.assert_close(step["grads"][name], gradient, rtol=1e-7, atol=1e-10)


class Normed(Classifier):
    """BatchNorm without dropout, so that a step can be taken again."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net[4].p = 0.0


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers()}


def after_one_pass(model, x):
    """The running statistics after one pass of ``x`` in training mode."""
    twin = copy.deepcopy(model).train()
    twin(x)
    return statistics(twin)


@pytest.mark.parametrize("name", ["past", "adversarial_regularization", "mixup_mmd"])
def test_running_statistics_are_those_of_the_members_and_are_updated_once_a_step(name, monkeypatch):
    mixed = []
    plain = mixup_mmd.mix_batch
    monkeypatch.setattr(mixup_mmd, "mix_batch", lambda *arguments: mixed.append(plain(*arguments)) or mixed[-1])
    torch.manual_seed(0)
    model = Normed()
    before = copy.deepcopy(model)
    batch = next(iter(loader(0, 32, batch_size=32)))
    create_defense(name, nonmembers=part(300, 400)).attach(model)
    trainer(max_steps=1).fit(model, loader(0, 32, batch_size=32))
    expected = after_one_pass(before, mixed[0][0] if name == "mixup_mmd" else batch[0])
    assert expected["net.1.num_batches_tracked"] == 1
    for buffer, value in statistics(model).items():
        torch.testing.assert_close(value, expected[buffer])
    assert model.net[1].track_running_stats


@pytest.mark.parametrize("layer_in_eval", [False, True])
def test_past_compares_members_and_non_members_in_one_mode(layer_in_eval, monkeypatch):
    """Both under their own batch statistics, or both under the running ones of a frozen layer."""
    monkeypatch.setattr("lightning_cwrf.defenses.nonmembers.transfer_of", lambda trainer: lambda batch: batch)
    torch.manual_seed(0)
    model = Normed(width=2).double()
    model(torch.randn(50, 1, 8, 8).double())  # running statistics of something else
    if layer_in_eval:
        model.net[1].eval()
    member, other = ((x.double(), y) for x, y in (next(iter(loader(0, 16))), next(iter(loader(100, 116)))))
    twin = copy.deepcopy(model)
    expected = formulas.past(twin, member, other, 0.01, 1.5)
    expected.backward()
    PASTMixin.attach(model, nonmembers=[other], lam=0.01, alpha=1.5)
    model.trainer = trainer()
    loss, _ = model.defense_step(member)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, twin.get_parameter(name).grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None), nn.InstanceNorm1d(3, track_running_stats=True)],
    ids=["batch", "cumulative", "instance"],
)
def test_statistics_are_kept_and_the_output_is_that_of_training(layer):
    x = torch.randn(6, 3, 4)
    expected = copy.deepcopy(layer)(x)
    before, momentum = {n: b.clone() for n, b in layer.named_buffers()}, layer.momentum
    with pytest.raises(KeyError), running_statistics_kept(layer):
        assert torch.equal(layer(x), expected)
        raise KeyError
    assert all(torch.equal(before[n], b) for n, b in layer.named_buffers())
    layer(x)
    assert not torch.equal(before["running_mean"], layer.running_mean)  # it tracks again
    evaluated = layer.eval()(x)
    with running_statistics_kept(layer):
        assert torch.equal(layer(x), evaluated)
    assert (layer.track_running_stats, layer.momentum) == (True, momentum)
    never = nn.BatchNorm1d(3, track_running_stats=False)
    with running_statistics_kept(never):
        never(x)
    assert not never.track_running_stats


def test_an_attack_does_not_outlive_its_settings():
    """Attached again with another rate, the attack begins anew at that rate."""
    model = create_defense("adversarial_regularization", nonmembers=part(300, 400)).attach(Normed())
    trainer(max_steps=1).fit(model, loader(0, 32, batch_size=32))
    first = model.defense_state.adversary
    assert first.optimizer.param_groups[0]["lr"] == 1e-3
    type(model).detach(model)
    create_defense("adversarial_regularization", nonmembers=part(300, 400), attack_lr=0.5).attach(model)
    trainer(max_steps=1).fit(model, loader(0, 32, batch_size=32))
    assert model.defense_state.adversary is not first
    assert model.defense_state.adversary.optimizer.param_groups[0]["lr"] == 0.5
