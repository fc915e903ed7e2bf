"""What the preflight finds, on models and data that are wrong in one way each."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_cwrf import check, create_defense
from lightning_cwrf.preflight import Finding, Preflight
from lightning_cwrf.weights.vanilla import capture
from tests.helpers import Classifier, digits, loader, part, same_snapshot, snapshot, trained, trainer


class Plain(Classifier):
    """Without BatchNorm and dropout."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


class Softmaxed(Plain):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class Random(Plain):
    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), 0.5)


class Aside(Plain):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(4, 4)


class Transferred(Plain):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


class Noisy(TensorDataset):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + 0.1 * torch.randn_like(x), y


def noisy(begin, end):
    return DataLoader(Noisy(*(t[begin:end] for t in digits().tensors)), batch_size=16)


GOOD = {"reference": loader(100, 200), "nonmembers": loader(200, 300), "steps": 4}


def found(report, name):
    """The levels and texts of the findings of this name."""
    return [(each.level, f"{each.found} {each.fix}") for each in report.findings if each.name == name]


def only(report, name):
    (one,) = found(report, name)
    return one


def test_a_good_setup_has_no_error():
    model, vanilla = trained()
    report = check(model, loader(0, 64, shuffle=True), vanilla=vanilla, trainer=trainer(max_epochs=3), **GOOD)
    assert report.ok
    report.raise_for_errors()
    assert only(report, "batch form") == ("ok", "inputs float32 (16, 1, 8, 8), targets int64 (16,) ")
    assert only(report, "labels")[1].startswith("10 classes; labels: members 0 to 9")
    assert "the loss reaches" in only(report, "trainable")[1]
    assert "share no example" in only(report, "overlap")[1]
    assert [level for level, _ in found(report, "cost")] == ["ok", "ok", "ok"]
    assert "3 epochs of 4 steps" in found(report, "cost")[2][1]
    assert str(report).endswith("0 errors, 1 warning")  # too few non-members


def test_nothing_is_changed():
    model, vanilla = trained()
    model.train()
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
    before = snapshot(model)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    data = DataLoader(part(0, 64), batch_size=16, shuffle=True, generator=generator)
    kept = generator.get_state()
    check(model, data, vanilla="redraw", trainer=trainer(), **GOOD)
    check(model, data, vanilla=vanilla, **GOOD)
    same_snapshot(before, snapshot(model))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(generator.get_state(), kept)


def test_a_batch_of_another_form_is_an_error_and_nothing_else_is_read():
    x, y = digits().tensors
    report = check(Plain(), DataLoader(TensorDataset(x[:64], x[:64], y[:64]), batch_size=8))
    assert [finding.name for finding in report.findings] == ["batch form"]
    assert "define classification_step" in report.errors[0].found
    with pytest.raises(MisconfigurationException, match="1 error: batch form: a batch must be"):
        report.raise_for_errors()


def test_probabilities_are_an_error():
    level, text = only(check(Softmaxed(), loader(0, 64), **GOOD), "outputs")
    assert level == "error"
    assert "are probabilities" in text


def test_random_outputs_are_an_error():
    level, text = only(check(Random(), loader(0, 64), **GOOD), "outputs")
    assert level == "error"
    assert "other outputs each time" in text


def test_labels_out_of_range_are_an_error_on_each_side():
    x, y = digits().tensors
    wrong = DataLoader(TensorDataset(x[200:300], torch.where(y[200:300] == 9, 10, y[200:300])), batch_size=16)
    level, text = only(check(Plain(), loader(0, 64), reference=loader(100, 200), nonmembers=wrong), "labels")
    assert level == "error"
    assert text.startswith("nonmembers: label 10 is out of range: the model has 10 classes")


def test_weights_that_the_loss_does_not_reach_are_a_warning():
    levels = dict(found(check(Aside(), loader(0, 64), **GOOD), "trainable"))
    assert "unused.weight" in levels["warning"]


def test_a_frozen_model_is_an_error():
    model = Plain()
    model.requires_grad_(False)
    assert only(check(model, loader(0, 64), **GOOD), "trainable")[0] == "error"


def test_untrained_weights_are_an_error():
    model = Plain()
    report = check(model, loader(0, 64), vanilla=capture(model), **GOOD)
    level, text = found(report, "vanilla")[-1]
    assert level == "error"
    assert "the model is untrained" in text


def test_a_model_that_looks_untrained_is_an_error():
    level, text = only(check(Plain(), loader(0, 64), **GOOD), "trained")
    assert level == "error"
    assert "It looks untrained" in text
    model, vanilla = trained()
    assert only(check(model, loader(0, 64), vanilla=vanilla, **GOOD), "trained")[0] == "ok"


def test_vanilla_weights_of_another_model_are_an_error_and_none_a_warning():
    report = check(Plain(), loader(0, 64), vanilla=capture(Classifier()), **GOOD)
    level, text = only(report, "vanilla")
    assert level == "error"
    assert "were they saved from another architecture?" in text
    assert only(check(Plain(), loader(0, 64), **GOOD), "vanilla")[0] == "warning"


@pytest.mark.parametrize("sides", [{"reference": loader(50, 150)}, {"nonmembers": loader(50, 150)},
                                   {"reference": loader(100, 200), "nonmembers": loader(190, 290)}])  # fmt: skip
def test_examples_on_two_sides_are_an_error(sides):
    level, text = found(check(Plain(), loader(0, 64), **sides), "overlap")[0]
    assert level == "error"
    assert "without_overlap" in text


def test_batchnorm_is_an_error_under_dpsgd_alone():
    model, _ = trained()
    private = create_defense("dpsgd", noise_multiplier=1.0, max_grad_norm=1.0)
    level, text = only(check(model, loader(0, 64), defense=private, **GOOD), "layers")
    assert level == "error"
    assert "net.1 (BatchNorm2d mixes the examples of a batch)" in text
    level, text = only(check(model, loader(0, 64), **GOOD), "layers")
    assert level == "ok"
    assert "DP-SGD refuses 1 layers" in text
    assert "every layer" in only(check(Plain(), loader(0, 64), defense=private, **GOOD), "layers")[1]


def test_random_augmentation_is_an_error_without_plain_members():
    level, text = only(check(Plain(), noisy(0, 64), **GOOD), "augmentation")
    assert level == "error"
    assert "Pass members= a data set or a loader without random transforms" in text
    report = check(Plain(), noisy(0, 64), members=loader(0, 64), **GOOD)
    assert [level for level, _ in found(report, "augmentation")] == ["ok", "ok"]
    assert "share no example" in only(report, "overlap")[1]


def test_a_sampler_that_leaves_examples_out_is_an_error():
    few = DataLoader(part(0, 64), batch_size=16, sampler=RandomSampler(part(0, 64), num_samples=16))
    level, text = only(check(Plain(), few, trainer=trainer(max_epochs=1), **GOOD), "sampler")
    assert level == "error"
    assert "an epoch draws about 25% of the 64 examples" in text
    assert only(check(Plain(), few, trainer=trainer(max_epochs=40), **GOOD), "sampler")[0] == "ok"
    assert only(check(Plain(), few, members=part(0, 64), trainer=trainer(max_epochs=1), **GOOD), "sampler")[0] == "ok"
    limited = trainer(max_epochs=1, limit_train_batches=0.5)
    assert only(check(Plain(), loader(0, 64, shuffle=True), trainer=limited, **GOOD), "sampler")[0] == "error"


def test_weight_averaging_is_an_error():
    averaging = trainer(callbacks=[StochasticWeightAveraging(swa_lrs=1e-2)])
    level, text = only(check(Plain(), loader(0, 64), trainer=averaging, **GOOD), "devices")
    assert level == "error"
    assert "StochasticWeightAveraging" in text


def test_transfer_hooks_are_a_warning():
    level, text = only(check(Transferred(), loader(0, 64), **GOOD), "transfer hooks")
    assert level == "warning"
    assert "on_after_batch_transfer" in text
    assert found(check(Plain(), loader(0, 64), **GOOD), "transfer hooks") == []


class OneLogit(Plain):
    def __init__(self):
        super().__init__()
        self.net[-1] = nn.Linear(16, 1)

    def training_step(self, batch, batch_idx):
        weight = torch.tensor([3.0])
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1], pos_weight=weight)


class Weighted(Plain):
    def __init__(self):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(10))


def binary(begin, end):
    x, y = digits().tensors
    return DataLoader(TensorDataset(x[begin:end], (y[begin:end] > 4).float()[:, None]), batch_size=16)


def test_one_logit_is_told_as_the_model_gives_it_and_so_is_its_weighted_loss():
    report = check(OneLogit(), binary(0, 64), reference=binary(100, 200), nonmembers=binary(200, 300), steps=4)
    assert only(report, "outputs")[1].startswith("one logit for each example, (16,), read as that of class 1 of two")
    level, text = only(report, "loss")
    assert level == "warning"
    assert "binary_cross_entropy_with_logits with pos_weight" in text


def test_class_weights_that_a_defense_drops_are_a_warning():
    level, text = only(check(Weighted(), loader(0, 64), **GOOD), "loss")
    assert level == "warning"
    assert "criterion has weight" in text
    assert found(check(Plain(), loader(0, 64), **GOOD), "loss") == []


def test_reference_data_that_are_validation_data_are_a_warning(tmp_path):
    given = {**GOOD, "validation": loader(150, 250)}
    level, text = only(check(Plain(), loader(0, 64), **given), "reference")
    assert level == "warning"
    assert "50 of the 100 reference examples are validation data, and whatever was chosen by them" in text
    assert found(check(Plain(), loader(0, 64), **{**given, "validation": loader(300, 400)}), "reference") == []


@pytest.mark.parametrize(("monitor", "told"), [("val_loss", True), (None, False)])
def test_a_checkpoint_that_was_chosen_on_the_reference_data_is_a_warning(monitor, told, tmp_path):
    class Validated(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    kept = ModelCheckpoint(tmp_path, monitor=monitor)
    run = trainer(max_epochs=1, callbacks=[kept], enable_checkpointing=True)
    run.fit(Validated(), loader(0, 64), loader(100, 200))
    given = {**GOOD, "validation": loader(100, 200), "checkpoint": kept.best_model_path}
    _, text = only(check(Plain(), loader(0, 64), **given), "reference")
    assert ("the checkpoint was chosen by 'val_loss' (ModelCheckpoint)" in text) is told


def test_few_nonmembers_are_a_warning_that_names_how_many_suffice():
    level, text = only(check(Plain(), loader(0, 64), **GOOD), "sizes")
    assert level == "warning"
    assert "the smallest FPR that can be seen is 0.01" in text
    assert "3688 non-members or more" in text


def test_missing_sides_are_a_warning_and_an_empty_loader_an_error():
    report = check(Plain(), loader(0, 64))
    assert "not given or not readable twice: nonmembers, reference" in only(report, "overlap")[1]
    level, text = only(check(Plain(), []), "batch form")
    assert level == "error"
    assert "the data hold no batch" in text


def test_data_that_fail_later_are_an_error():
    class Broken(TensorDataset):
        def __getitem__(self, i):
            if i == 50:
                raise OSError("image 50 is truncated")
            return super().__getitem__(i)

    broken = DataLoader(Broken(*(t[:64] for t in digits().tensors)), batch_size=16)
    level, text = only(check(Plain(), broken), "data")
    assert level == "error"
    assert text.startswith("OSError: image 50 is truncated")


WRONG = {
    "a class": ({"model": Plain}, TypeError, "check needs the finished module, not the class Plain"),
    "loaders": ({"loader": {"a": loader(0, 64)}}, TypeError, "loader: expected a DataLoader"),
    "reference": ({"reference": 3}, TypeError, "reference: expected a DataLoader"),
    "vanilla": ({"vanilla": 3}, TypeError, "vanilla must be a path"),
    "defense": ({"defense": "relaxloss"}, TypeError, r"defense must be what create_defense\(name, ...\) returns"),
    "trainer": ({"trainer": 3}, TypeError, "trainer must be a Trainer of lightning.pytorch"),
    "steps": ({"steps": 0}, ValueError, "steps must be an integer of at least 1"),
    "lam": ({"lam": 2}, ValueError, "lam must be a number in"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_raise(case):
    given, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        check(**{"model": Plain(), "loader": loader(0, 64), **given})


def test_findings_print_as_a_table():
    report = Preflight(
        (Finding("overlap", "error", "word " * 40, "Leave them out."), Finding("sizes", "warning", "few"))
    )
    lines = str(report).splitlines()
    assert lines[0].startswith("ERROR    overlap        word word")
    assert all(line.startswith(" " * 24) for line in lines[1:-2])
    assert lines[-2:] == ["warning  sizes          few", "1 error, 1 warning"]
    assert len(report.warnings) == 1
