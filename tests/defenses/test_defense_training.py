"""What a real Trainer minimises under each defense is the defense's published loss, at the settings that were given.

Every oracle is the slow version of the formula; value and gradient are compared at every step.
"""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

from lightning_cwrf.defenses import create_defense, mixup_mmd
from lightning_cwrf.defenses.nonmembers import NonmemberBatches
from tests.helpers import Classifier, loader, part, trainer
from tests.oracles import formulas

pytestmark = pytest.mark.slow


class Plain(Classifier):
    """Smooth, without BatchNorm or dropout: a loss can be taken again to the last digits."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


class Record(Callback):
    """Weights, batch, loss and gradient of every step; and the attack network, where there is one."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        step = {"state": copy.deepcopy(module.state_dict()), "batch": batch, "epoch": trainer.current_epoch}
        step["attack_before"] = copy.deepcopy(getattr(module.defense_state, "adversary", None))
        self.steps.append(step)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps[-1]["grads"] = {n: p.grad.clone() for n, p in module.named_parameters()}
        self.steps[-1]["attack"] = copy.deepcopy(getattr(module.defense_state, "adversary", None))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps[-1]["loss"] = outputs["loss"].detach()
        self.steps[-1]["logged"] = trainer.callback_metrics["train_loss_step"]


def twin_of(step):
    model = Plain().double()
    model.load_state_dict(step["state"])
    return model


def train(name, **settings):
    torch.manual_seed(0)
    model = create_defense(name, **settings).attach(Plain())
    record = Record()
    run = trainer(max_epochs=2, precision="64-true", callbacks=[record])
    run.fit(model, loader(0, 24, batch_size=12))
    assert len(record.steps) == 4
    assert [step["epoch"] for step in record.steps] == [0, 0, 1, 1]
    return record.steps


def compare(step, model, expected):
    expected.backward()
    assert float(step["loss"]) == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    assert float(step["logged"]) == pytest.approx(float(expected.detach()), rel=1e-5)  # kept in float32
    for name, p in model.named_parameters():
        torch.testing.assert_close(step["grads"][name], p.grad, rtol=1e-7, atol=1e-10)


# The loss of a batch alone: (settings, oracle of logits, targets, epoch).
OF_LOGITS = [
    ("relaxloss", {"alpha": 0.5}, lambda z, y, e: formulas.relaxloss(z, y, 0.5, e, 1.0)),
    ("relaxloss", {"alpha": 5.0, "upper": 0.3}, lambda z, y, e: formulas.relaxloss(z, y, 5.0, e, 0.3)),
    ("relaxloss", {"alpha": 5.0}, lambda z, y, e: formulas.relaxloss(z, y, 5.0, e, 1.0)),
    ("hamp", {}, lambda z, y, e: formulas.hamp(z, y, 0.95, 1.0)),
    ("hamp", {"gamma": 0.6, "alpha": 0.01}, lambda z, y, e: formulas.hamp(z, y, 0.6, 0.01)),
    ("ccl", {}, lambda z, y, e: formulas.ccl(z, y, 0.5, 1.0, "ccel")),
    ("ccl", {"alpha": 0.2, "beta": 0.05}, lambda z, y, e: formulas.ccl(z, y, 0.2, 0.05, "ccel")),
    ("ccl", {"alpha": 0.2, "kind": "ccql"}, lambda z, y, e: formulas.ccl(z, y, 0.2, 1.0, "ccql")),
    ("label_smoothing", {}, lambda z, y, e: formulas.label_smoothing(z, y, 0.1)),
    ("label_smoothing", {"smoothing": 0.4}, lambda z, y, e: formulas.label_smoothing(z, y, 0.4)),
    ("confidence_penalty", {}, lambda z, y, e: formulas.confidence_penalty(z, y, 0.1)),
    ("confidence_penalty", {"beta": 2.0}, lambda z, y, e: formulas.confidence_penalty(z, y, 2.0)),
]


@pytest.mark.parametrize(("name", "settings", "oracle"), OF_LOGITS, ids=[f"{n}-{s}" for n, s, _ in OF_LOGITS])
def test_a_loss_of_logits_is_what_trains(name, settings, oracle):
    for step in train(name, **settings):
        model = twin_of(step)
        x, y = step["batch"]
        compare(step, model, oracle(model(x), y, step["epoch"]))


@pytest.mark.parametrize("settings", [{}, {"l1": 0.01}, {"l2": 0.1}, {"l1": 0.2, "l2": 0.3}])
def test_the_weight_penalty_is_what_trains(settings):
    for step in train("weight_penalty", **settings):
        model = twin_of(step)
        x, y = step["batch"]
        penalty = formulas.weight_penalty(model.parameters(), settings.get("l1", 0.0), settings.get("l2", 0.0))
        compare(step, model, F.cross_entropy(model(x), y) + penalty)


@pytest.mark.parametrize("settings", [{}, {"lam": 0.1, "alpha": 1.5}])
def test_the_loss_of_past_is_what_trains(settings):
    other = next(iter(loader(300, 320, batch_size=20)))
    for step in train("past", nonmembers=[other], **settings):
        model = twin_of(step)
        there = (other[0].double(), other[1])
        expected = formulas.past(model, step["batch"], there, settings.get("lam", 1e-3), settings.get("alpha", 2.5))
        compare(step, model, expected)


@pytest.mark.parametrize("settings", [{}, {"lam": 3.0, "attack_steps": 3, "attack_lr": 0.01}])
def test_the_game_of_adversarial_regularization_is_what_trains(settings):
    other = next(iter(loader(300, 320, batch_size=20)))
    steps = train("adversarial_regularization", nonmembers=[other], **settings)
    for i, step in enumerate(steps):
        model = twin_of(step)
        x, y = step["batch"]
        logits = model(x)
        odds = step["attack"].network(logits, y)
        total = formulas.adversarial(logits, y, odds.double(), settings.get("lam", 1.0))
        expected = total.detach()
        assert float(step["loss"]) == pytest.approx(float(expected), rel=1e-6)
        total.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(step["grads"][name], p.grad, rtol=1e-4, atol=1e-6)  # the attack is in float32
        if i:  # the first step makes the attack
            attack = step["attack_before"]
            network, optimizer = attack.network.requires_grad_(True), attack.optimizer
            rate = settings.get("attack_lr", 1e-3)
            assert optimizer.param_groups[0]["lr"] == rate
            here, there = model(x).detach(), model(other[0].double()).detach()
            for _ in range(settings.get("attack_steps", 1)):
                optimizer.zero_grad()
                inside, outside = network(here, y), network(there, other[1])
                gain = torch.sigmoid(inside).log().mean() / 2 + (1 - torch.sigmoid(outside)).log().mean() / 2
                (-gain).backward()
                optimizer.step()
            for p, q in zip(network.parameters(), step["attack"].network.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"lam": 0.5, "bandwidth": 0.3, "mixup_alpha": 0.2}, {"lam": 40.0}])
def test_the_loss_of_mixup_mmd_is_what_trains(settings, monkeypatch):
    mixes, drawn = [], []
    plain_mix, plain_like = mixup_mmd.mix_batch, NonmemberBatches.like

    def mix(batch, order, weight):
        mixes.append((order, weight))
        return plain_mix(batch, order, weight)

    def like(self, module, batch, targets):
        drawn.append(plain_like(self, module, batch, targets))
        return drawn[-1]

    monkeypatch.setattr(mixup_mmd, "mix_batch", mix)
    monkeypatch.setattr(NonmemberBatches, "like", like)
    for i, step in enumerate(train("mixup_mmd", nonmembers=part(300, 400), **settings)):
        model = twin_of(step)
        (x, y), (order, weight), (x_other, y_other) = step["batch"], mixes[i], drawn[i]
        assert torch.equal(y, y_other)
        assert sorted(order.tolist()) == list(range(12))
        assert 0 <= weight <= 1
        mixed = torch.stack([weight * x[j] + (1 - weight) * x[int(k)] for j, k in enumerate(order)])
        ours = model(x).float().softmax(-1).double()  # the discrepancy is taken in float32
        others = model(x_other).detach().float().softmax(-1).double()
        distance = formulas.mmd2(ours, others, settings.get("bandwidth", 1.0))
        expected = formulas.mixup(model(mixed), y, y[order], weight) + settings.get("lam", 3.0) * distance
        assert float(step["loss"]) == pytest.approx(float(expected.detach()), rel=1e-5)
        expected.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(step["grads"][name], p.grad, rtol=1e-3, atol=1e-5)
    assert len({weight for _, weight in mixes}) == 4


def test_the_weight_of_a_mixture_is_a_beta_draw():
    """Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))."""
    generator = torch.Generator().manual_seed(0)
    for a in (0.2, 1.0, 4.0):
        draws = torch.tensor([mixup_mmd._beta(a, generator) for _ in range(4000)])
        variance = 1 / (4 * (2 * a + 1))
        assert float(draws.mean()) == pytest.approx(0.5, abs=4 * math.sqrt(variance / 4000))
        assert float(draws.var()) == pytest.approx(variance, rel=0.08)
        assert float(draws.min()) >= 0
        assert float(draws.max()) <= 1
    # Both Gamma draws of a tiny a are below the smallest number: the halves are as good as any.
    assert {mixup_mmd._beta(1e-5, generator) for _ in range(20)} <= {0.0, 0.5, 1.0}


def test_dp_sgd_trains_on_plain_cross_entropy():
    torch.manual_seed(0)
    model = create_defense("dpsgd", noise_multiplier=1.0).attach(Plain())
    record = Record()
    trainer(max_epochs=2, precision="64-true", callbacks=[record]).fit(model, loader(0, 24, batch_size=12))
    for step in record.steps:
        x, y = step["batch"]
        losses = [formulas.cross_entropy(row, int(t)) for row, t in zip(twin_of(step)(x).tolist(), y, strict=True)]
        assert float(step["loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-9)
