"""The names of the previous release work, and warn at the user's line."""

import functools
import importlib
import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import default_collate

import lightning_cwrf
from lightning_cwrf import CriticalRewindCallback, CWRFConfig, ShadowRecipe, train_shadows
from lightning_cwrf.auditing import AuditResult, audit
from tests.helpers import Classifier, loader, part, trainer
from tests.recipe_functions import Counted


def deprecated(old, new):
    return pytest.warns(FutureWarning, match=rf"^{old} is now {new}; the old name goes in the next release\.$")


@pytest.fixture
def recipe():
    return ShadowRecipe(LightningModule, {"max_epochs": 3}, batch_size=8, collate_fn=default_collate)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("lightning_cwrf", "CWRF", "CWRFConfig"),
        ("lightning_cwrf.recipes", "CWRF", "CWRFConfig"),
        ("lightning_cwrf.shadows", "ShadowSignals", "ShadowOutputs"),
        ("lightning_cwrf.shadows.train", "ShadowSignals", "ShadowOutputs"),
    ],
)
def test_renamed_classes(module, old, new):
    home = importlib.import_module(module)
    with deprecated(f"{module}.{old}", f"{module}.{new}"):
        assert getattr(home, old) is getattr(home, new)
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'Nothing'"):
        _ = home.Nothing


def imports():
    from lightning_cwrf.recipes import CWRF  # noqa: F401
    from lightning_cwrf.shadows import ShadowSignals  # noqa: F401


def constructs():
    ShadowRecipe(module=LightningModule, trainer={}, batch_size=8)


@pytest.mark.parametrize("use", [imports, constructs])
def test_a_warning_names_the_users_line(use):
    with pytest.warns(FutureWarning) as caught:
        use()
    assert {warning.filename for warning in caught} == {__file__}


def test_renamed_fields_of_a_recipe(recipe):
    with pytest.warns(FutureWarning) as caught:
        old = ShadowRecipe(module=LightningModule, trainer={"max_epochs": 3}, batch_size=8, collate=default_collate)
    assert old == recipe
    assert len(caught) == 3
    for name, new in {"module": "build_module", "trainer": "trainer_kwargs", "collate": "collate_fn"}.items():
        with deprecated(rf"ShadowRecipe\.{name}", rf"ShadowRecipe\.{new}"):
            assert getattr(recipe, name) is getattr(recipe, new)
    with deprecated(r"ShadowRecipe\(trainer=\)", r"ShadowRecipe\(trainer_kwargs=\)"):
        assert replace(recipe, trainer={"max_epochs": 5}).trainer_kwargs == {"max_epochs": 5}


def test_renamed_argument_of_like():
    with deprecated(r"like\(module=\)", r"like\(build_module=\)"):
        recipe = ShadowRecipe.like(trainer(max_epochs=1), Classifier(), module=Classifier, loader=loader(0, 64))
    assert recipe.build_module is Classifier


def test_renamed_argument_of_train_shadows(tmp_path):
    settings = {"n": 2, "store": tmp_path, "workers": 1, "progress": False}
    recipe = Counted(tmp_path / "log")
    base = train_shadows(recipe, part(0, 20), **settings, keep_weights=True)
    tuned = train_shadows(recipe, part(0, 20), **settings, base=base)
    with deprecated(r"train_shadows\(start=\)", r"train_shadows\(base=\)"):
        again = train_shadows(recipe, part(0, 20), **settings, start=base)
    assert torch.equal(again.logits, tuned.logits)
    with pytest.raises(TypeError, match="train_shadows takes base=, or start=, its old name, but not both"):
        train_shadows(recipe, part(0, 20), **settings, base=base, start=base)
    with deprecated(r"ShadowStore\.signals", r"ShadowStore\.outputs"):
        assert torch.equal(base.store.signals(0)["logits"], base.logits[0])
    with deprecated(r"ShadowStore\.signals_path", r"ShadowStore\.outputs_path"):
        assert base.store.signals_path(0) == base.store.outputs_path(0)


def test_renamed_arguments_of_a_recipes_methods():
    recipe = ShadowRecipe(Classifier, {"max_epochs": 1, "accelerator": "cpu"}, batch_size=8)
    state = Classifier().state_dict()
    with deprecated(r"__call__\(start=\)", r"__call__\(base=\)"):
        assert isinstance(recipe(part(0, 16), 1, start=state), Classifier)
    with deprecated(r"check\(start=\)", r"check\(base=\)"):
        recipe.check(part(0, 16), start=True)
    with deprecated(r"train_stack\(starts=\)", r"train_stack\(bases=\)"):
        assert len(recipe.train_stack(part(0, 16), [[0, 1], [2, 3]], [1, 2], starts=[state, state])) == 2


def test_the_model_metrics_of_an_audit(tmp_path):
    result = audit(Classifier(), members=part(0, 20), nonmembers=part(20, 40), attacks=["loss"])
    with deprecated(r"AuditResult\.model", r"AuditResult\.model_metrics"):
        assert result.model is result.model_metrics
    with deprecated(r"AuditResult\(model=\)", r"AuditResult\(model_metrics=\)"):
        assert replace(result, model={}).model_metrics == {}
    # Files are the same in both releases, so each loads the other's.
    content = json.loads(result.save(tmp_path / "audit.json").read_text())
    assert set(content["model"]) == set(result.model_metrics)
    assert "model_metrics" not in content
    assert AuditResult.load(tmp_path / "audit.json").model_metrics == result.model_metrics


def test_what_chosen_weights_are_rewound_to():
    for make in (CriticalRewindCallback, functools.partial(CWRFConfig, part(0, 5))):
        name = type(make()).__name__
        for old, new in (("vanilla", "initial"), ("zero", "zero")):
            with deprecated(rf"{name}\(to=\)", rf"{name}\(values=\)"):
                made = make(to=old)
            assert made.values == new
            with deprecated(rf"{name}\.to", rf"{name}\.values"):
                assert made.to == old
    with pytest.raises(TypeError, match=r"CriticalRewindCallback takes values=, or to=, its old name, but not both"):
        CriticalRewindCallback(to="zero", values="zero")
    with pytest.raises(ValueError, match=r"values must be .*, not 'init'"), pytest.warns(FutureWarning):
        CriticalRewindCallback(to="init")


def test_old_names_are_not_listed():
    for home in (lightning_cwrf, lightning_cwrf.recipes, lightning_cwrf.shadows):
        assert not {"CWRF", "ShadowSignals"} & {*dir(home), *home.__all__}


def test_auc_by_class_is_slices():
    members, nonmembers = part(0, 60), part(60, 120)
    result = audit(Classifier(), members=members, nonmembers=nonmembers, attacks=["loss"])
    with deprecated(r"AuditResult\.auc_by_class", r"AuditResult\.slices\(\"class\"\)"):
        found = result.auc_by_class("loss")
    assert found == {s.value: s.estimates["auroc"].value for s in result.slices("class", "loss") if s.estimates}
    assert len(found) > 5
