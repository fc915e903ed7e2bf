"""What attach and detach change on a module, and on which modules they raise."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_cwrf.defenses import DefenseMixin, DefenseState, RelaxLossMixin
from tests.defenses.cases import Silent
from tests.helpers import Classifier, HardenedClassifier, ManualClassifier, loader, part, trainer


def test_class_and_attach_are_the_same_training():
    states = []
    for make in (lambda: HardenedClassifier(alpha=0.7), lambda: RelaxLossMixin.attach(Classifier(), alpha=0.7)):
        torch.manual_seed(0)
        model = make()
        run = trainer(max_epochs=3)
        run.fit(model, loader(0, 64), loader(100, 132))
        assert {"train_loss", "train_loss_epoch", "val_acc"} <= set(run.callback_metrics)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[1])


def test_attach_changes_the_class_and_nothing_else():
    model = Classifier(width=4)
    keys, hparams = list(model.state_dict()), dict(model.hparams)
    attached = RelaxLossMixin.attach(model, alpha=0.5)
    assert attached is model
    assert isinstance(model, Classifier)
    assert isinstance(model, RelaxLossMixin)
    assert list(model.state_dict()) == keys
    assert {k: v for k, v in model.hparams.items() if k != "defense"} == hparams
    assert model.hparams["defense"] == {"name": "RelaxLossMixin", "alpha": 0.5, "upper": 1.0}
    assert type(RelaxLossMixin.attach(Classifier())) is type(model)
    RelaxLossMixin.detach(model)
    assert type(model) is Classifier
    assert dict(model.hparams) == hparams


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_an_attached_module_can_be_copied_and_pickled(copier):
    model = RelaxLossMixin.attach(Classifier(), alpha=0.5)
    twin = copier(model)
    assert type(twin) is type(model)
    assert twin.defense_settings == model.defense_settings
    assert all(torch.equal(twin.state_dict()[n], w) for n, w in model.state_dict().items())


def test_an_attribute_that_the_defense_would_hide_raises():
    class Guarded(Classifier):
        defense = "a castle"

    with pytest.raises(MisconfigurationException, match=r"RelaxLossMixin would hide Guarded\.defense: rename"):
        RelaxLossMixin.attach(Guarded())


def test_a_failed_attach_leaves_nothing_behind():
    class Broken(DefenseState):
        def __init__(self, module, defense):
            super().__init__(module, defense)
            raise RuntimeError("no")

    class BrokenMixin(DefenseMixin):
        state_class = Broken

    model = Classifier()
    before = set(vars(model))
    with pytest.raises(RuntimeError, match="no"):
        BrokenMixin.attach(model)
    assert type(model) is Classifier
    assert set(vars(model)) - before <= {"_hparams"}
    RelaxLossMixin.attach(model)


def test_misuse_raises():
    with pytest.raises(TypeError, match="needs a LightningModule, not Linear"):
        RelaxLossMixin.attach(nn.Linear(2, 2))
    model = Classifier()
    with pytest.raises(TypeError, match="RelaxLoss has no setting alhpa; it has alpha, upper"):
        RelaxLossMixin.attach(model, alhpa=1.0)
    assert type(model) is Classifier
    with pytest.raises(MisconfigurationException, match="has a defense already"):
        RelaxLossMixin.attach(RelaxLossMixin.attach(Classifier()))
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        RelaxLossMixin.attach(ManualClassifier())
    with pytest.raises(MisconfigurationException, match="no defense was attached"):
        RelaxLossMixin.detach(Classifier())
    with pytest.raises(TypeError, match="both take alpha"):

        class Clash(RelaxLossMixin, LightningModule):
            def __init__(self, alpha):
                super().__init__()

        class Taken(LightningModule):
            def __init__(self, alpha):
                super().__init__()

        class Clash2(RelaxLossMixin, Taken):
            pass


def test_the_users_classification_step_is_used():
    class Own(Silent):
        def classification_step(self, batch):
            return 2 * self(batch["image"]), batch["digit"]

    data = DataLoader([{"image": x, "digit": y} for x, y in part(0, 32)], batch_size=8)
    model = RelaxLossMixin.attach(Own(), alpha=0.1)
    trainer(max_epochs=1).fit(model, data)
