"""Wrong uses of data and models: an early error or a warning that states the problem and the fix."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from lightning_cwrf import MIAAuditCallback, PrivacyScoringCallback
from lightning_cwrf.auditing import audit
from lightning_cwrf.classification import classification_step
from lightning_cwrf.defenses import create_defense
from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.weights.scores import learnability_scores, privacy_vulnerability_scores
from tests.helpers import Classifier, digits, loader, part, trained, trainer

MEMBERS, OTHERS = part(0, 60), part(100, 160)
X, Y = digits().tensors


def run(**settings):
    return audit(**{"model": Classifier(), "members": MEMBERS, "nonmembers": OTHERS, **settings})


class Wide(nn.Module):
    """Another number of classes on some batches."""

    def forward(self, x):
        return torch.randn(len(x), 10 + (len(x) == 4))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": Classifier}, TypeError, "needs a finished module, not the class Classifier; make one"),
        ({"model": "model.ckpt"}, TypeError, "needs a finished module, not str"),
        ({"nonmembers": iter(loader(100, 160))}, TypeError, "nonmembers: a .* can be read only once"),
        (
            {"nonmembers": (batch for batch in loader(100, 160))},
            TypeError,
            "nonmembers: a generator can be read only once",
        ),
        ({"nonmembers": TensorDataset(X[:0], Y[:0])}, ValueError, "nonmembers holds no batch"),
        ({"members": {"a": loader(0, 60)}}, TypeError, "members: expected .* instead of several loaders pass one"),
        (
            {"nonmembers": [loader(100, 130), loader(130, 160)]},
            TypeError,
            "nonmembers: expected .* a list of DataLoaders",
        ),
        ({"nonmembers": X[100:160].numpy()}, TypeError, "nonmembers: expected .* not ndarray"),
        ({"nonmembers": None}, TypeError, "nonmembers: expected .* not NoneType"),
        ({"nonmembers": [(X[:4], Y[:4], Y[:4])]}, TypeError, "a batch must be .* not a tuple of length 3"),
        ({"nonmembers": [(X[100:108].numpy(), Y[100:108].numpy())]}, TypeError, "they are NumPy arrays; pass tensors"),
        (
            {"nonmembers": TensorDataset(X[100:160].double(), Y[100:160])},
            TypeError,
            r"they are torch.float64 .*x\.float\(\)",
        ),
        (
            {"model": Wide(), "nonmembers": DataLoader(OTHERS, 7)},
            ValueError,
            "gives 10 and 11 classes on different batches",
        ),
        ({"views": [], "attacks": ["augmentation"]}, TypeError, "views must be a list of functions"),
        ({"views": 3, "attacks": ["augmentation"]}, TypeError, "views must be a list of functions"),
        ({"views": [3], "attacks": ["augmentation"]}, TypeError, "views must be a list of functions"),
        ({"shadow_resamples": 10.0}, TypeError, "shadow_resamples must be an integer"),
        ({"shadow_resamples": True}, TypeError, "shadow_resamples must be an integer"),
        ({"shadow_resamples": -1}, ValueError, "shadow_resamples must be an integer of at least 0"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"confidence": "0.95"}, TypeError, "confidence must be a number"),
        ({"confidence": 95}, ValueError, r"confidence must be a number in \(0, 1\)"),
        ({"confidence": float("nan")}, ValueError, "confidence must be a number"),
    ],
)
def test_invalid_arguments_raise(settings, error, message):
    # Double inputs are no fault of a model that takes them.
    with pytest.raises(error, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_any_integer_type_are_taken(dtype):
    torch.manual_seed(0)
    model, vanilla = trained()
    data = [TensorDataset(X[a:b], Y[a:b].to(dtype)) for a, b in ((0, 64), (100, 160))]
    same = run(model=model, members=part(0, 64))
    assert run(model=model, members=data[0], nonmembers=data[1]).values() == same.values()
    scores = [
        privacy_vulnerability_scores(model, vanilla, *sides, steps=2) for sides in (data, (part(0, 64), part(100, 160)))
    ]
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])
    for defense in ("relaxloss", "hamp", "ccl", "label_smoothing"):
        trainer(max_epochs=1).fit(create_defense(defense).attach(trained()[0]), DataLoader(data[0], batch_size=16))


def test_labels_that_are_not_classes_raise():
    for targets in (torch.zeros(4), torch.zeros(4).bool(), torch.zeros(4, 2).long()):
        with pytest.raises(ValueError, match="targets must be class indices"):
            classification_step(nn.Linear(2, 3), (torch.zeros(4, 2), targets))


class Casts(nn.Module):
    """Takes inputs of any type."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(torch.as_tensor(x).float().flatten(1))


def test_models_that_take_other_types_may_have_them():
    wide = TensorDataset(X[100:160].double(), Y[100:160])
    arrays = [(X[100:160].numpy(), Y[100:160].numpy())]
    for nonmembers in (wide, arrays):
        assert len(run(model=Casts(), nonmembers=nonmembers).losses) == 120


def test_a_half_precision_module_without_a_precision_plugin_raises():
    model = Classifier().bfloat16()
    with pytest.raises(TypeError, match=r"they are torch.float32 and the weights torch.bfloat16; convert .*bf16-true"):
        classification_step(model, (X[:4], Y[:4]))
    assert len(run(model=model).losses) == 120  # an audit brings batches to the model's type


def test_an_error_of_the_model_itself_is_not_changed():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        classification_step(Broken(), (X[:4], Y[:4]))


@pytest.mark.parametrize(
    "use",
    [
        lambda model: run(model=model),
        lambda model: trainer(max_epochs=1, callbacks=[MIAAuditCallback(OTHERS)]).fit(model, DataLoader(MEMBERS, 20)),
        lambda model: privacy_vulnerability_scores(model, Classifier(), MEMBERS, OTHERS, steps=1),
    ],
)
def test_sigmoid_outputs_warn(use):
    model = Classifier()
    model.net.add_module("6", nn.Sigmoid())
    with pytest.warns(UserWarning, match=r"outputs on .* lie between 0 and 1, as those of a sigmoid.*before the sig"):
        use(model)


@pytest.mark.slow
def test_small_logits_are_not_taken_for_a_sigmoid(memorised):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model=memorised)
        zero = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        nn.init.zeros_(zero[1].weight)
        nn.init.zeros_(zero[1].bias)
        collect_outputs(zero, OTHERS)
        collect_outputs(nn.Sequential(zero, nn.LogSoftmax(1)), OTHERS)


@pytest.fixture(scope="module")
def memorised():
    torch.manual_seed(0)
    model = Classifier(width=16)
    trainer(max_epochs=40).fit(model, DataLoader(MEMBERS, batch_size=16, shuffle=True))
    return model


def test_swapped_sides_warn(memorised):
    with pytest.warns(UserWarning, match=r"better on examples that it never saw than on the members \(acc.*swapped"):
        result = run(model=memorised, members=OTHERS, nonmembers=MEMBERS)
    assert any("swapped" in note for note in result.notes())
    assert "does better on examples that it never saw" in str(result)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(model=memorised).remarks == []


def test_the_audit_of_an_untrained_model_warns():
    """Attacks find nothing in it, so its audit looks safe."""
    with pytest.warns(UserWarning, match="no better on its training data than guessing: .* finished weights loaded"):
        assert run(model=Classifier()).estimates["loss"]["auroc"].interval.low < 0.5


def test_swapped_sides_warn_in_scoring(memorised):
    memorised = copy.deepcopy(memorised)  # a model records what it was scored with
    with pytest.warns(UserWarning, match=r"loss is .* on the members and .* on the reference data: it was probably"):
        privacy_vulnerability_scores(memorised, Classifier(width=16), OTHERS, MEMBERS, steps=1)
    scoring = PrivacyScoringCallback(MEMBERS, Classifier(width=16), steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        privacy_vulnerability_scores(memorised, Classifier(width=16), MEMBERS, OTHERS, steps=1)
        learnability_scores(memorised, OTHERS, steps=1)
    with pytest.warns(UserWarning, match="Are members and nonmembers swapped"):
        trainer(max_epochs=1, callbacks=[scoring]).fit(memorised, DataLoader(OTHERS, batch_size=20))


@pytest.mark.parametrize("side", ["members", "nonmembers", "population"])
def test_a_side_of_another_scale_warns(side, memorised):
    sides = {"members": MEMBERS, "nonmembers": OTHERS, "population": part(200, 260)}
    sides[side] = TensorDataset(*(torch.stack([sides[side][i][k] for i in range(60)]) for k in (0, 1)))
    sides[side] = TensorDataset(sides[side].tensors[0] * 255, sides[side].tensors[1])
    with pytest.warns(UserWarning, match=r"the inputs of the members have mean .* are both preprocessed as in"):
        result = run(model=memorised, attacks=["loss", "attack_p"], **sides)
    assert result.remarks


def test_the_callbacks_remarks_are_warnings(memorised):
    flipped = TensorDataset(X[100:160] * 255, Y[100:160])
    with pytest.warns(UserWarning, match="are both preprocessed as in training"):
        trainer(max_epochs=1, callbacks=[MIAAuditCallback(flipped)]).fit(Classifier(), DataLoader(MEMBERS, 20))


@pytest.mark.parametrize("name", ["past", "adversarial_regularization", "mixup_mmd"])
def test_invalid_non_members_of_a_defense(name):
    for wrong, error in (({"a": loader(100, 160)}, TypeError), ("data", TypeError), (X.numpy(), TypeError)):
        with pytest.raises(error, match="nonmembers: expected a DataLoader"):
            create_defense(name, nonmembers=wrong)


def test_an_empty_reference_data_set_raises():
    model, vanilla = trained()
    for empty in (TensorDataset(X[:0], Y[:0]), DataLoader(TensorDataset(X[:0], Y[:0])), []):
        with pytest.raises(ValueError, match="nonmembers holds no batch"):
            privacy_vulnerability_scores(model, vanilla, MEMBERS, empty, steps=1)
        with pytest.raises(ValueError, match="nonmembers holds no batch"):
            run(nonmembers=empty)


@pytest.mark.parametrize(("wrong", "error"), [(2.0, TypeError), (True, TypeError), ("5", TypeError), (-1, ValueError)])
def test_settings_of_the_callback(wrong, error):
    with pytest.raises(error, match="every_n_epochs must be an integer"):
        MIAAuditCallback(OTHERS, every_n_epochs=wrong)
    for name in ("", 3, None):
        with pytest.raises(TypeError, match="name must be a non-empty string"):
            MIAAuditCallback(OTHERS, name=name)


def test_numpy_targets_are_taken():
    _, targets = classification_step(Classifier(), (X[:4], np.array([1, 2, 3, 4], dtype=np.int32)))
    assert targets.dtype == torch.int64


def test_copies_on_a_side_warn(memorised):
    """Ten copies of each member make an interval of 60 examples as narrow as one of 600."""
    members, others = part(0, 60), part(100, 160)
    for given in ({"members": ConcatDataset([members] * 10)}, {"nonmembers": ConcatDataset([others] * 10)}):
        with pytest.warns(UserWarning, match=r"540 of the 600 (non-)?members are copies of others"):
            audit(memorised, **{"members": members, "nonmembers": others, **given})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audit(memorised, members=ConcatDataset([members, part(0, 1)]), nonmembers=others)


def test_a_model_with_random_outputs_warns():
    class Dropped(Classifier):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x))  # without training=self.training

    with pytest.warns(UserWarning, match="the model gives other outputs each time for the same inputs"):
        audit(Dropped(), members=part(0, 60), nonmembers=part(100, 160))
