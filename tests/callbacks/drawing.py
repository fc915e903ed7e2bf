"""Private fine-tuning of the digits, which two files of tests share."""

from lightning.pytorch import Callback

from lightning_cwrf import (
    ExponentialMechanismCallback,
)
from tests.helpers import loader, trained

PRIVATE = (0, 96)


HEAD = ("net.5.weight", "net.5.bias")


def draws(public=None, **settings):
    given = {"target_epsilon": 2.0, "target_delta": 1e-3, "draws": 2} | settings
    return ExponentialMechanismCallback(loader(200, 260, batch_size=60) if public is None else public, **given)


def private(shuffle=True, **settings):
    return loader(*PRIVATE, batch_size=96, shuffle=shuffle, **settings)


def finished():
    return trained(epochs=2)[0]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Counts(Callback):
    """Training steps and epochs that were begun."""

    begun = 0

    def on_train_epoch_start(self, *_):
        self.begun += 1

    def on_train_batch_start(self, *_):
        self.begun += 1
