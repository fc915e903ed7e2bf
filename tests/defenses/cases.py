"""The defenses, each with settings, and a model, that the tests share."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_cwrf.data import example_digests
from lightning_cwrf.defenses import create_defense
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership
from lightning_cwrf.shadows.store import ShadowStore
from tests.helpers import Classifier, loader, part, trained


class Small(Classifier):
    """Smooth and without BatchNorm or dropout, so that a gradient can be compared to the last digits."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10))


def ensemble(begin, end):
    """What train_shadows gives for a pool, with outputs that no model has."""
    generator = torch.Generator().manual_seed(0)
    digests = [digest for batch in loader(begin, end) for digest in example_digests(batch)]
    shape = 4, end - begin
    return ShadowOutputs(
        logits=torch.randn(*shape, 10, generator=generator),
        membership=balanced_membership(*shape, seed=0),
        targets=torch.tensor([y for _, y in part(begin, end)]),
        digests=digests,
        population=None,
        population_logits=None,
        store=ShadowStore(Path("nowhere"), "0"),
    )


MODELS = {"dmp": {"teacher": Classifier()}, "selena": {"ensemble": ensemble(0, 64)}}
"""What defenses need that learn from other models: on the training data of these tests, which are the first digits."""

SETTINGS = {
    "relaxloss": {"alpha": 0.5},
    "hamp": {"gamma": 0.8, "alpha": 0.01},
    "ccl": {"alpha": 0.5, "beta": 0.5},
    "past": {"lam": 1e-3, "alpha": 1.5},
    "label_smoothing": {"smoothing": 0.2},
    "confidence_penalty": {"beta": 0.2},
    "weight_penalty": {"l1": 1e-3, "l2": 1e-3},
    "adversarial_regularization": {"lam": 0.5, "attack_steps": 2},
    "mixup_mmd": {"mixup_alpha": 0.4, "lam": 1.0},
    "dmp": {"temperature": 2.0},
    "selena": {},
    "dpsgd": {"noise_multiplier": 0.5, "accountant": "rdp", "fix": True},
}


def defense(name):
    against = ("past", "adversarial_regularization", "mixup_mmd")
    extra = {"nonmembers": loader(300, 360)} if name in against else MODELS.get(name, {})
    return create_defense(name, **SETTINGS[name], **extra)


def start():
    model, vanilla = trained(epochs=5)
    model.net[4].p = 0.0  # dropout draws random numbers that a checkpoint does not carry
    return model, vanilla


class Silent(LightningModule):
    """Saves no hyper-parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x.flatten(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
