"""Modules and Trainers of pytorch_lightning get one message that names the fix, wherever they are given."""

import pytest
from torch import nn

from lightning_cwrf import (
    CriticalRewindCallback,
    DefenseCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    RelaxLossMixin,
    ShadowRecipe,
    VanillaSnapshotCallback,
    audit,
)
from tests.helpers import Classifier, loader, part, trainer

pl = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
MESSAGE = r"of pytorch_lightning, and lightning_cwrf works with lightning\.pytorch.*`import lightning\.pytorch as pl`"


class Theirs(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return None


def their_trainer(*callbacks):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, callbacks=list(callbacks), **quiet)


CALLBACKS = {
    "scoring": lambda: [PrivacyScoringCallback(part(100, 140), "redraw"), CriticalRewindCallback()],
    "mask": lambda: [GradientMaskCallback("mask")],
    "defense": lambda: [DefenseCallback("relaxloss")],
    "audit": lambda: [MIAAuditCallback(part(100, 140))],
    "snapshot": lambda: [VanillaSnapshotCallback("init.safetensors")],
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trainer_of_pytorch_lightning_is_refused_by_every_callback(name):
    with pytest.raises(TypeError, match=f"Theirs is a LightningModule {MESSAGE}|Trainer is a Trainer {MESSAGE}"):
        their_trainer(*CALLBACKS[name]()).fit(Theirs(), loader(0, 32))


def test_a_module_of_pytorch_lightning_is_refused():
    with pytest.raises(TypeError, match=f"Theirs is a LightningModule {MESSAGE}"):
        RelaxLossMixin.attach(Theirs())
    with pytest.raises(TypeError, match=MESSAGE):
        type("Hardened", (RelaxLossMixin, Theirs), {})


def test_recipes_refuse_both():
    given = {"loader": loader(0, 32)}
    with pytest.raises(TypeError, match=f"Trainer is a Trainer {MESSAGE}"):
        ShadowRecipe.like(their_trainer(), Classifier(), **given)
    with pytest.raises(TypeError, match=f"Theirs is a LightningModule {MESSAGE}"):
        ShadowRecipe.like(trainer(), Theirs(), **given)
    with pytest.raises(TypeError, match=f"Theirs is a LightningModule {MESSAGE}"):
        ShadowRecipe(Theirs, {"max_epochs": 1}, batch_size=8).build()


def test_a_module_of_pytorch_lightning_is_audited_as_any_other():
    assert not audit(Theirs(), members=part(0, 32), nonmembers=part(100, 132), attacks=["loss"]).failures
