"""A stack of models is scored, rewound and held as each model alone."""

import functools
from dataclasses import replace

import pytest
import torch

from lightning_cwrf import CWRFConfig
from lightning_cwrf.defenses import create_defense
from lightning_cwrf.shadows.train import model_seed
from tests.helpers import Classifier, part
from tests.recipes.modules import Plain, assert_stacking_changes_nothing, stackable, train, weights_of

pytestmark = pytest.mark.slow

BASE_POOL = part(0, 81)  # an odd number: some models have one more example than others


def cwrf(rate=0.1, steps=3, **settings):
    return CWRFConfig(part(100, 150), rate=rate, steps=steps, batch_size=16, **settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return train(stackable(Plain), BASE_POOL, 4, store=tmp_path_factory.mktemp("base"), keep_weights=True, stack=4)


def hardening(optimizer="adamw", **settings):
    return replace(
        stackable(functools.partial(Plain, optimizer)),
        defense=create_defense("relaxloss", alpha=0.5),
        cwrf=cwrf(**settings),
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "adagrad"])
def test_a_stack_is_hardened_as_its_models_one_by_one(tmp_path, base, optimizer):
    assert_stacking_changes_nothing(hardening(optimizer), tmp_path, BASE_POOL, base=base)


@pytest.mark.parametrize(
    "settings",
    [
        {"rate": 0.0},
        {"rate": 1.0},
        {"vanilla": "redraw"},
        {"kind": "random"},
        {"kind": "learnability"},
        {"per_layer": True},
        {"structured": True},
        {"mode": "train"},
        {"values": "zero"},
        {"values": "fresh"},
        {"values": "trained"},
        {"hold": False},
        {"values": "fresh", "hold": False, "batchnorm": "reset"},
        {"batchnorm": "estimate"},
        {"tune": "masked"},
        {"members": "plain"},
    ],
    ids=str,
)
def test_a_stack_follows_the_settings_of_cwrf(tmp_path, base, settings):
    assert_stacking_changes_nothing(hardening(**settings), tmp_path, BASE_POOL, base=base)


@pytest.mark.parametrize(
    "arguments", [{"gradient_clip_val": 0.01}, {"min_epochs": 2}, {"limit_train_batches": 1}], ids=str
)
def test_a_hardened_stack_follows_the_trainers_arguments(tmp_path, base, arguments):
    recipe = hardening()
    recipe = replace(recipe, trainer_kwargs={**recipe.trainer_kwargs, **arguments})
    assert_stacking_changes_nothing(recipe, tmp_path, BASE_POOL, base=base)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
def test_each_model_holds_its_own_top_share_bit_for_bit(tmp_path, base, optimizer):
    """Despite momentum and weight decay. In single precision, where one by one rounds otherwise."""
    recipe = hardening(optimizer)
    recipe = replace(recipe, trainer_kwargs={**recipe.trainer_kwargs, "precision": "32-true"})
    chosen = []
    for i, after in enumerate(weights_of(recipe, tmp_path, BASE_POOL, base=base, stack=4)):
        torch.manual_seed(model_seed(0, i))
        model = Plain()
        initial = model.state_dict()
        held = [(after[name] == initial[name]).flatten() for name, p in model.named_parameters() if p.requires_grad]
        chosen.append(torch.cat(held))
        assert int(chosen[-1].sum()) == round(0.1 * len(chosen[-1]))
    assert not any(torch.equal(chosen[0], other) for other in chosen[1:])


def test_models_with_dropout_are_hardened_as_alone(tmp_path):
    """Random masks, too, are drawn from each model's own seed."""
    base = train(stackable(Classifier), BASE_POOL, 4, store=tmp_path, keep_weights=True)
    recipe = replace(stackable(Classifier), cwrf=cwrf(kind="random"))
    assert_stacking_changes_nothing(recipe, tmp_path / "tuned", BASE_POOL, base=base)
