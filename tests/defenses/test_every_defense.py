"""Every defense: its training, alone and with CWRF, resumes to the same weights; invalid settings raise."""

import math

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback
from lightning_cwrf.defenses import (
    DefenseMixin,
    PASTMixin,
    available_defenses,
    create_defense,
    hamp_target_probability,
    register_defense,
)
from lightning_cwrf.defenses.registry import DEFENSES
from tests.defenses.cases import SETTINGS, Small, defense, start
from tests.helpers import Classifier, loader, trainer


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
@pytest.mark.parametrize("with_cwrf", [pytest.param(False, marks=pytest.mark.slow), True], ids=["scratch", "cwrf"])
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
        ("dpsgd", {"noise_multiplier": 1, "clipping": "layer"}, "'adaptive' or 'automatic', not 'layer'"),
        ("dpsgd", {"noise_multiplier": 1, "stability": 0.1}, 'stability is of clipping="automatic" and does nothing'),
        (
            "dpsgd",
            {"noise_multiplier": 0, "max_grad_norm": math.inf, "clipping": "automatic"},
            "max_grad_norm must be a number above 0, not inf",
        ),
        (
            "dpsgd",
            {"noise_multiplier": 0, "unclipped_num_std": 1, "clipping": "adaptive"},
            "leave out unclipped_num_std",
        ),
        (
            "dpsgd",
            {"noise_multiplier": 1, "layer_norms": {"a": 0}, "clipping": "per_layer"},
            r"layer_norms\['a'\] must be a number above 0",
        ),
        (
            "dpsgd",
            {"noise_multiplier": 1, "layer_norms": {"a": 1}, "max_grad_norm": 0.5, "clipping": "per_layer"},
            "pass one of the two",
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
