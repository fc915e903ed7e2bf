"""Invalid settings and inputs raise as soon as they are given, for the functions and for the mixins."""

import dataclasses
import inspect
import math
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_cwrf.classification import check_targets, classification_step
from lightning_cwrf.defenses import (
    Defense,
    DefenseMixin,
    HAMPOutput,
    RelaxLossMixin,
    adversarial_regularization_loss,
    attack_gain,
    ccl_loss,
    confidence_penalty_loss,
    create_defense,
    defense_class,
    hamp_loss,
    hamp_target_probability,
    label_smoothing_loss,
    mixup_loss,
    mmd2,
    past_penalty,
    past_weights,
    relaxloss_loss,
    weight_penalty,
)
from lightning_cwrf.defenses.adversarial import AttackNetwork
from tests.helpers import Classifier, part, trainer

Z, Y = torch.zeros(3, 4), torch.tensor([0, 1, 3])
WITH_DATA = {"past", "adversarial_regularization", "mixup_mmd"}

# By defense and setting: the smallest number below the range, and the smallest above (None: there is none).
NUMBERS = {
    ("relaxloss", "alpha"): (-1e-9, math.inf),
    ("relaxloss", "upper"): (0, 1 + 1e-9),
    ("hamp", "gamma"): (-1e-9, 1 + 1e-9),
    ("hamp", "alpha"): (-1e-9, math.inf),
    ("ccl", "alpha"): (-1e-9, 1 + 1e-9),
    ("ccl", "beta"): (0, math.inf),
    ("past", "lam"): (-1e-9, math.inf),
    ("past", "alpha"): (-1e-9, math.inf),
    ("label_smoothing", "smoothing"): (-1e-9, 1.0),
    ("confidence_penalty", "beta"): (-1e-9, math.inf),
    ("weight_penalty", "l1"): (-1e-9, math.inf),
    ("weight_penalty", "l2"): (-1e-9, math.inf),
    ("adversarial_regularization", "lam"): (-1e-9, math.inf),
    ("adversarial_regularization", "attack_lr"): (0, math.inf),
    ("mixup_mmd", "mixup_alpha"): (0, math.inf),
    ("mixup_mmd", "lam"): (-1e-9, math.inf),
    ("mixup_mmd", "bandwidth"): (0, math.inf),
    ("dpsgd", "noise_multiplier"): (-1e-9, math.inf),
    ("dpsgd", "target_epsilon"): (0, 100 + 1e-9),
    ("dpsgd", "target_delta"): (0, 1),
    ("dpsgd", "max_grad_norm"): (0, math.inf),
    ("dpsgd", "target_unclipped_quantile"): (0, 1),
    ("dpsgd", "clipbound_learning_rate"): (0, math.inf),
    ("dpsgd", "unclipped_num_std"): (0, math.inf),
    ("dpsgd", "stability"): (0, math.inf),
    ("dpsgd", "noise_gamma"): (0, math.inf),
}
# Numbers at the very ends of the ranges, which are taken.
ENDS = {
    ("relaxloss", "alpha"): [0],
    ("relaxloss", "upper"): [1e-9, 1],
    ("hamp", "gamma"): [0, 1],
    ("hamp", "alpha"): [0],
    ("ccl", "alpha"): [0, 1],
    ("past", "lam"): [0],
    ("past", "alpha"): [0],
    ("label_smoothing", "smoothing"): [0, 1 - 1e-9],
    ("confidence_penalty", "beta"): [0],
    ("weight_penalty", "l1"): [0],
    ("adversarial_regularization", "lam"): [0],
    ("mixup_mmd", "lam"): [0],
    ("dpsgd", "noise_multiplier"): [0],
    ("dpsgd", "target_epsilon"): [1e-9, 100],
}
# The clipping of DP-SGD that has a setting.
CLIPPING = {
    "target_unclipped_quantile": "adaptive",
    "clipbound_learning_rate": "adaptive",
    "unclipped_num_std": "adaptive",
    "stability": "automatic",
}


def given(name, setting, value):
    extra = {"nonmembers": [(Z, Y)]} if name in WITH_DATA else {}
    if name == "dpsgd" and setting not in ("noise_multiplier", "target_epsilon"):
        extra["noise_multiplier"] = 1.0
    extra.update({"clipping": CLIPPING[setting]} if setting in CLIPPING else {})
    return {setting: value, **extra}


def ways(name, setting, value):
    """By name, by attaching to a module, and by the class's constructor."""
    settings = given(name, setting, value)
    mixin = create_defense(name, **given(name, *GOOD[name])).mixin
    own = type("Own", (mixin, Classifier), {})
    yield lambda: create_defense(name, **settings)
    yield lambda: mixin.attach(Classifier(), **settings)
    yield lambda: own(**settings)


GOOD = {name: (setting, 0.5) for name, setting in NUMBERS}


@pytest.mark.parametrize(("name", "setting"), NUMBERS, ids=lambda v: v)
def test_numbers_out_of_range_or_of_another_type(name, setting):
    for value in (*NUMBERS[name, setting], math.nan, -math.inf):
        for way in ways(name, setting, value):
            with pytest.raises(ValueError, match=setting):
                way()
    wrong = ["0.5", True, torch.tensor(0.5), [0.5]]
    optional = name == "dpsgd" and setting in ("noise_multiplier", "target_epsilon", "unclipped_num_std")
    for value in wrong if optional else [*wrong, None]:
        for way in ways(name, setting, value):
            with pytest.raises(TypeError, match=setting):
                way()
    for value in (*ENDS.get((name, setting), []), np.float32(0.5), np.float64(0.5), 0.5):
        assert create_defense(name, **given(name, setting, value)).settings[setting] == value


@pytest.mark.parametrize(
    ("name", "setting", "error", "values"),
    [
        ("ccl", "kind", ValueError, ["ccc", "CCEL", ""]),
        ("ccl", "kind", TypeError, [None, 1]),
        ("adversarial_regularization", "attack_steps", ValueError, [0, -1]),
        ("adversarial_regularization", "attack_steps", TypeError, [1.0, "1", True, None]),
        ("dpsgd", "accountant", ValueError, ["moments", "PRV"]),
        ("dpsgd", "accountant", TypeError, [None, 1]),
        ("dpsgd", "max_physical_batch_size", ValueError, [0, -3]),
        ("dpsgd", "max_physical_batch_size", TypeError, [2.0, "2", True]),
        ("dpsgd", "clipping", ValueError, ["layer", "FLAT"]),
        ("dpsgd", "clipping", TypeError, [None, 1]),
        ("dpsgd", "noise_step_size", ValueError, [0, -1]),
        ("dpsgd", "noise_step_size", TypeError, [1.0, "1", True, None]),
        ("dpsgd", "ghost", TypeError, ["no", 0, None]),
        ("dpsgd", "fix", TypeError, ["no", 0, None]),
        ("dpsgd", "from_scratch", TypeError, ["yes", 1, None]),
    ],
)
def test_choices_integers_and_flags(name, setting, error, values):
    for value in values:
        for way in ways(name, setting, value):
            with pytest.raises(error, match=setting):
                way()


FUNCTIONS = {
    ("relaxloss", "alpha"): lambda v: relaxloss_loss(Z, Y, alpha=v, epoch=0),
    ("relaxloss", "upper"): lambda v: relaxloss_loss(Z, Y, alpha=1, upper=v, epoch=0),
    ("hamp", "gamma"): lambda v: hamp_loss(Z, Y, gamma=v),
    ("hamp", "alpha"): lambda v: hamp_loss(Z, Y, alpha=v),
    ("ccl", "alpha"): lambda v: ccl_loss(Z, Y, alpha=v),
    ("ccl", "beta"): lambda v: ccl_loss(Z, Y, beta=v),
    ("past", "lam"): lambda v: past_penalty({"a.w": torch.ones(2)}, {"a.w": torch.ones(2)}, lam=v),
    ("past", "alpha"): lambda v: past_weights({"a.w": torch.ones(2)}, alpha=v),
    ("label_smoothing", "smoothing"): lambda v: label_smoothing_loss(Z, Y, smoothing=v),
    ("confidence_penalty", "beta"): lambda v: confidence_penalty_loss(Z, Y, beta=v),
    ("weight_penalty", "l1"): lambda v: weight_penalty([Z], l1=v),
    ("weight_penalty", "l2"): lambda v: weight_penalty([Z], l2=v),
    ("adversarial_regularization", "lam"): lambda v: adversarial_regularization_loss(Z, Y, torch.zeros(3), lam=v),
    ("mixup_mmd", "bandwidth"): lambda v: mmd2(Z, Z, bandwidth=v),
}


@pytest.mark.parametrize(("name", "setting"), FUNCTIONS, ids=lambda v: v)
def test_the_functions_check_their_numbers_too(name, setting):
    call = FUNCTIONS[name, setting]
    for value in (*NUMBERS[name, setting], math.nan):
        with pytest.raises(ValueError, match=f"{setting} must be"):
            call(value)
    for value in ("0.5", True, None):
        with pytest.raises(TypeError, match=f"{setting} must be"):
            call(value)
    call(0.5)


@pytest.mark.parametrize(
    ("epoch", "error"), [(-1, ValueError), (0.5, TypeError), (1.0, TypeError), ("1", TypeError), (True, TypeError)]
)
def test_the_epoch_of_relaxloss(epoch, error):
    with pytest.raises(error, match="epoch must be an integer"):
        relaxloss_loss(Z, Y, alpha=1.0, epoch=epoch)
    assert relaxloss_loss(Z, Y, alpha=1.0, epoch=np.int64(2)) == relaxloss_loss(Z, Y, alpha=1.0, epoch=0)


def test_other_numbers_of_the_functions():
    with pytest.raises(ValueError, match=r"weight must be a number in \[0, 1\], not 1\.5"):
        mixup_loss(Z, Y, Y, 1.5)
    with pytest.raises(TypeError, match="weight must be a number"):
        mixup_loss(Z, Y, Y, "0.5")
    assert hamp_target_probability(2, 0.5) > 0.5  # a known answer does not let 2.0 through
    with pytest.raises(TypeError, match="classes must be an integer"):
        hamp_target_probability(2.0, 0.5)
    with pytest.raises(ValueError, match="gamma must be a number"):
        hamp_target_probability(2, math.nan)
    with pytest.raises(ValueError, match=r"membership_logits must have shape \(3,\).*not \(3, 1\)"):
        adversarial_regularization_loss(Z, Y, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="no gain of 0 members and 2 non-members"):
        attack_gain(torch.zeros(0), torch.zeros(2))
    with pytest.raises(ValueError, match="no gain of 2 members and 0 non-members"):
        attack_gain(torch.zeros(2), torch.zeros(0))
    with pytest.raises(ValueError, match="classes must be an integer of at least 2"):
        AttackNetwork(1)
    wrong = [(Z, torch.zeros(3, 1)), (Z[0], Z[0]), (Z, Z[:0]), (Z[:0], Z), (Z[0], Z), (Z, Z[0]), (Z[None], Z[0])]
    for a, b in (*wrong, (torch.zeros(3, 4, 1), Z), (Z, torch.zeros(3, 4, 1))):
        with pytest.raises(ValueError, match="mmd2 needs two samples"):
            mmd2(a, b)
    with pytest.raises(ValueError, match="no parameters to penalise: all weights are frozen"):
        weight_penalty([], l1=1.0)


LOSSES = {
    "relaxloss even": lambda z, y: relaxloss_loss(z, y, alpha=5.0, epoch=0),
    "relaxloss odd": lambda z, y: relaxloss_loss(z, y, alpha=5.0, epoch=1, upper=0.3),
    "hamp": hamp_loss,
    "ccl": ccl_loss,
    "label_smoothing": label_smoothing_loss,
    "confidence_penalty": confidence_penalty_loss,
    "adversarial_regularization": lambda z, y: adversarial_regularization_loss(z, y, torch.zeros(len(z))),
    "mixup": lambda z, y: mixup_loss(z, y, y.flip(0), 0.3),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_any_integer_type_give_the_same_loss(name, dtype):
    z = torch.randn(3, 4)
    assert torch.equal(LOSSES[name](z, Y.to(dtype)), LOSSES[name](z, Y))


def test_checked_targets_are_int64():
    assert check_targets(Z, Y.int()).dtype == torch.int64
    assert classification_step(nn.Linear(2, 4), (torch.zeros(3, 2), Y.int()))[1].dtype == torch.int64
    with pytest.raises(ValueError, match="label 4 is out of range"):
        check_targets(Z, torch.tensor([0, 4, 1], dtype=torch.uint8))


@pytest.mark.parametrize("name", sorted({name for name, _ in NUMBERS}))
def test_every_defense_trains_on_int32_labels(name):
    data = [(x, y.int()) for x, y in part(0, 32)]
    extra = {"nonmembers": [(x, y.int()) for x, y in part(300, 400)]} if name in WITH_DATA else {}
    if name in ("past", "adversarial_regularization"):
        extra = {"nonmembers": DataLoader(extra["nonmembers"], batch_size=16)}
    if name == "mixup_mmd":
        extra = {"nonmembers": DataLoader(extra["nonmembers"], batch_size=16)}
    if name == "dpsgd":
        extra = {"noise_multiplier": 1.0, "fix": True, "accountant": "rdp"}
    run = trainer(max_steps=2)
    run.fit(create_defense(name, **extra).attach(Classifier()), DataLoader(data, batch_size=16))
    assert math.isfinite(run.callback_metrics["train_loss"])


def _tempered(annotation):
    """A defense whose check of values leaves the types out."""
    options = {"frozen": True, "namespace": {"__post_init__": lambda self: None}}
    made = dataclasses.make_dataclass("Tempered", [("t", annotation, 2.0)], bases=(Defense,), **options)
    return type("TemperedMixin", (DefenseMixin,), {}, settings=made)


@pytest.mark.parametrize(
    ("annotation", "good", "wrong_type", "wrong_value"),
    [
        (float, [3, 3.5, np.float32(1)], ["3", True, None], [math.nan]),
        ("float", [3, 3.5], ["3", True, None], [math.nan]),
        (float | None, [3, None], ["3", True], [math.nan]),
        ("float | None", [3, None], ["3", True], [math.nan]),
        (int, [3], [3.0, "3", True, None], []),
        (bool, [True], ["no", 1, None], []),
        (str, ["a"], [1, None], []),
        (None, [None], [0, "a"], []),
        (Literal["a", "b"], ["a"], [1, None], ["c"]),
        (Literal["a"] | None, ["a", None], [1], ["c"]),
        (list[int], [[1], "x", None], [], []),  # not checked
        ("SomethingElse", [1, "x", None], [], []),
    ],
)
def test_a_defense_of_the_user_is_checked_by_its_annotations(annotation, good, wrong_type, wrong_value):
    mixin = _tempered(annotation)
    own = type("Own", (mixin, Classifier), {})
    ways = [lambda t: mixin.attach(Classifier(), t=t), lambda t: own(t=t)]
    ways.append(lambda t: mixin.defense_class(t=t).attach(Classifier()))
    for value in good:
        for way in ways:
            assert way(value).defense_settings["t"] is value
    for values, error in ((wrong_type, TypeError), (wrong_value, ValueError)):
        for value in values:
            for way in ways:
                with pytest.raises(error, match="Tempered: t must be"):
                    way(value)


def test_a_class_instead_of_a_name_or_a_module_raises():
    with pytest.raises(TypeError, match="takes the name of a defense, such as 'relaxloss', not <class"):
        create_defense(RelaxLossMixin)
    with pytest.raises(TypeError, match=r"takes the name of a defense, .*not \['relaxloss'\]"):
        create_defense(["relaxloss"])
    with pytest.raises(TypeError, match="needs a LightningModule, not the class Classifier itself: make an instance"):
        RelaxLossMixin.attach(Classifier)
    with pytest.raises(TypeError, match="needs a LightningModule, not str"):
        RelaxLossMixin.attach("Classifier")


def _defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def test_defaults_of_the_functions():
    """As on the pages, which tests/defenses/test_registry.py compares with the settings."""
    for name, function in (("hamp", hamp_loss), ("ccl", ccl_loss), ("label_smoothing", label_smoothing_loss),
                           ("confidence_penalty", confidence_penalty_loss)):  # fmt: skip
        assert _defaults(function) == {f.name: f.default for f in dataclasses.fields(defense_class(name))}
    assert _defaults(weight_penalty) == {"l1": 0.0, "l2": 0.0}
    assert _defaults(relaxloss_loss) == {"upper": 1.0}
    assert _defaults(adversarial_regularization_loss) == {"lam": 1.0}
    assert _defaults(mmd2) == {"bandwidth": 1.0}
    assert _defaults(HAMPOutput.__init__) == {"low": 0.0, "high": 1.0, "seed": 0}
