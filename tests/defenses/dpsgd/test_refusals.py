"""Trainings that DP-SGD cannot make private are refused."""

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from lightning_cwrf.defenses import DPSGDMixin
from tests.defenses.dpsgd.cases import Conv
from tests.helpers import Classifier, loader, part, trainer

pytestmark = pytest.mark.slow


class Mixing(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.BatchNorm2d(4, affine=False),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def test_layers_that_mix_examples_raise_by_name_or_are_replaced():
    with pytest.raises(MisconfigurationException, match=r"net\.1 \(BatchNorm2d mixes .*; net\.3 \(BatchNorm2d mixes"):
        trainer().fit(DPSGDMixin.attach(Mixing(), noise_multiplier=1.0), loader(0, 64))
    model = Mixing()
    with pytest.warns(UserWarning, match=r"replaced net\.1: BatchNorm2d by GroupNorm"):
        DPSGDMixin.attach(model, noise_multiplier=1.0, fix=True)
    trainer(max_epochs=1).fit(model, loader(0, 64))

    class Own(DPSGDMixin, Mixing):
        pass

    with pytest.warns(UserWarning, match=r"replaced net\.1"):
        assert isinstance(Own(noise_multiplier=1.0, fix=True).net[1], nn.GroupNorm)


class Unused(Conv):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)


def scaled():
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


class Mean(DPSGDMixin, Conv):
    def example_losses(self, logits, targets):
        return F.cross_entropy(logits, targets)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(part(0, 32))


def weighted():
    return DataLoader(part(0, 64), batch_size=8, sampler=WeightedRandomSampler(torch.ones(64), 64))


@pytest.mark.parametrize(
    ("model", "data", "settings", "error", "message"),
    [
        (Unused, None, {}, MisconfigurationException, "does not depend on spare.weight, spare.bias"),
        (Conv, None, {"plugins": [scaled()]}, MisconfigurationException, "use bf16-mixed"),
        (lambda: Conv(optimizer="lbfgs"), None, {}, MisconfigurationException, "gave LBFGS"),
        (Conv, weighted, {}, ValueError, "WeightedRandomSampler chooses examples"),
        (Conv, lambda: [next(iter(loader(0, 8)))], {}, TypeError, "from one DataLoader; got a list"),
        (Conv, lambda: DataLoader(Stream(), batch_size=4), {}, TypeError, "a stream"),
        (Conv, None, {"overfit_batches": 1}, MisconfigurationException, "overfit_batches=1"),
        (Conv, None, {"reload_dataloaders_every_n_epochs": 1}, MisconfigurationException, "train on new loaders"),
        (Conv, None, {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]}, MisconfigurationException,
         "logical batches of one size"),
        (Conv, None, {"accumulate_grad_batches": 2, "limit_train_batches": 3}, MisconfigurationException,
         "3 physical batches, and a logical batch 2"),
        (Conv, None, {"precision": "bf16-true"}, MisconfigurationException, "net.0.weight is torch.bfloat16"),
    ],
)  # fmt: skip
def test_unsupported_trainings_raise_before_the_first_step(model, data, settings, error, message):
    model = DPSGDMixin.attach(model(), noise_multiplier=1.0)
    with pytest.raises(error, match=message):
        trainer(**settings).fit(model, loader(0, 64) if data is None else data())
    assert model.privacy_spent.steps == 0


def test_other_misuse():
    with pytest.raises(ValueError, match=r"one loss per example, shape \(\d+,\), not \(\)"):
        trainer().fit(Mean(noise_multiplier=1.0), loader(0, 64))
    with pytest.raises(MisconfigurationException, match="set max_epochs or max_steps"):
        trainer(max_epochs=-1).fit(DPSGDMixin.attach(Conv(), target_epsilon=1.0), loader(0, 64))
    with pytest.warns(UserWarning, match=r"target_delta=0.1 is not below 1/n = 0.016"):
        trainer(max_epochs=1).fit(DPSGDMixin.attach(Conv(), noise_multiplier=1.0, target_delta=0.1), loader(0, 64))
