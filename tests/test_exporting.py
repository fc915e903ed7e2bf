"""Models that are written to be given away."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from lightning_cwrf import (
    CriticalRewindCallback,
    DefenseCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    export,
)
from lightning_cwrf.auditing import AuditResult
from lightning_cwrf.defenses import RelaxLossMixin, create_defense
from lightning_cwrf.weights import weights_digest
from lightning_cwrf.weights.vanilla import load_vanilla
from tests.helpers import Classifier, HardenedClassifier, loader, trained, trainer


@pytest.fixture(scope="module")
def hardened():
    model, vanilla = trained(epochs=6)
    audit = MIAAuditCallback(loader(64, 128))
    callbacks = [
        PrivacyScoringCallback(loader(200, 240), vanilla, steps=2),
        CriticalRewindCallback(rate=0.1),
        GradientMaskCallback(),
        DefenseCallback("relaxloss", alpha=0.5),
        audit,
    ]
    trainer(callbacks=callbacks, max_epochs=1).fit(model, loader(0, 64))
    return model, audit.result


def keys_of(nest, prefix=""):
    """Every key in a nest of dicts."""
    if not isinstance(nest, dict):
        return []
    return [key for name, value in nest.items() for key in [f"{prefix}{name}", *keys_of(value, f"{prefix}{name}.")]]


def test_a_checkpoint_has_the_weights_and_hyper_parameters_alone(hardened, tmp_path):
    model, _ = hardened
    path = export(model, tmp_path / "model.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    names = {"epoch", "global_step", "pytorch-lightning_version", "state_dict", "hyper_parameters"}
    assert set(checkpoint) == names
    assert set(checkpoint["hyper_parameters"]) == {"width", "lr", "optimizer"}
    assert not [key for key in keys_of(checkpoint) if "cwrf" in key or "defense" in key]
    again = Classifier.load_from_checkpoint(path, map_location="cpu")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="from after training"):
        load_vanilla(path, Classifier())


def test_safetensors_have_the_weights_alone_in_the_format_that_others_read(hardened, tmp_path):
    model, _ = hardened
    path = export(model, tmp_path / "deep" / "model.safetensors")
    tensors = load_file(path)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        name: tuple(value.shape) for name, value in model.state_dict().items()
    }
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_the_card_says_how_it_was_hardened_what_was_found_and_what_not(hardened, tmp_path):
    model, result = hardened
    card = export(model, tmp_path / "model.ckpt", audit=result, title="Digits *v2*").with_suffix(".md").read_text()
    assert card.startswith("# Digits \\*v2\\*\n")
    mask_line = next(line for line in card.splitlines() if "rewound and held" in line)
    assert "139 of 1,386 weights" in mask_line
    for line in ("| rewinding: rate | 0.1 |", "| scoring: steps | 2 |", "| defense: name | RelaxLossMixin |"):
        assert line in card
    assert str(result.estimates["loss"]["auroc"]) in card
    assert "An audit is an experiment" in card
    assert "guarantee" in card


def test_the_card_has_no_audit_of_other_weights(hardened, tmp_path):
    model, result = hardened
    assert result.weights == weights_digest(model)
    other = Classifier.load_from_checkpoint(export(model, tmp_path / "model.ckpt"), map_location="cpu")
    card = export(other, tmp_path / "other.ckpt", audit=result).with_suffix(".md").read_text()
    assert f"It is of these weights; their digest (`weights_digest`) is `{result.weights}`" in card
    with torch.no_grad():
        other.net[1].running_mean[0] += 1
    with pytest.raises(ValueError, match=r"the audit is of other weights than those of this Classifier.*audit\(model"):
        export(other, tmp_path / "moved.ckpt", audit=result)
    assert not (tmp_path / "moved.ckpt").exists()
    saved = AuditResult.load(result.save(tmp_path / "audit.json"))
    with pytest.raises(ValueError, match="the audit is of other weights"):
        export(other, tmp_path / "moved.ckpt", audit=saved)


def test_the_card_says_where_it_is_not_known_which_weights_were_audited(hardened, tmp_path):
    model, result = hardened

    class WithState(Classifier):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    old = replace(result, weights="")
    for name, exported, audit, why in (
        ("old", model, old, "the audit does not say which it is of"),
        ("more", WithState(), result, "the model holds more than plain tensors"),
    ):
        card = export(exported, tmp_path / f"{name}.ckpt", audit=audit).with_suffix(".md").read_text()
        assert f"It is not known whether this audit is of these weights: {why}." in card


def test_the_card_of_an_unknown_model_says_so(tmp_path):
    card = export(Classifier(), tmp_path / "model.ckpt").with_suffix(".md").read_text()
    assert "Nothing is known" in card
    assert "No audit was given" in card


def test_the_card_of_a_loaded_model_has_the_settings_that_are_given(tmp_path):
    settings = {"rate": 0.03, "defense": {"name": "RelaxLossMixin", "alpha": 0.5}}
    card = export(Classifier(), tmp_path / "model.ckpt", settings=settings).with_suffix(".md").read_text()
    for line in ("| rate | 0.03 |", "| defense: name | RelaxLossMixin |", "| defense: alpha | 0.5 |"):
        assert line in card
    assert "Nothing is known" not in card


@pytest.mark.parametrize(
    "make", [lambda: create_defense("hamp").attach(Classifier()), lambda: HardenedClassifier(alpha=0.3)]
)
def test_a_defense_on_the_model_is_left_out(make, tmp_path):
    model = make()
    path = export(model, tmp_path / "model.ckpt")
    assert not [key for key in keys_of(torch.load(path, weights_only=True)) if "cwrf" in key or "defense" in key]
    Classifier.load_from_checkpoint(path)
    assert "| defense: name |" in path.with_suffix(".md").read_text()
    assert hasattr(model, "defense_state")
    assert isinstance(model, RelaxLossMixin) == isinstance(model, HardenedClassifier)


def test_what_the_class_itself_saves_is_kept(tmp_path):
    class Counting(Classifier):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["count"] = 3

    assert torch.load(export(Counting(), tmp_path / "model.ckpt"), weights_only=True)["count"] == 3


class Holding(Classifier):
    def __init__(self, held=None, rate=0.1):
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize(
    "held",
    [
        torch.zeros(3),
        np.zeros((2, 2)),
        {"deep": [torch.zeros(2)]},
        argparse.Namespace(x=np.zeros(2)),
        TensorDataset(torch.zeros(2)),
        loader(0, 8),
        list(range(101)),
        [[0.5] * 60, [0.5] * 60],
    ],
)
@pytest.mark.filterwarnings("ignore:Attribute 'held'")
def test_hyper_parameters_that_hold_data_are_not_exported(held, tmp_path):
    with pytest.raises(ValueError, match=r"the hyper-parameters 'held' hold data.*ignore=\['held'\]\).*safetensors"):
        export(Holding(held), tmp_path / "model.ckpt")
    assert list(tmp_path.iterdir()) == []
    export(Holding(held), tmp_path / "model.safetensors")


@pytest.mark.parametrize("held", [list(range(100)), {"widths": (8, 8)}, "x" * 500, None, np.float64(0.5), ["a"] * 200])
def test_settings_are_exported(held, tmp_path):
    path = export(Holding(held), tmp_path / "model.ckpt")
    assert torch.load(path, weights_only=False)["hyper_parameters"]["held"] == held


def test_a_wrong_title_or_a_folder_writes_nothing(tmp_path):
    with pytest.raises(TypeError, match="title must be text, not int"):
        export(Classifier(), tmp_path / "model.ckpt", title=3)
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.raises(ValueError, match="is a folder; name a file"):
        export(Classifier(), tmp_path / "folder.ckpt", overwrite=True)
    (tmp_path / "card.md").mkdir()
    with pytest.raises(ValueError, match=r"card\.md is a folder; name a file"):
        export(Classifier(), tmp_path / "card.ckpt", overwrite=True)
    assert {each.name for each in tmp_path.iterdir()} == {"folder.ckpt", "card.md"}


def test_nothing_is_replaced_unless_asked_for_and_invalid_arguments_raise(tmp_path):
    (tmp_path / "model.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model\.md exist"):
        export(Classifier(), tmp_path / "model.ckpt")
    assert not (tmp_path / "model.ckpt").exists()
    export(Classifier(), tmp_path / "model.ckpt", overwrite=True)
    with pytest.raises(ValueError, match="must end with"):
        export(Classifier(), tmp_path / "model.pt")
    with pytest.raises(TypeError, match="takes a LightningModule"):
        export(torch.nn.Linear(2, 2), tmp_path / "linear.ckpt")
    with pytest.raises(TypeError, match="settings must be a mapping"):
        export(Classifier(), tmp_path / "new.ckpt", settings="settings.json")
    with pytest.raises(TypeError, match="must be an AuditResult"):
        export(Classifier(), tmp_path / "new.ckpt", audit="audit.json")

    class WithState(Classifier):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match="more than tensors"):
        export(WithState(), tmp_path / "new.safetensors")
    assert not (tmp_path / "new.md").exists()


def test_weights_that_changed_after_the_hardening_get_no_card_of_it(tmp_path):
    model, vanilla = trained(epochs=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callbacks = [PrivacyScoringCallback(loader(200, 240), vanilla, steps=2), CriticalRewindCallback(rate=0.1)]
    trainer(callbacks=[*callbacks, GradientMaskCallback()], max_epochs=1).fit(model, loader(0, 64))
    model.load_state_dict(before)
    with pytest.raises(ValueError, match=r"not those of the model's last fit: .* Export right after"):
        export(model, tmp_path / "model.ckpt")
    assert not list(tmp_path.iterdir())
