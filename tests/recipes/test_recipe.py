"""Recipes: their fields, the models that they train, and how these differ from other models."""

import functools
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_cwrf import (
    CWRFConfig,
    ShadowRecipe,
)
from lightning_cwrf.auditing import audit
from lightning_cwrf.data import SeededOrder
from lightning_cwrf.data.seen import SCORED, record_seen
from lightning_cwrf.defenses import (
    RelaxLossMixin,
    create_defense,
)
from tests.helpers import Classifier, loader, part
from tests.recipes.modules import CPU, Hooked, Plain, finished, stackable, train

pytestmark = pytest.mark.slow


def test_the_order_is_a_function_of_seed_and_epoch():
    order = SeededOrder(50, 3)
    first = list(order)
    assert sorted(first) == list(range(50))
    assert list(order) == first
    order.set_epoch(1)
    assert sorted(order) == list(range(50))
    assert list(order) != first
    assert list(SeededOrder(50, 4)) != first


def test_a_recipe_repeats_the_training(tmp_path):
    """Data in order, so that the one source of randomness is the seed of the weights."""
    pool = part(0, 64)
    torch.manual_seed(7)
    run, model = finished(Plain("adamw"), DataLoader(pool, 16))
    again = ShadowRecipe.like(run, model)(pool, 7)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_sweep_over_rates_trains_the_base_models_once(tmp_path, monkeypatch):
    fits, fit = [], Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, *args: fits.append(1) or fit(self, *args))
    base_recipe = ShadowRecipe(functools.partial(Classifier, width=4), {**CPU, "max_epochs": 1}, batch_size=16)
    base = functools.partial(train, base_recipe, part(0, 40), 2, store=tmp_path, keep_weights=True)
    tuned = replace(base_recipe, cwrf=CWRFConfig(part(100, 132), rate=0.1, steps=2))
    keys = set()
    for percent in (1, 5, 10):
        recipe = replace(tuned, cwrf=replace(tuned.cwrf, rate=percent / 100))
        keys.add(train(recipe, part(0, 40), 2, store=tmp_path, base=base()).store.key)
    assert len(keys) == 3
    assert len(fits) == 2 + 3 * 2


def test_invalid_recipes_raise():
    with pytest.raises(ValueError, match="cannot be given callbacks, logger"):
        ShadowRecipe(Classifier, {"logger": True, "callbacks": []}, batch_size=8)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
        ShadowRecipe(Classifier, {}, batch_size=0)


@pytest.mark.parametrize("stack", [1, 4])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_models_of_other_precisions_are_audited(tmp_path, precision, stack):
    recipe = stackable(Plain, precision=precision)
    shadows = train(recipe, part(0, 40), 4, population=part(60, 80), store=tmp_path, stack=stack)
    assert shadows.logits.dtype == torch.float32
    model = recipe(part(0, 20), 9)
    result = audit(model, members=part(0, 20), nonmembers=part(20, 40), shadows=shadows)
    assert not result.failures


@pytest.mark.parametrize(
    ("recipe", "arguments", "error", "message"),
    [
        (replace(stackable(Plain), cwrf=CWRFConfig(part(100, 120))), {}, ValueError, "train base models first"),
        (
            replace(stackable(Plain), cwrf=CWRFConfig(part(10, 30))),
            {"base": True},
            ValueError,
            "CWRF's nonmembers are",
        ),
        (stackable(nn.Identity), {}, TypeError, "build_module must build a LightningModule, not a Identity"),
        (stackable(Hooked), {"stack": 2}, ValueError, "Hooked cannot be stacked: it has on_before_zero_grad"),
        (Plain, {}, TypeError, r"ShadowRecipe.like\(trainer, model\) can"),
        (stackable(Plain), {"base": "finished.ckpt"}, TypeError, "base must be what train_shadows returns"),
        (stackable(Plain), {"pool": loader(0, 20)}, TypeError, "a data set, not a DataLoader; pass its dataset"),
    ],
)
def test_errors_come_before_any_training(tmp_path, monkeypatch, recipe, arguments, error, message):
    if arguments.get("base") is True:
        arguments = {"base": train(stackable(Plain), part(0, 20), 2, store=tmp_path, keep_weights=True)}
    monkeypatch.setattr(Trainer, "fit", lambda *_: pytest.fail("it trained"))
    with pytest.raises(error, match=message):
        train(**{"recipe": recipe, "pool": part(0, 20), "n": 2, "store": tmp_path, **arguments})


def test_invalid_settings_raise_at_once():
    with pytest.raises(ValueError, match=r"rate must be a number in \[0, 1\]"):
        CWRFConfig(part(0, 10), rate=5)
    with pytest.raises(ValueError, match="a Trainer has no argument max_epoch"):
        ShadowRecipe(Plain, {"max_epoch": 3}, batch_size=8)
    with pytest.raises(TypeError, match="callbacks must be a function"):
        ShadowRecipe(Plain, {}, batch_size=8, callbacks=[])
    with pytest.raises(TypeError, match="build_module must be a function"):
        ShadowRecipe(Plain(), {}, batch_size=8)


def test_a_pool_of_unexpected_size_warns(tmp_path):
    run, model = finished(Plain(), loader(0, 64))
    with pytest.warns(UserWarning, match="train on half of the pool, 30 examples, and the audited model on 64"):
        train(ShadowRecipe.like(run, model), part(0, 60), 2, store=tmp_path)


def test_an_audit_remarks_on_shadow_models_of_another_training(tmp_path):
    """A hardened model that is audited with the shadow models of the unprotected one looks safe and may not be."""
    pool = part(0, 80)
    recipe = ShadowRecipe(functools.partial(Plain, width=2), {"max_epochs": 1, **CPU}, batch_size=16)
    shadows = train(recipe, pool, 2, store=tmp_path)
    sides = {"members": part(0, 40), "nonmembers": part(40, 80), "shadows": shadows, "attacks": ["loss", "attack_r"]}
    assert shadows.differences(Plain(width=2)) == []
    with pytest.warns(UserWarning, match=r"not trained as this model was: its weights have other names or shapes"):
        result = audit(Plain(width=3), **sides)
    assert "not trained as this model was" in str(result)
    hardened = RelaxLossMixin.attach(Plain(width=2), alpha=0.5)
    said = r"trained with RelaxLossMixin \(alpha=0\.5, upper=1\.0\), and they with no defense"
    with pytest.warns(UserWarning, match=said):
        audit(hardened, **sides)
    tuned = replace(recipe, defense=create_defense("relaxloss", alpha=0.5))
    assert tuned.differences(hardened) == []
    assert "alpha=1.0" in tuned.differences(RelaxLossMixin.attach(Plain(width=2), alpha=1.0))[0]
    assert tuned.differences(Plain(width=2)) == []  # a checkpoint in its own class has lost its defense
    record_seen(hardened, SCORED, [(b"digest", 0)])
    assert tuned.differences(hardened) == ["it was hardened by CWRF, and they were not"]
    assert tuned.differences(nn.Linear(2, 2)) == []
