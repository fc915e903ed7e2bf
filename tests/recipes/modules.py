"""Modules and trainings that the tests of recipes share."""

import functools

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_cwrf import (
    ShadowRecipe,
    train_shadows,
)
from tests.helpers import OPTIMIZERS, Classifier, loader, part, trainer

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


class Hooked(Plain):
    def on_before_zero_grad(self, optimizer):
        pass


class Saved(Classifier):
    def __init__(self, width=4):
        super().__init__(width)
        self.save_hyperparameters()


def stackable(module, **arguments):
    settings = {**CPU, "max_epochs": 2, "precision": "64-true", **arguments}
    return ShadowRecipe(module, settings, batch_size=16)


def finished(model=None, data=None, **arguments):
    model = Classifier(width=4) if model is None else model
    run = trainer(max_epochs=3, **arguments)
    run.fit(model, loader(0, 64, shuffle=True) if data is None else data)
    return run, model


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
