"""Checkpoints and hyper-parameters of a module with a defense."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_cwrf.data.seen import record_seen, seen_by
from lightning_cwrf.defenses import DefenseMixin, PASTMixin, RelaxLossMixin
from tests.defenses.cases import Silent
from tests.helpers import Classifier, HardenedClassifier, loader, trainer


class Greedy(Classifier):
    """Takes any keyword, as many modules do: whatever stands in hyper_parameters is passed to it."""

    def __init__(self, **kwargs):
        unknown = set(kwargs) - {"width", "lr", "optimizer"}
        assert not unknown, unknown
        super().__init__(**kwargs)
        self.save_hyperparameters()


@pytest.mark.parametrize("cls", [Classifier, Greedy, Silent])
def test_a_hardened_checkpoint_loads_into_the_original_class(tmp_path, cls):
    model = RelaxLossMixin.attach(cls(), alpha=0.5)
    run = trainer(tmp_path, max_epochs=1, logger=CSVLogger(tmp_path))
    run.fit(model, loader(0, 32))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = cls.load_from_checkpoint(tmp_path / "last.ckpt")
    assert type(again) is cls
    assert all(torch.equal(again.state_dict()[n], w) for n, w in model.state_dict().items())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["lightning_cwrf_defense"] == {"name": "RelaxLossMixin", "alpha": 0.5, "upper": 1.0}
    logged = (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text()
    assert "alpha: 0.5" in logged


def test_settings_that_changed_since_the_checkpoint_are_reported(tmp_path):
    model = HardenedClassifier(alpha=0.5)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, loader(0, 32))
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert HardenedClassifier.load_from_checkpoint(tmp_path / "last.ckpt").defense_settings["alpha"] == 0.5
    with pytest.warns(UserWarning, match=r"trained with the defense .*0\.5.* now it is .*0\.9"):
        HardenedClassifier.load_from_checkpoint(tmp_path / "last.ckpt", alpha=0.9)


def test_nothing_of_the_users_own_is_overwritten(tmp_path):
    """A hyper-parameter and a checkpoint entry that are called defense too."""

    class Own(Classifier):
        def __init__(self, defense="none"):
            super().__init__()
            self.save_hyperparameters()

        def on_save_checkpoint(self, checkpoint):
            checkpoint["defense"] = {"name": "mine", "strength": 3}

        def on_load_checkpoint(self, checkpoint):
            self.loaded = checkpoint["defense"]

    model = RelaxLossMixin.attach(Own(defense="castle"), alpha=0.5)
    assert model.hparams["defense"] == "castle"
    assert model.hparams["lightning_cwrf_defense"]["alpha"] == 0.5
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, loader(0, 32))
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["defense"] == {"name": "mine", "strength": 3}
    assert saved["lightning_cwrf_defense"] == {"name": "RelaxLossMixin", "alpha": 0.5, "upper": 1.0}
    again = RelaxLossMixin.attach(Own.load_from_checkpoint(tmp_path / "last.ckpt"), alpha=0.5)
    assert again.loaded == {"name": "mine", "strength": 3}
    assert DefenseMixin.detach(again).hparams["defense"] == "castle"


def test_a_checkpoint_of_the_previous_release_has_its_defense():
    model = RelaxLossMixin.attach(Classifier(), alpha=0.9)
    with pytest.warns(UserWarning, match=r"trained with the defense .*0\.5.* now it is .*0\.9"):
        model.on_load_checkpoint({"defense": {"name": "RelaxLossMixin", "alpha": 0.5, "upper": 1.0}})


class TakesAll(Classifier):
    """Saves every argument, its subclasses' too."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()


class Against(PASTMixin, TakesAll):
    pass


def test_reference_data_are_no_hyper_parameters(tmp_path):
    reference = loader(200, 260)
    model = Against(nonmembers=reference, lam=1e-4)
    assert model.hparams["lam"] == 1e-4
    run = trainer(tmp_path, max_epochs=1, logger=CSVLogger(tmp_path))
    run.fit(model, loader(0, 32))
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert "nonmembers" not in model.hparams
    assert "nonmembers" not in (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text()
    assert Against.load_from_checkpoint(tmp_path / "last.ckpt", nonmembers=reference).defense_settings["lam"] == 1e-4


def test_what_a_defense_has_seen_is_in_its_checkpoint():
    model, again = (RelaxLossMixin.attach(Classifier()) for _ in range(2))
    seen = {(bytes(range(16)), 3), (bytes(range(16, 32)), None)}
    record_seen(model, "non-members", seen)
    checkpoint = {}
    model.on_save_checkpoint(checkpoint)
    again.on_load_checkpoint(checkpoint)
    assert seen_by(again) == {"non-members": seen}
