"""Recipes: read from a training, run alone and as a stack."""

import functools
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor, Timer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchmetrics.classification import MulticlassAccuracy

from lightning_cwrf import (
    CriticalRewindCallback,
    CWRFConfig,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    ShadowRecipe,
    train_shadows,
)
from lightning_cwrf.auditing import audit
from lightning_cwrf.data import SeededOrder
from lightning_cwrf.data.seen import SCORED, record_seen
from lightning_cwrf.defenses import (
    CCLMixin,
    HAMPMixin,
    LabelSmoothingMixin,
    PASTMixin,
    RelaxLossMixin,
    available_defenses,
    create_defense,
)
from lightning_cwrf.shadows.identity import identity
from lightning_cwrf.weights.vanilla import capture
from tests.helpers import OPTIMIZERS, Classifier, ManualClassifier, digits, loader, part, trainer

train = functools.partial(train_shadows, workers=1, progress=False)
CPU = {"accelerator": "cpu"}


class Plain(LightningModule):
    """Without dropout, so that it can be stacked; BatchNorm, its own logging and metric."""

    def __init__(self, optimizer="sgd", scheduler=None, width=6):
        super().__init__()
        self.save_hyperparameters()
        conv = nn.Conv2d(1, width, 3, stride=2, bias=False)  # a bias before BatchNorm has rounding alone for a gradient
        self.body = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(width * 9, 10)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.accuracy = MulticlassAccuracy(10)

    def forward(self, x):
        return self.head(self.body(x)) * self.frozen

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        return {"loss": F.cross_entropy(logits, batch[1])}

    def configure_optimizers(self):
        groups = [{"params": self.body.parameters(), "weight_decay": 0.0}, {"params": self.head.parameters()}]
        groups = self.head.parameters() if self.hparams.optimizer == "lbfgs" else groups
        optimizer = OPTIMIZERS[self.hparams.optimizer](groups, 1e-2)
        if self.hparams.scheduler is None:
            return optimizer
        if self.hparams.scheduler == "epoch":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Replacing(Plain):
    """Sets a buffer anew rather than in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean()
        return F.cross_entropy(self(batch[0] - self.mean), batch[1])


def stackable(module, **arguments):
    settings = {**CPU, "max_epochs": 2, "precision": "64-true", **arguments}
    return ShadowRecipe(module, settings, batch_size=16)


def weights_of(recipe, folder, pool, **arguments):
    shadows = train(recipe, pool, 4, store=folder, keep_weights=True, **arguments)
    return [shadows.weights(i) for i in range(4)]


def assert_stacking_changes_nothing(recipe, tmp_path, pool=None, **arguments):
    pool = part(0, 81) if pool is None else pool  # an odd number: some models have one more example than others
    alone = weights_of(recipe, tmp_path / "alone", pool, **arguments)
    stacked = weights_of(recipe, tmp_path / "stacked", pool, stack=4, **arguments)
    for one, other in zip(alone, stacked, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "adagrad"])
def test_a_stack_is_its_models_trained_one_by_one(tmp_path, optimizer):
    assert_stacking_changes_nothing(stackable(functools.partial(Plain, optimizer)), tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 2},
        {"max_epochs": -1, "max_steps": 5},
    ],
)
@pytest.mark.parametrize("scheduler", ["epoch", "step"])
def test_stacks_follow_the_trainers_arguments(tmp_path, arguments, scheduler):
    assert_stacking_changes_nothing(stackable(functools.partial(Plain, "sgd", scheduler), **arguments), tmp_path)


@pytest.mark.parametrize("change", [{"drop_last": True}, {"shuffle": False}, {"build_module": Replacing}])
def test_stacks_of_other_batches_and_buffers(tmp_path, change):
    assert_stacking_changes_nothing(replace(stackable(Plain), **change), tmp_path)


@pytest.mark.parametrize(
    "defense",
    [
        create_defense("relaxloss", alpha=1.0),
        create_defense("hamp"),
        create_defense("ccl"),
        create_defense("label_smoothing"),
        create_defense("confidence_penalty"),
    ],
    ids=lambda d: d.mixin.__name__,
)
def test_stacks_of_defended_models(tmp_path, defense):
    """Epochs 0 and 1: RelaxLoss does different things in even and odd ones."""
    assert_stacking_changes_nothing(replace(stackable(Plain), defense=defense), tmp_path)


def test_a_stack_goes_on_from_base_models(tmp_path):
    base = train(stackable(Plain), part(0, 80), 4, store=tmp_path, keep_weights=True)
    tuned = replace(stackable(Plain), defense=create_defense("relaxloss", alpha=0.5))
    assert_stacking_changes_nothing(tuned, tmp_path / "tuned", part(0, 80), base=base)


class Looks(Plain):
    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss if loss.item() < 1e9 else None


class Penalised(Plain):
    """Inside vmap no weight says that it requires a gradient, so that the penalty would silently be nothing."""

    def training_step(self, batch, batch_idx):
        penalty = sum(p.square().sum() for p in self.parameters() if p.requires_grad)
        return F.cross_entropy(self(batch[0]), batch[1]) + penalty


class Hooked(Plain):
    def on_before_zero_grad(self, optimizer):
        pass


class Two(Plain):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.body.parameters(), 0.1), torch.optim.SGD(self.head.parameters(), 0.1)]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (stackable(Classifier), "Classifier cannot be stacked: its training step draws random numbers"),
        (stackable(Looks), "Looks cannot be stacked: its training step does not vectorise .*item"),
        (stackable(Penalised), "vectorised, its first step is not that of the models one by one"),
        (stackable(Hooked), "Hooked cannot be stacked: it has on_before_zero_grad"),
        (stackable(ManualClassifier), "uses manual optimization"),
        (stackable(functools.partial(Plain, "lbfgs")), "LBFGS cannot be stacked"),
        (stackable(Two), "needs one optimizer, not 2"),
        (replace(stackable(Plain), augment=lambda item: item), "a recipe with augment cannot be stacked"),
        (replace(stackable(Plain), callbacks=list), "a recipe with callbacks cannot be stacked"),
        (replace(stackable(Plain), cwrf=CWRFConfig(part(100, 120))), "a recipe with cwrf cannot be stacked"),
    ],
)  # fmt: skip
def test_what_cannot_be_stacked_is_refused_with_a_reason(recipe, reason):
    with pytest.raises(ValueError, match=reason):
        recipe.train_stack(part(0, 20), [list(range(10)), list(range(10, 20))], [1, 2])


def test_every_defense_is_stacked_right_or_refused():
    """A defense that does more than its loss must not be trained as if it did not."""
    data = {"nonmembers": part(100, 160)}
    for name in available_defenses():
        settings = {"dpsgd": {"noise_multiplier": 1.0, "fix": True}, "relaxloss": {"alpha": 1.0}}.get(name, {})
        if name in ("past", "adversarial_regularization", "mixup_mmd"):
            settings = data
        recipe = replace(stackable(Plain), defense=create_defense(name, **settings))
        stacks = name in ("relaxloss", "hamp", "ccl", "label_smoothing", "confidence_penalty")
        if not stacks:  # the others are compared above
            with pytest.raises(ValueError, match="cannot be stacked"):
                recipe.train_stack(part(0, 20), [list(range(10)), list(range(10, 20))], [1, 2])


def test_a_function_cannot_be_stacked(tmp_path):
    from tests.recipe_functions import quick

    with pytest.raises(TypeError, match="this recipe cannot train a stack"):
        train(quick, part(0, 20), 2, store=tmp_path, stack=2)
    with pytest.raises(ValueError, match="stack must be an integer of at least 1"):
        train(quick, part(0, 20), 2, store=tmp_path, stack=0)


def test_the_order_is_a_function_of_seed_and_epoch():
    order = SeededOrder(50, 3)
    first = list(order)
    assert sorted(first) == list(range(50))
    assert list(order) == first
    order.set_epoch(1)
    assert sorted(order) == list(range(50))
    assert list(order) != first
    assert list(SeededOrder(50, 4)) != first


def finished(model=None, data=None, **arguments):
    model = Classifier(width=4) if model is None else model
    run = trainer(max_epochs=3, **arguments)
    run.fit(model, loader(0, 64, shuffle=True) if data is None else data)
    return run, model


def test_a_recipe_is_read_from_a_finished_training(tmp_path):
    watchers = [LearningRateMonitor(), MIAAuditCallback(loader(64, 128))]
    arguments = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "callbacks": watchers}
    run, model = finished(Classifier(width=4, lr=0.02), logger=CSVLogger(tmp_path), **arguments)
    recipe = ShadowRecipe.like(run, model)
    assert dict(recipe.trainer_kwargs) == {"max_epochs": 3, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    assert (recipe.batch_size, recipe.shuffle, recipe.drop_last) == (16, True, False)
    assert recipe.build_module().hparams == {"width": 4, "lr": 0.02, "optimizer": "adam"}
    assert recipe.defense is recipe.cwrf is recipe.augment is recipe.collate_fn is None
    assert identity(recipe) == identity(ShadowRecipe.like(run, model))
    assert identity(recipe) != identity(replace(recipe, batch_size=17))


def test_a_recipe_trains_what_the_training_trained(tmp_path):
    """Data in order, so that the one source of randomness is the seed of the weights."""
    pool = part(0, 64)
    torch.manual_seed(7)
    run, model = finished(Plain("adamw"), DataLoader(pool, 16))
    again = ShadowRecipe.like(run, model)(pool, 7)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def hardening(defended, reference, **arguments):
    callbacks = [
        PrivacyScoringCallback(reference, capture(Classifier(width=4)), lam=0.5, steps=3),
        CriticalRewindCallback(rate=0.2),
        GradientMaskCallback(),
    ]
    return finished(defended, callbacks=callbacks, **arguments)


def test_a_hardening_is_read_with_its_defense_and_cwrf(tmp_path):
    base_run, base_model = finished(Classifier(width=4))
    run, model = hardening(RelaxLossMixin.attach(Classifier(width=4), alpha=0.7), part(200, 232))
    recipe = ShadowRecipe.like(run, model)
    assert recipe.defense.mixin is RelaxLossMixin
    assert recipe.defense.settings == {"alpha": 0.7, "upper": 1.0}
    assert (recipe.cwrf.rate, recipe.cwrf.lam, recipe.cwrf.steps) == (0.2, 0.5, 3)
    with pytest.raises(ValueError, match="train base models first"):
        recipe(part(0, 32), 1)
    base = train(ShadowRecipe.like(base_run, base_model), part(0, 64), 2, store=tmp_path, keep_weights=True)
    hard = train(recipe, part(0, 64), 2, store=tmp_path, base=base, keep_weights=True)
    again = train(recipe, part(0, 64), 2, store=tmp_path / "again", base=base, keep_weights=True)
    for i in range(2):
        weights, started = hard.weights(i), base.weights(i)
        assert all(torch.equal(weights[n], again.weights(i)[n]) for n in weights)
        # A fifth of the weights stand where the base model began, before its training.
        torch.manual_seed(train_seed(i))
        vanilla = capture(Classifier(width=4))
        names = [name for name, _ in Classifier(width=4).named_parameters()]
        rewound = sum(int(((weights[n] == vanilla[n]) & (weights[n] != started[n])).sum()) for n in names)
        assert rewound == pytest.approx(0.2 * sum(vanilla[n].numel() for n in names), abs=3)


def train_seed(i):
    from lightning_cwrf.shadows.train import model_seed

    return model_seed(0, i)


def test_a_sweep_over_rates_trains_the_base_models_once(tmp_path, monkeypatch):
    fits = []
    monkeypatch.setattr(ShadowRecipe, "_fit", counted(ShadowRecipe._fit, fits))
    base_recipe = ShadowRecipe(functools.partial(Classifier, width=4), {**CPU, "max_epochs": 1}, batch_size=16)
    base = functools.partial(train, base_recipe, part(0, 40), 2, store=tmp_path, keep_weights=True)
    tuned = replace(base_recipe, cwrf=CWRFConfig(part(100, 132), rate=0.1, steps=2))
    keys = set()
    for percent in range(1, 11):
        recipe = replace(tuned, cwrf=replace(tuned.cwrf, rate=percent / 100))
        keys.add(train(recipe, part(0, 40), 2, store=tmp_path, base=base()).store.key)
    assert len(keys) == 10
    assert len(fits) == 2 + 10 * 2


def counted(fit, fits):
    def wrapped(self, module, *rest):
        fits.append(type(module).__name__)
        return fit(self, module, *rest)

    return wrapped


def test_data_that_a_defense_takes_are_read_too():
    run, model = finished(PASTMixin.attach(Classifier(width=4), nonmembers=part(100, 120), lam=1e-4))
    recipe = ShadowRecipe.like(run, model)
    assert recipe.defense.settings["lam"] == 1e-4
    assert len(recipe.defense.settings["nonmembers"]) == 20
    other = finished(PASTMixin.attach(Classifier(width=4), nonmembers=part(100, 121), lam=1e-4))
    assert identity(recipe) != identity(ShadowRecipe.like(*other))
    recipe(part(0, 32), 1)


def test_dpsgd_is_read_with_its_own_loader():
    from lightning_cwrf.defenses import DPSGDMixin

    model = DPSGDMixin.attach(Classifier(width=4), noise_multiplier=1.0, fix=True)
    run, model = finished(model)
    recipe = ShadowRecipe.like(run, model)
    assert recipe.batch_size == 16
    again = recipe(part(0, 64), 3)
    assert again.privacy_spent.epsilon == pytest.approx(model.privacy_spent.epsilon)


@pytest.mark.parametrize("mixin", [HAMPMixin, CCLMixin, LabelSmoothingMixin])
def test_a_defense_by_inheritance_is_part_of_the_class(mixin):
    class_ = {HAMPMixin: HampClassifier, CCLMixin: CclClassifier, LabelSmoothingMixin: SmoothClassifier}[mixin]
    recipe = ShadowRecipe.like(*finished(class_()))
    assert recipe.defense is None
    assert isinstance(recipe.build_module(), mixin)


class Saved(Classifier):
    def __init__(self, width=4):
        super().__init__(width)
        self.save_hyperparameters()


class HampClassifier(HAMPMixin, Saved):
    def __init__(self, gamma=0.8):
        super().__init__(gamma=gamma)
        self.save_hyperparameters()


class CclClassifier(CCLMixin, Saved):
    def __init__(self):
        super().__init__()


class SmoothClassifier(LabelSmoothingMixin, Saved):
    def __init__(self, smoothing=0.2):
        super().__init__(smoothing=smoothing)
        self.save_hyperparameters()


class Unsaved(LightningModule):
    def __init__(self, width=3):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Grown(Saved):
    def grow(self):
        self.extra = nn.Linear(2, 2)
        return self


class Jitter(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        x, y = digits()[i]
        return x + 0.1 * torch.randn_like(x), y


class Stream:
    def __iter__(self):
        return iter(loader(0, 32))


def jitter(item):
    return item[0] + 0.1 * torch.randn_like(item[0]), item[1]


class Shapes(Callback):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (trainer(), Classifier()), "has not trained yet: pass loader="),
        (lambda: finished(Unsaved()), r"lack width. Call save_hyperparameters\(\)"),
        (lambda: finished(Grown().grow()), "other weights than the model, such as extra.bias"),
        (lambda: finished(data=DataLoader(Jitter(), 16)), "read differently each time .* pass augment="),
        (lambda: finished(data=Stream()), "this training loader cannot be read"),
        (lambda: finished(data=DataLoader(part(0, 32), 8, sampler=WeightedRandomSampler([1.0] * 32, 32))), "Subset"),
        (lambda: finished(callbacks=[Shapes()]), "Shapes may shape the training: pass callbacks="),
        (lambda: finished(callbacks=[Timer("00:01:00:00")]), "ends by the clock"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(make, message):
    run, model = make()
    with pytest.raises(ValueError, match=message):
        ShadowRecipe.like(run, model)


def test_what_cannot_be_read_can_be_passed():
    run, model = finished(Unsaved(), DataLoader(Jitter(), 16, shuffle=True), callbacks=[Shapes()])
    recipe = ShadowRecipe.like(run, model, build_module=Unsaved, augment=jitter, callbacks=list)
    first, second = recipe(part(0, 32), 1), recipe(part(0, 32), 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(TypeError, match="must build a LightningModule, not a Linear"):
        ShadowRecipe.like(run, model, build_module=functools.partial(nn.Linear, 2, 2), augment=jitter, callbacks=list)
    set_up = ShadowRecipe.like(trainer(max_epochs=4), Classifier(), loader=loader(0, 64))
    assert (set_up.trainer_kwargs["max_epochs"], set_up.shuffle) == (4, False)


def test_bad_recipes():
    with pytest.raises(ValueError, match="cannot be given callbacks, logger"):
        ShadowRecipe(Classifier, {"logger": True, "callbacks": []}, batch_size=8)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
        ShadowRecipe(Classifier, {}, batch_size=0)


def test_data_sets_are_known_by_content():
    assert identity(part(0, 20)) == identity(part(0, 20))
    assert identity(part(0, 20)) != identity(part(1, 21))
    assert identity(loader(0, 20)) != identity(loader(0, 20, batch_size=5))
    with pytest.raises(TypeError, match="reads differently each time"):
        identity(Jitter())


def test_one_diverged_model_of_a_stack_stops_no_other(tmp_path):
    pool = part(0, 80)
    base = train(stackable(Plain), pool, 4, store=tmp_path, keep_weights=True)
    weights = base.weights(2)
    weights["head.bias"][0] = torch.nan
    base.store.save(2, base.store.outputs(2), weights)
    with pytest.raises(RuntimeError, match=r"1 of 4 shadow models failed(.|\n)*shadow model 2 (.|\n)*NaN"):
        train(stackable(Plain), pool, 4, store=tmp_path / "tuned", base=base, stack=4)
    assert len(list((tmp_path / "tuned").rglob("model-*.safetensors"))) == 3


@pytest.mark.parametrize("stack", [1, 4])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_models_of_other_precisions_are_audited(tmp_path, precision, stack):
    recipe = stackable(Plain, precision=precision)
    shadows = train(recipe, part(0, 40), 4, population=part(60, 80), store=tmp_path, stack=stack)
    assert shadows.logits.dtype == torch.float32
    model = recipe(part(0, 20), 9)
    result = audit(model, members=part(0, 20), nonmembers=part(20, 40), shadows=shadows)
    assert not result.failures


def test_a_model_of_another_trainer_is_refused():
    """Hardened since, its defense would become part of the first training's recipe."""
    first, model = finished()
    finished(RelaxLossMixin.attach(model, alpha=0.3))
    with pytest.raises(ValueError, match="this model's last Trainer is another one"):
        ShadowRecipe.like(first, model)
    with pytest.raises(ValueError, match="this model's last Trainer is another one"):
        ShadowRecipe.like(first, Classifier())
    with pytest.raises(TypeError, match="of a LightningModule, not of a Linear"):
        ShadowRecipe.like(first, nn.Linear(2, 2))


class Holds(Saved):
    def __init__(self, inner):
        super().__init__()
        self.save_hyperparameters()
        self.inner = inner


class Plateau(Saved):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_acc"}}


def test_what_a_recipe_could_not_repeat_is_refused():
    with pytest.raises(ValueError, match="the hyper-parameter inner is a module"):
        ShadowRecipe.like(*finished(Holds(nn.Linear(2, 2))))
    run, model = trainer(max_epochs=1), Plateau()
    run.fit(model, loader(0, 32), loader(32, 64))
    with pytest.raises(ValueError, match="a scheduler waits for 'val_acc', and shadow models have no validation data"):
        ShadowRecipe.like(run, model)


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
def test_what_is_wrong_is_told_before_any_training(tmp_path, monkeypatch, recipe, arguments, error, message):
    if arguments.get("base") is True:
        arguments = {"base": train(stackable(Plain), part(0, 20), 2, store=tmp_path, keep_weights=True)}
    monkeypatch.setattr(ShadowRecipe, "_fit", lambda *_: pytest.fail("it trained"))
    with pytest.raises(error, match=message):
        train(**{"recipe": recipe, "pool": part(0, 20), "n": 2, "store": tmp_path, **arguments})


def test_bad_settings_are_told_at_once():
    with pytest.raises(ValueError, match=r"rate must be a number in \[0, 1\]"):
        CWRFConfig(part(0, 10), rate=5)
    with pytest.raises(ValueError, match="a Trainer has no argument max_epoch"):
        ShadowRecipe(Plain, {"max_epoch": 3}, batch_size=8)
    with pytest.raises(TypeError, match="callbacks must be a function"):
        ShadowRecipe(Plain, {}, batch_size=8, callbacks=[])
    with pytest.raises(TypeError, match="build_module must be a function"):
        ShadowRecipe(Plain(), {}, batch_size=8)


def test_a_pool_of_another_size_is_warned_of(tmp_path):
    run, model = finished(Plain(), loader(0, 64))
    with pytest.warns(UserWarning, match="train on half of the pool, 30 examples, and the audited model on 64"):
        train(ShadowRecipe.like(run, model), part(0, 60), 2, store=tmp_path)


def test_the_same_failure_is_told_once(tmp_path):
    with pytest.raises(RuntimeError) as error:
        train(fails, part(0, 20), 4, store=tmp_path)
    assert str(error.value).count("Traceback") == 1
    assert all(f"shadow model {i} " in str(error.value) for i in range(4))


def fails(members, seed):
    raise ArithmeticError("boom")


def test_shadow_models_of_another_training_are_told(tmp_path):
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
    assert tuned.differences(hardened) == ["it was hardened by CWRFConfig, and they were not"]
    assert tuned.differences(nn.Linear(2, 2)) == []
