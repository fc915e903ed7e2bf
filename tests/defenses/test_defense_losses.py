"""The losses of the defenses, with their gradients, against slow versions of the formulas; bad input raises."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_cwrf.defenses import (
    PASTMixin,
    adversarial_regularization_loss,
    attack_gain,
    ccl_loss,
    confidence_penalty_loss,
    hamp_loss,
    hamp_target_probability,
    label_smoothing_loss,
    mixup_loss,
    mmd2,
    past_weights,
    relaxloss_loss,
    weight_penalty,
)
from lightning_cwrf.defenses.mixup_mmd import mix_batch
from tests.defenses.cases import Small
from tests.helpers import loader, trainer
from tests.oracles import formulas


def agree(ours, theirs, logits, tolerance=1e-6):
    """Value and gradient of ours are the oracle's."""
    twin = logits.detach().clone().requires_grad_()
    logits.requires_grad_()
    a, b = ours(logits), theirs(twin)
    assert float(a.detach()) == pytest.approx(float(b.detach()), abs=tolerance)
    a.backward()
    b.backward()
    torch.testing.assert_close(logits.grad, twin.grad, rtol=tolerance, atol=tolerance)


cases = st.tuples(st.integers(0, 9999), st.integers(2, 6), st.sampled_from([0.1, 1.0, 6.0]))


def draw(case):
    seed, k, scale = case
    torch.manual_seed(seed)
    return torch.randn(5, k, dtype=torch.float64) * scale, torch.randint(k, (5,))


@given(cases, st.sampled_from([0.5, 0.8, 1.0]), st.sampled_from([0.0, 0.01, 1.0]))
def test_hamp(case, gamma, alpha):
    logits, y = draw(case)
    agree(
        lambda z: hamp_loss(z, y, gamma=gamma, alpha=alpha),
        lambda z: formulas.hamp(z, y, gamma, alpha),
        logits,
    )


@given(st.integers(2, 200), st.floats(0, 1))
def test_hamps_soft_label_has_the_asked_entropy(classes, gamma):
    t = hamp_target_probability(classes, gamma)
    soft = [t] + [(1 - t) / (classes - 1)] * (classes - 1)
    assert formulas.entropy(soft) == pytest.approx(gamma * math.log(classes), abs=1e-9)
    assert t >= 1 / classes - 1e-12


@given(cases, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.05, 1.0]), st.sampled_from(["ccel", "ccql"]))
def test_ccl(case, alpha, beta, kind):
    logits, y = draw(case)
    agree(
        lambda z: ccl_loss(z, y, alpha=alpha, beta=beta, kind=kind),
        lambda z: formulas.ccl(z, y, alpha, beta, kind),
        logits,
    )


def test_ccl_with_alpha_one_is_scaled_cross_entropy():
    logits, y = draw((0, 4, 1.0))
    assert torch.allclose(ccl_loss(logits, y, alpha=1.0, beta=0.05), 0.05 * F.cross_entropy(logits, y))


@given(cases, st.sampled_from([0.0, 0.1, 2.0]))
def test_confidence_penalty(case, beta):
    logits, y = draw(case)
    agree(
        lambda z: confidence_penalty_loss(z, y, beta=beta),
        lambda z: formulas.confidence_penalty(z, y, beta),
        logits,
    )


def test_label_smoothing_and_weight_penalty():
    logits, y = draw((1, 4, 1.0))
    agree(lambda z: label_smoothing_loss(z, y, smoothing=0.3), lambda z: formulas.label_smoothing(z, y, 0.3), logits)
    assert float(weight_penalty([torch.tensor([1.0, -2.0]), torch.tensor(3.0)], l1=0.5, l2=2.0)) == 3.0 + 28.0


@pytest.mark.parametrize("alpha", [0.0, 1.5, 2.5])
def test_past_step_has_the_gradient_of_its_loss(alpha, monkeypatch):
    monkeypatch.setattr("lightning_cwrf.defenses.nonmembers.transfer_of", lambda trainer: lambda batch: batch)
    model = Small().double()
    member, other = ((x.double(), y) for x, y in (next(iter(loader(0, 16))), next(iter(loader(100, 116)))))
    twin = copy.deepcopy(model)
    expected = formulas.past(twin, member, other, 0.01, alpha)
    expected.backward()
    PASTMixin.attach(model, nonmembers=[other], lam=0.01, alpha=alpha)
    model.trainer = trainer()
    loss, size = model.defense_step(member)
    loss.backward()
    assert size == 16
    torch.testing.assert_close(loss.detach(), expected.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, twin.get_parameter(name).grad, rtol=1e-6, atol=1e-9)


def test_past_weights_average_one_and_zero_modules_are_plain():
    gap = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3), "b.weight": torch.zeros(5)}
    gamma = past_weights(gap, alpha=1.0)
    assert float(torch.cat([gamma["a.weight"].flatten(), gamma["a.bias"]]).mean()) == pytest.approx(1.0, abs=1e-6)
    assert gamma["b.weight"].tolist() == [1.0] * 5
    assert all((w == 1).all() for w in past_weights(gap, alpha=0.0).values())  # the penalty is plain ℓ1


@given(cases, st.sampled_from([0.0, 0.5, 3.0]))
def test_adversarial_regularization(case, lam):
    logits, y = draw(case)
    odds = torch.randn(5, dtype=torch.float64)
    agree(
        lambda z: adversarial_regularization_loss(z, y, odds, lam=lam),
        lambda z: formulas.adversarial(z, y, odds.float().double(), lam),
        logits,
    )
    gain = attack_gain(odds, odds[:3] + 1)
    assert float(gain) == pytest.approx(formulas.attack_gain(odds.tolist(), (odds[:3] + 1).tolist()), abs=1e-6)


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 5), st.sampled_from([0.3, 1.0]))
def test_mmd(seed, n, m, bandwidth):
    torch.manual_seed(seed)
    a, b = torch.rand(n, 3, dtype=torch.float64), torch.rand(m, 3, dtype=torch.float64)
    agree(lambda x: mmd2(x, b, bandwidth=bandwidth), lambda x: formulas.mmd2(x, b, bandwidth), a)
    assert float(mmd2(a.detach(), a.detach())) == pytest.approx(0, abs=1e-12)


def test_mixup_is_linear_in_inputs_and_losses():
    logits, y = draw((3, 4, 1.0))
    other = torch.randint(4, (5,))
    mixed = mixup_loss(logits, y, other, 0.3)
    assert torch.allclose(mixed, 0.3 * F.cross_entropy(logits, y) + 0.7 * F.cross_entropy(logits, other))
    batch = {"pixels": torch.randn(5, 2), "extra": torch.randn(5), "labels": y}
    order = torch.tensor([4, 0, 3, 1, 2])
    found = mix_batch(batch, order, 0.3)
    assert torch.equal(found["labels"], y)
    for key in ("pixels", "extra"):
        for i, j in enumerate(order.tolist()):
            torch.testing.assert_close(found[key][i], 0.3 * batch[key][i] + 0.7 * batch[key][j])


LOSSES = {
    "relaxloss": lambda z, y: relaxloss_loss(z, y, alpha=0.5, epoch=1),
    "hamp": lambda z, y: hamp_loss(z, y, gamma=0.9, alpha=0.1),
    "ccl": lambda z, y: ccl_loss(z, y, alpha=0.5),
    "label_smoothing": label_smoothing_loss,
    "confidence_penalty": confidence_penalty_loss,
    "adversarial_regularization": lambda z, y: adversarial_regularization_loss(z, y, torch.zeros(len(z))),
    "mixup": lambda z, y: mixup_loss(z, y, y, 0.5),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), r"shape \(n, K\) with K >= 2"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), r"shape \(n, K\) with K >= 2"),
        (torch.zeros(3, 2), torch.zeros(3), "must be class indices of shape"),
        (torch.zeros(3, 2), F.one_hot(torch.tensor([0, 1, 0]), 2), "turn one-hot or probability targets into indices"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), "label 2 is out of range: the model has 2 classes"),
        (torch.zeros(3, 2), torch.tensor([0, 1]), "3 rows of logits do not fit 2 targets"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), r"1 examples are NaN or infinite \(rows \[0\]"),
    ],
)
def test_bad_input_of_every_loss(name, logits, targets, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name](logits, targets)
