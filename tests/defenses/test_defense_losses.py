import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback
from lightning_cwrf.defenses import (
    DefenseMixin,
    PASTMixin,
    adversarial_regularization_loss,
    attack_gain,
    available_defenses,
    ccl_loss,
    confidence_penalty_loss,
    create_defense,
    hamp_loss,
    hamp_target_probability,
    label_smoothing_loss,
    mixup_loss,
    mmd2,
    past_weights,
    register_defense,
    relaxloss_loss,
    weight_penalty,
)
from lightning_cwrf.defenses.mixup_mmd import mix_batch
from lightning_cwrf.defenses.registry import DEFENSES
from tests.helpers import Classifier, loader, trained, trainer
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


class Small(Classifier):
    """Smooth and without BatchNorm or dropout, so that a gradient can be compared to the last digits."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10))


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


SETTINGS = {
    "relaxloss": {"alpha": 0.5},
    "hamp": {"gamma": 0.8, "alpha": 0.01},
    "ccl": {"alpha": 0.5, "beta": 0.5},
    "past": {"lam": 1e-3, "alpha": 1.5},
    "label_smoothing": {"smoothing": 0.2},
    "confidence_penalty": {"beta": 0.2},
    "weight_penalty": {"l1": 1e-3, "l2": 1e-3},
    "adversarial_regularization": {"lam": 0.5, "attack_steps": 2},
    "mixup_mmd": {"mixup_alpha": 0.4, "lam": 1.0},
    "dpsgd": {"noise_multiplier": 0.5, "accountant": "rdp", "fix": True},
}


def defense(name):
    against = ("past", "adversarial_regularization", "mixup_mmd")
    extra = {"nonmembers": loader(300, 360)} if name in against else {}
    return create_defense(name, **SETTINGS[name], **extra)


def start():
    model, vanilla = trained(epochs=5)
    model.net[4].p = 0.0  # dropout draws random numbers that a checkpoint does not carry
    return model, vanilla


def cwrf(vanilla, on):
    if not on:
        return []
    return [
        PrivacyScoringCallback(loader(100, 140), vanilla, steps=2),
        CriticalRewindCallback(0.1),
        GradientMaskCallback(),
    ]


def test_every_registered_defense_is_tested():
    assert set(available_defenses()) == set(SETTINGS)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("with_cwrf", [False, True], ids=["scratch", "cwrf"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_defense_trains_and_resumes_to_the_same_weights(tmp_path, name, with_cwrf, precision):
    ends = []
    for stops in ([2], [1, 2]):
        for i, stop in enumerate(stops):
            model, vanilla = start()
            defense(name).attach(model)
            before = {n: t.clone() for n, t in model.state_dict().items()}
            vanilla = {n: t for n, t in vanilla.items() if n in before}  # DP-SGD's fix=True takes BatchNorm's away
            callbacks = cwrf(vanilla, with_cwrf)
            run = trainer(tmp_path, max_epochs=stop, callbacks=callbacks, precision=precision)
            torch.manual_seed(1)
            run.fit(model, loader(0, 64), ckpt_path=tmp_path / "half.ckpt" if i else None)
            run.save_checkpoint(tmp_path / "half.ckpt")
        ends.append(model.state_dict())
        assert any(not torch.equal(before[n], t) for n, t in ends[-1].items())
        if with_cwrf:
            for n, m in callbacks[1].mask.masks.items():
                assert torch.equal(ends[-1][n][m], vanilla[n][m])
    assert all(torch.equal(ends[0][n], t) for n, t in ends[1].items())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("hamp", {"gamma": 1.1}, r"gamma must be a number in \[0, 1\], not 1\.1"),
        ("hamp", {"alpha": -1}, "alpha must be a number of at least 0, not -1"),
        ("ccl", {"alpha": 2}, r"alpha must be a number in \[0, 1\], not 2"),
        ("ccl", {"beta": 0}, "beta must be a number above 0, not 0"),
        ("ccl", {"kind": "ccc"}, "kind must be"),
        ("past", {"nonmembers": [], "lam": -1}, "lam must be a number of at least 0"),
        ("past", {"nonmembers": [], "alpha": math.inf}, "alpha must be a number of at least 0, not inf"),
        ("label_smoothing", {"smoothing": 1.0}, r"smoothing must be a number in \[0, 1\), not 1"),
        ("confidence_penalty", {"beta": -0.1}, "beta must be a number of at least 0"),
        ("weight_penalty", {"l1": -1}, "l1 must be a number of at least 0"),
        ("relaxloss", {"upper": 2}, r"upper must be a number in \(0, 1\], not 2"),
        ("adversarial_regularization", {"nonmembers": [], "lam": -1}, "lam must be a number of at least 0"),
        (
            "adversarial_regularization",
            {"nonmembers": [], "attack_steps": 0},
            "attack_steps must be an integer of at least 1",
        ),
        ("adversarial_regularization", {"nonmembers": [], "attack_lr": 0}, "attack_lr must be a number above 0"),
        ("mixup_mmd", {"nonmembers": [], "mixup_alpha": 0}, "mixup_alpha must be a number above 0"),
        ("mixup_mmd", {"nonmembers": [], "bandwidth": -1}, "bandwidth must be a number above 0"),
        ("mixup_mmd", {"nonmembers": [], "lam": math.inf}, "lam must be a number of at least 0, not inf"),
        ("dpsgd", {}, "one of target_epsilon and noise_multiplier"),
        ("dpsgd", {"target_epsilon": 1, "noise_multiplier": 1}, "and not both"),
        ("dpsgd", {"target_epsilon": 0}, r"target_epsilon must be a number in \(0, 100\], not 0"),
        ("dpsgd", {"target_epsilon": 1000}, r"in \(0, 100\], not 1000.*A larger one promises nothing"),
        ("dpsgd", {"noise_multiplier": -1}, "noise_multiplier must be a number of at least 0"),
        ("dpsgd", {"noise_multiplier": 1, "target_delta": 1}, r"target_delta must be a number in \(0, 1\), not 1"),
        ("dpsgd", {"noise_multiplier": 1, "max_grad_norm": 0}, "max_grad_norm must be a number above 0"),
        (
            "dpsgd",
            {"noise_multiplier": 1, "max_grad_norm": math.inf},
            r"not inf\. It may be infinite",
        ),
        (
            "dpsgd",
            {"noise_multiplier": 1, "accountant": "moments"},
            "must be 'prv' or 'rdp' or 'gdp', not 'moments'",
        ),
        (
            "dpsgd",
            {"noise_multiplier": 1, "max_physical_batch_size": 0},
            "size must be an integer of at least 1",
        ),
        ("relxloss", {}, "no defense 'relxloss'; available: adversarial_regularization, ccl"),
    ],
)
def test_invalid_settings_raise_when_the_defense_is_made(name, settings, message):
    with pytest.raises(ValueError, match=message):
        create_defense(name, **settings)


def test_misuse():
    with pytest.raises(TypeError, match="alhpa"):
        create_defense("relaxloss", alhpa=1)
    with pytest.raises(MisconfigurationException, match="PAST needs data the model is not trained on"):
        PASTMixin.attach(Classifier())
    with pytest.raises(ValueError, match="are members"):
        trainer().fit(PASTMixin.attach(Classifier(), nonmembers=loader(60, 80)), loader(0, 64))
    with pytest.raises(ValueError, match="nonmembers holds no batch"):
        trainer().fit(PASTMixin.attach(Classifier(), nonmembers=[]), loader(0, 64))
    with pytest.raises(ValueError, match="classes must be an integer of at least 2"):
        hamp_target_probability(1, 0.5)
    with pytest.raises(ValueError, match="already"):
        register_defense("ccl")(PASTMixin)
    with pytest.raises(TypeError, match="is neither a DefenseMixin nor a Defense"):
        register_defense("plain")(nn.Linear)
    with pytest.raises(TypeError, match="a defense's name must be a string"):
        register_defense(PASTMixin)
    with pytest.raises(ValueError, match="60 of the 60 examples of nonmembers are members"):
        trainer().fit(PASTMixin.attach(Classifier(), nonmembers=loader(0, 60)), loader(0, 64))
    for name, settings in (("past", {"lam": "1"}), ("hamp", {"gamma": None}), ("dpsgd", {"noise_multiplier": True})):
        extra = {"nonmembers": []} if name == "past" else {}
        with pytest.raises(TypeError, match=f"{next(iter(settings))} must be float"):
            create_defense(name, **settings, **extra)
    with pytest.raises(TypeError, match=r"max_physical_batch_size must be int or None, not 2\.5"):
        create_defense("dpsgd", noise_multiplier=1, max_physical_batch_size=2.5)
    with pytest.raises(TypeError, match="HAMP has no setting gama; it has gamma, alpha"):
        create_defense("hamp", gama=1)


def test_a_third_party_registers_in_one_line():
    with DEFENSES.temporary():

        @register_defense("sharpened")
        class Sharpened(DefenseMixin):
            def defense_loss(self, logits, targets):
                return F.cross_entropy(2 * logits, targets)

        assert "sharpened" in available_defenses()
        made = create_defense("sharpened")
        assert made.mixin is Sharpened
        model = made.attach(Small())
        batch = next(iter(loader(0, 16)))
        expected = F.cross_entropy(2 * model(batch[0]), batch[1])
        run = trainer(max_steps=1)
        run.fit(model, loader(0, 16))
        torch.testing.assert_close(run.callback_metrics["train_loss"], expected.detach())
    assert "sharpened" not in available_defenses()
