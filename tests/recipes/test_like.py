"""Recipes are read off a training, or the error says what to pass."""

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

from lightning_cwrf import (
    CriticalRewindCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    ShadowRecipe,
)
from lightning_cwrf.defenses import (
    CCLMixin,
    HAMPMixin,
    LabelSmoothingMixin,
    PASTMixin,
    RelaxLoss,
    RelaxLossMixin,
    WeightPenaltyMixin,
)
from lightning_cwrf.shadows.identity import identity
from lightning_cwrf.shadows.train import model_seed
from lightning_cwrf.weights.vanilla import capture
from tests.helpers import Classifier, digits, loader, part, trained, trainer
from tests.recipes.modules import Saved, finished, train


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


def hardening(reference, **arguments):
    model, vanilla = trained(epochs=5, width=4)
    callbacks = [
        PrivacyScoringCallback(reference, vanilla, lam=0.5, steps=3),
        CriticalRewindCallback(rate=0.2),
        GradientMaskCallback(),
    ]
    return finished(RelaxLossMixin.attach(model, alpha=0.7), callbacks=callbacks, **arguments)


@pytest.mark.slow
def test_a_hardening_is_read_with_its_defense_and_cwrf(tmp_path):
    base_run, base_model = finished(Classifier(width=4))
    run, model = hardening(part(200, 232))
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
        torch.manual_seed(model_seed(0, i))
        vanilla = capture(Classifier(width=4))
        names = [name for name, _ in Classifier(width=4).named_parameters()]
        rewound = sum(int(((weights[n] == vanilla[n]) & (weights[n] != started[n])).sum()) for n in names)
        assert rewound == pytest.approx(0.2 * sum(vanilla[n].numel() for n in names), abs=3)


def test_the_data_of_a_defense_are_read():
    run, model = finished(PASTMixin.attach(Classifier(width=4), nonmembers=part(100, 120), lam=1e-4))
    recipe = ShadowRecipe.like(run, model)
    assert recipe.defense.settings["lam"] == 1e-4
    assert len(recipe.defense.settings["nonmembers"]) == 20
    other = finished(PASTMixin.attach(Classifier(width=4), nonmembers=part(100, 121), lam=1e-4))
    assert identity(recipe) != identity(ShadowRecipe.like(*other))
    recipe(part(0, 32), 1)


@pytest.mark.slow
def test_dpsgd_is_read_with_its_own_loader():
    from lightning_cwrf.defenses import DPSGDMixin

    model = DPSGDMixin.attach(Classifier(width=4), noise_multiplier=1.0, fix=True)
    run, model = finished(model)
    recipe = ShadowRecipe.like(run, model)
    assert recipe.batch_size == 16
    again = recipe(part(0, 64), 3)
    assert again.privacy_spent.epsilon == pytest.approx(model.privacy_spent.epsilon)


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


@pytest.mark.parametrize("mixin", [HAMPMixin, CCLMixin, LabelSmoothingMixin])
def test_a_defense_by_inheritance_is_part_of_the_class(mixin):
    class_ = {HAMPMixin: HampClassifier, CCLMixin: CclClassifier, LabelSmoothingMixin: SmoothClassifier}[mixin]
    recipe = ShadowRecipe.like(*finished(class_()))
    assert recipe.defense is None
    assert isinstance(recipe.build_module(), mixin)


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
def test_unreadable_trainings_raise(make, message):
    run, model = make()
    with pytest.raises(ValueError, match=message):
        ShadowRecipe.like(run, model)


def test_unreadable_parts_can_be_passed():
    run, model = finished(Unsaved(), DataLoader(Jitter(), 16, shuffle=True), callbacks=[Shapes()])
    recipe = ShadowRecipe.like(run, model, build_module=Unsaved, augment=jitter, callbacks=list)
    first, second = recipe(part(0, 32), 1), recipe(part(0, 32), 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(TypeError, match="must build a LightningModule, not a Linear"):
        ShadowRecipe.like(run, model, build_module=functools.partial(nn.Linear, 2, 2), augment=jitter, callbacks=list)
    set_up = ShadowRecipe.like(trainer(max_epochs=4), Classifier(), loader=loader(0, 64))
    assert (set_up.trainer_kwargs["max_epochs"], set_up.shuffle) == (4, False)


def test_a_model_of_another_trainer_raises():
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


def test_unrepeatable_trainings_raise():
    with pytest.raises(ValueError, match="the hyper-parameter inner is a module"):
        ShadowRecipe.like(*finished(Holds(nn.Linear(2, 2))))
    run, model = trainer(max_epochs=1), Plateau()
    run.fit(model, loader(0, 32), loader(32, 64))
    with pytest.raises(ValueError, match="a scheduler waits for 'val_acc', and shadow models have no validation data"):
        ShadowRecipe.like(run, model)


class Inherited(WeightPenaltyMixin, Classifier):
    pass


def test_a_defense_that_the_rebuilt_class_would_lose_raises():
    """A defense that another one builds on is no hyper-parameter."""
    model, run = Inherited(l2=0.1, on=RelaxLoss(alpha=2.0)), trainer(max_epochs=1)
    run.fit(model, loader(0, 64))
    with pytest.raises(ValueError, match=r"the model has WeightPenalty.*on=.*, and the rebuilt .* pass build_module="):
        ShadowRecipe.like(run, model)
    plain, run = Inherited(l2=0.1), trainer(max_epochs=1)
    run.fit(plain, loader(0, 64))
    assert ShadowRecipe.like(run, plain).build().defense == plain.defense
