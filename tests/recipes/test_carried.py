"""Every setting of every callback and defense is carried to the shadow models, or raises by name."""

import functools
import inspect
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_cwrf import (
    CriticalRewindCallback,
    CWRFConfig,
    GradientMaskCallback,
    PrivacyScoringCallback,
    ShadowRecipe,
)
from lightning_cwrf.data import all_digests
from lightning_cwrf.defenses import PASTMixin, available_defenses, create_defense
from lightning_cwrf.shadows import train_shadows
from lightning_cwrf.weights.masks import WeightMask
from lightning_cwrf.weights.vanilla import capture
from tests.defenses.cases import MODELS
from tests.helpers import Classifier, digits, loader, part, trainer

SET_UP = functools.partial(ShadowRecipe.like, loader=loader(0, 64, shuffle=True))
MASK = WeightMask.top({"net.0.weight": torch.rand(4, 1, 3, 3)}, 0.5)

CARRIED = {
    PrivacyScoringCallback: {
        "nonmembers": part(200, 232),
        "lam": 0.3,
        "steps": 7,
        "lr": 0.5,
        "kind": "random",
        "batch_size": 9,
        "mode": "train",
    },
    CriticalRewindCallback: {
        "rate": 0.2,
        "per_layer": True,
        "structured": True,
        "values": "zero",
        "batchnorm": "estimate",
    },
    GradientMaskCallback: {"tune": "masked"},
}
REFUSED = {
    CriticalRewindCallback: {"scores": {"a": torch.ones(1)}, "mask": MASK, "vanilla": "redraw"},
    GradientMaskCallback: {"mask": MASK},
}
CALLBACKS = (PrivacyScoringCallback, CriticalRewindCallback, GradientMaskCallback)


def parameters(kind):
    return set(inspect.signature(kind.__init__).parameters) - {"self"}


def hardened(**changed):
    """A Trainer that is set up to harden, with some settings of its callbacks."""
    settings = {kind: {} for kind in CALLBACKS}
    settings[PrivacyScoringCallback] = {"nonmembers": part(200, 232), "vanilla": capture(Classifier(width=4))}
    for kind, given in changed.items():
        settings[next(each for each in CALLBACKS if each.__name__ == kind)] |= given
    return trainer(callbacks=[kind(**settings[kind]) for kind in CALLBACKS])


@pytest.mark.parametrize("kind", CALLBACKS)
def test_every_setting_of_a_callback_is_listed(kind):
    """Add a new parameter to one of the lists above, and to CWRFConfig."""
    mine = {
        PrivacyScoringCallback: {"vanilla", "members", "keep_scores"},
        CriticalRewindCallback: {"hold", "seed"},
    }
    assert parameters(kind) <= set(CARRIED[kind]) | set(REFUSED.get(kind, ())) | mine.get(kind, set())


def test_scores_that_are_kept_shape_nothing():
    kept = SET_UP(hardened(PrivacyScoringCallback={"keep_scores": True}), Classifier(width=4)).cwrf
    assert replace(kept, nonmembers=[]) == replace(SET_UP(hardened(), Classifier(width=4)).cwrf, nonmembers=[])


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in CALLBACKS for name in CARRIED[kind] if name in parameters(kind)]
)
def test_a_setting_of_a_callback_is_carried(kind, name):
    value = CARRIED[kind][name]
    recipe = SET_UP(hardened(**{kind.__name__: {name: value}}), Classifier(width=4))
    made = next(each for each in recipe.cwrf.callbacks({}) if isinstance(each, kind))
    assert getattr(made, name) is value or getattr(made, name) == value
    default = SET_UP(hardened(), Classifier(width=4)).cwrf.callbacks({})
    assert name == "nonmembers" or getattr(next(e for e in default if isinstance(e, kind)), name) != value


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in REFUSED for name in REFUSED[kind]])
def test_a_setting_of_one_model_raises_by_name(kind, name):
    run = hardened(**{kind.__name__: {name: REFUSED[kind][name]}})
    with pytest.raises(ValueError, match=rf"{kind.__name__}\({name}=\.\.\.\) cannot be carried .* Leave it out"):
        SET_UP(run, Classifier(width=4))


def test_weights_that_are_not_held_are_carried():
    scoring = PrivacyScoringCallback(part(200, 232), capture(Classifier(width=4)))
    run = trainer(callbacks=[scoring, CriticalRewindCallback(0.2, hold=False)])
    cwrf = SET_UP(run, Classifier(width=4)).cwrf
    assert cwrf.hold is False
    assert [type(each).__name__ for each in cwrf.callbacks({})] == [
        "PrivacyScoringCallback",
        "CriticalRewindCallback",
    ]
    with pytest.raises(ValueError, match="one of them without the other"):
        SET_UP(hardened(CriticalRewindCallback={"hold": False}), Classifier(width=4))
    with pytest.raises(ValueError, match=r"and, unless hold=False, GradientMaskCallback"):
        SET_UP(trainer(callbacks=[scoring, CriticalRewindCallback(0.2)]), Classifier(width=4))
    with pytest.raises(ValueError, match="tune says which weights are held, and hold=False holds none"):
        CWRFConfig(part(0, 5), hold=False, tune="masked")


def test_fresh_values_are_of_each_models_own_seed():
    recipe = SET_UP(hardened(CriticalRewindCallback={"values": "fresh", "seed": 7, "rate": 1.0}), Classifier(width=4))
    recipe = replace(recipe, trainer_kwargs={**recipe.trainer_kwargs, "accelerator": "cpu"})
    start = capture(Classifier(width=4))
    first, again, other = (capture(recipe(part(0, 32), seed, start))["net.5.weight"] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()
    torch.manual_seed(5)
    assert not torch.isclose(first, Classifier(width=4).net[5].weight).any()
    assert first.abs().max() <= start["net.5.weight"].abs().max() * 1.5


def test_an_unknown_setting_raises(monkeypatch):
    def with_more(self, nonmembers, vanilla, foo=3, **kwargs):
        original(self, nonmembers, vanilla, **kwargs)
        self.foo = foo

    original = PrivacyScoringCallback.__init__
    monkeypatch.setattr(PrivacyScoringCallback, "__init__", with_more)
    monkeypatch.setattr("lightning_cwrf.recipes.cwrf.CWRFConfig.__post_init__", lambda self: None)
    run = hardened(PrivacyScoringCallback={"foo": 4})
    with pytest.raises(ValueError, match=r"PrivacyScoringCallback\(foo=\.\.\.\) .* CWRFConfig has no such setting"):
        SET_UP(run, Classifier(width=4))


def test_a_subclass_of_a_callback_is_carried_if_the_user_says_so():
    """Its settings are known, and what it adds is not."""

    class Mine(GradientMaskCallback):
        pass

    scoring = PrivacyScoringCallback(part(200, 232), capture(Classifier(width=4)))
    run = trainer(callbacks=[scoring, CriticalRewindCallback(), Mine(tune="masked")])
    with pytest.raises(ValueError, match="Mine may shape the training: pass callbacks="):
        SET_UP(run, Classifier(width=4))
    assert SET_UP(run, Classifier(width=4), callbacks=list).cwrf.tune == "masked"


def test_plain_members_become_each_models_own():
    plain = {"members": part(0, 64)}
    recipe = SET_UP(hardened(PrivacyScoringCallback=plain), Classifier(width=4))
    assert recipe.cwrf.members == "plain"
    assert SET_UP(hardened(), Classifier(width=4)).cwrf.members == "training"
    turned = Subset(digits(), list(range(63, -1, -1)))
    for same in (loader(0, 64), turned):
        run = hardened(PrivacyScoringCallback={"members": same})
        assert SET_UP(run, Classifier(width=4)).cwrf.members == "plain"
    for other in (part(0, 63), part(64, 128)):
        run = hardened(PrivacyScoringCallback={"members": other})
        with pytest.raises(ValueError, match=r"PrivacyScoringCallback\(members=...\) are other data"):
            SET_UP(run, Classifier(width=4))


class Doubled(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return digits()[i][0] * torch.rand(()), digits()[i][1]


def test_plain_members_of_an_augmented_training():
    arguments = {"loader": DataLoader(Doubled(), 16), "augment": dim}
    run = hardened(PrivacyScoringCallback={"members": part(0, 64)})
    recipe = ShadowRecipe.like(run, Classifier(width=4), **arguments)
    for how in ("plain", "training"):
        variant = replace(recipe, cwrf=replace(recipe.cwrf, members=how))
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                PrivacyScoringCallback, "on_train_start", lambda self, trainer, module, seen=seen: seen.append(self)
            )
            patch.setattr(CriticalRewindCallback, "on_train_start", lambda *_: None)
            patch.setattr(GradientMaskCallback, "on_train_start", lambda *_: None)
            variant(part(0, 32), 1, capture(Classifier(width=4)))
        if how == "training":
            assert seen[0].members is None
        else:
            assert all_digests(seen[0].members) == all_digests(part(0, 32))
    with pytest.raises(ValueError, match="are other data"):
        ShadowRecipe.like(hardened(PrivacyScoringCallback={"members": part(0, 63)}), Classifier(width=4), **arguments)


def dim(example):
    return example[0] * torch.rand(()), example[1]


@pytest.mark.slow
def test_a_redrawn_model_has_redrawn_shadow_models(tmp_path):
    recipe = SET_UP(hardened(PrivacyScoringCallback={"vanilla": "redraw"}), Classifier(width=4))
    assert recipe.cwrf.vanilla == "redraw"
    recipe = replace(
        recipe, trainer_kwargs={**recipe.trainer_kwargs, "accelerator": "cpu"}, cwrf=replace(recipe.cwrf, rate=1.0)
    )
    torch.manual_seed(5)
    own = capture(Classifier(width=4))
    start = {name: value + 1 for name, value in own.items()}
    tuned = capture(recipe(part(0, 32), 5, start))  # a rate of 1: every weight is the vanilla one, and stays so
    again = capture(recipe(part(0, 32), 5, start))
    other = capture(recipe(part(0, 32), 6, start))
    for name in ("net.0.weight", "net.5.weight"):
        assert torch.equal(tuned[name], again[name])
        assert not torch.isclose(tuned[name], own[name]).any()
        assert not torch.isclose(tuned[name], start[name]).any()
        assert not torch.isclose(tuned[name], other[name]).any()
        assert tuned[name].abs().max() <= own[name].abs().max() * 1.5  # drawn from the same distribution
    kept = replace(recipe, cwrf=replace(recipe.cwrf, vanilla="own"))
    assert torch.equal(capture(kept(part(0, 32), 5, start))["net.5.weight"], own["net.5.weight"])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"vanilla": "zero"}, ValueError, "vanilla must be 'own' or 'redraw'"),
        ({"members": part(0, 2)}, ValueError, "members must be 'training' or 'plain'"),
        ({"batch_size": 3.0}, TypeError, "batch_size must be an integer"),
        ({"values": "trained", "hold": False}, ValueError, "changes nothing and holds nothing"),
        ({"hold": "no"}, TypeError, "hold must be True or False"),
        ({"batchnorm": "new"}, ValueError, "batchnorm must be 'keep' or 'reset' or 'estimate'"),
    ],
)
def test_invalid_settings_raise(settings, error, message):
    with pytest.raises(error, match=message):
        CWRFConfig(part(0, 10), **settings)


NONMEMBERS = part(200, 260)
DEFENSES = {
    "adversarial_regularization": {"nonmembers": NONMEMBERS, "lam": 0.5, "attack_steps": 2, "attack_lr": 0.01},
    "ccl": {"alpha": 0.25, "beta": 0.5, "kind": "ccql"},
    "confidence_penalty": {"beta": 0.2},
    "dpsgd": {
        "target_epsilon": 5.0,
        "noise_multiplier": 1.5,
        "target_delta": 1e-4,
        "max_grad_norm": 2.0,
        "clipping": "automatic",
        "layer_norms": {"net.0": 0.5},
        "target_unclipped_quantile": 0.7,
        "clipbound_learning_rate": 0.1,
        "unclipped_num_std": 3.0,
        "stability": 0.1,
        "noise_gamma": 0.9,
        "noise_step_size": 2,
        "accountant": "rdp",
        "max_physical_batch_size": 8,
        "fix": True,
        "ghost": True,
        "from_scratch": True,
        "on": create_defense("hamp"),
    },
    "hamp": {"gamma": 0.8, "alpha": 0.5},
    "label_smoothing": {"smoothing": 0.2},
    "mixup_mmd": {"nonmembers": NONMEMBERS, "mixup_alpha": 0.5, "lam": 2.0, "bandwidth": 0.5},
    "past": {"nonmembers": NONMEMBERS, "lam": 1e-4, "alpha": 1.5, "on": create_defense("relaxloss")},
    "relaxloss": {"alpha": 0.7, "upper": 0.9},
    "weight_penalty": {"l1": 1e-4, "l2": 1e-3, "on": create_defense("ccl")},
}
"""Settings that are not the defaults."""
CLIPPING = {
    "layer_norms": "per_layer",
    "target_unclipped_quantile": "adaptive",
    "clipbound_learning_rate": "adaptive",
    "unclipped_num_std": "adaptive",
    "stability": "automatic",
}
"""The clipping that a setting of DP-SGD is of."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(available_defenses()) - set(MODELS)))  # recipes refuse fixed models
def test_every_setting_of_a_defense_is_carried(name):
    for setting in create_defense(name, **minimal(name)).settings:
        value = DEFENSES[name][setting]
        given = {**minimal(name), setting: value}
        if setting == "target_epsilon":
            given.pop("noise_multiplier")
        if setting in CLIPPING:
            given["clipping"] = CLIPPING[setting]
        defended = create_defense(name, **given).attach(Classifier(width=4))
        carried = SET_UP(trainer(), defended).defense.settings
        assert carried[setting] is value or carried[setting] == value
        again = create_defense(name, **carried).attach(Classifier(width=4))
        assert again.defense_settings == defended.defense_settings


def minimal(name):
    needed = {"dpsgd": {"noise_multiplier": 1.0, "fix": True}, "relaxloss": {"alpha": 1.0}}
    data = {"nonmembers": NONMEMBERS} if "nonmembers" in DEFENSES[name] else {}
    return {**needed.get(name, {}), **data}


def test_changed_hyper_parameters_warn():
    model = Classifier(width=4, lr=0.02)
    model.hparams.lr = 9.0
    with pytest.warns(UserWarning, match=r"lr was 0\.02 and is 9\.0 now.*build_module="):
        recipe = SET_UP(trainer(), model)
    assert recipe.build_module().hparams.lr == 9.0


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({"cwrf": CWRFConfig(part(100, 120))}, {"pool": part(90, 110)}, "CWRF's nonmembers are members"),
        (
            {"cwrf": CWRFConfig(part(100, 120))},
            {"population": part(115, 130)},
            "5 of the 20 examples of CWRF",
        ),
        ({"defense": create_defense("past", nonmembers=part(100, 120))}, {"pool": part(90, 110)}, "PASTMixin's nonme"),
        (
            {"defense": create_defense("past", nonmembers=loader(100, 120))},
            {"population": part(115, 130)},
            "5 of the 20 examples of PASTMixin's nonmembers are in the population, which no shadow model may see",
        ),
    ],
)
def test_reference_data_in_the_pool_or_population_raise(tmp_path, change, data, message):
    plain = ShadowRecipe(functools.partial(Classifier, width=4), {"max_epochs": 1}, batch_size=16)
    arguments = {"pool": part(0, 20), "n": 2, "store": tmp_path, "workers": 1, "progress": False, **data}
    if "cwrf" in change:
        base = replace(plain, trainer_kwargs={"fast_dev_run": 1, "accelerator": "cpu"})
        only = {name: value for name, value in arguments.items() if name != "population"}
        arguments["base"] = train_shadows(base, **only, keep_weights=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=message):
        patch.setattr(Trainer, "fit", lambda *_: pytest.fail("it trained"))
        train_shadows(replace(plain, **change), **arguments)


def test_invalid_fields_raise():
    for arguments, error, message in (
        ({"batch_size": 8.0}, TypeError, "batch_size must be an integer"),
        ({"batch_size": "8"}, TypeError, "batch_size must be an integer"),
        ({"shuffle": "no"}, TypeError, "shuffle must be True or False"),
        ({"drop_last": 1}, TypeError, "drop_last must be True or False"),
        ({"examples": 0}, ValueError, "examples must be an integer of at least 1"),
        ({"examples": 1.5}, TypeError, "examples must be an integer"),
        (
            {"trainer_kwargs": trainer()},
            TypeError,
            "dict of a Trainer's arguments, not a Trainer",
        ),
        ({"trainer_kwargs": None}, TypeError, "trainer_kwargs must be a dict"),
        ({"defense": "relaxloss"}, TypeError, r"defense must be what create_defense\(name, ...\) returns, not a str"),
        ({"defense": PASTMixin}, TypeError, "returns, not PASTMixin"),
        ({"cwrf": {"rate": 0.1}}, TypeError, r"cwrf must be what CWRFConfig\(nonmembers\) returns, not a dict"),
    ):
        with pytest.raises(error, match=message):
            ShadowRecipe(**{"build_module": Classifier, "trainer_kwargs": {}, "batch_size": 8, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"trainer": "trainer"}, TypeError, "like reads a Trainer of lightning.pytorch, not a str"),
        ({"trainer": type(trainer())}, TypeError, "like reads a Trainer of lightning.pytorch, not Trainer"),
        ({"model": Classifier}, TypeError, "of a LightningModule, not of a"),
        ({"defense": "hamp"}, TypeError, "defense must be what"),
        ({"callbacks": []}, TypeError, "callbacks must be a function"),
        ({"augment": 3}, TypeError, "augment must be a function"),
        ({"loader": part(0, 64)}, ValueError, "this training loader cannot be read"),
    ],
)
def test_invalid_arguments_of_like_raise(arguments, error, message):
    given = {"trainer": trainer(), "model": Classifier(width=4), "loader": loader(0, 64), **arguments}
    with pytest.raises(error, match=message):
        ShadowRecipe.like(given.pop("trainer"), given.pop("model"), **given)


def test_weights_that_were_frozen_by_hand_raise():
    """A rebuilt module would train them."""
    model = Classifier(width=4)
    model.net[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"2 parameters, such as net\.0\.weight, are frozen in the model"):
        SET_UP(trainer(), model)

    def build():
        made = Classifier(width=4)
        made.net[0].requires_grad_(False)
        return made

    assert SET_UP(trainer(), model, build_module=build)
    assert SET_UP(trainer(), model, callbacks=list)  # callbacks may freeze and unfreeze
