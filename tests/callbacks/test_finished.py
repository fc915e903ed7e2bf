"""A hardening that loads the finished weights itself."""

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cwrf import FinishedWeightsCallback, MIAAuditCallback
from tests.callbacks.helpers import Splits, hardening, same_weights
from tests.helpers import QUIET_TRAINER, Classifier, loader, trainer


def weights_of(first_files):
    return torch.load(first_files / "state.pt", weights_only=True)


@pytest.mark.parametrize("name", ["finished.ckpt", "state.pt", "state.safetensors"])
def test_weights_alone_are_loaded_and_the_training_starts_at_its_beginning(first_files, name):
    model = Classifier(lr=0.0, optimizer="sgd")
    run = trainer(max_epochs=1, limit_train_batches=1, callbacks=[FinishedWeightsCallback(first_files / name)])
    model.net[1].momentum = 0.0  # running statistics stay
    run.fit(model, loader(0, 64))
    assert run.global_step == 1
    state = weights_of(first_files)
    assert same_weights(model, {**state, "net.1.num_batches_tracked": state["net.1.num_batches_tracked"] + 1})


@pytest.mark.slow
def test_a_hardening_without_code_is_that_of_a_loaded_model(first_files):
    models = []
    for finished in (True, False):
        torch.manual_seed(7)
        model = Classifier() if finished else Classifier.load_from_checkpoint(first_files / "finished.ckpt")
        torch.manual_seed(8)
        callbacks = hardening(first_files, finished)
        trainer(callbacks=callbacks).fit(model, datamodule=Splits())
        models.append((model, callbacks[-1].result))
    (ours, result), (theirs, expected) = models
    assert same_weights(ours, theirs.state_dict())
    assert result.values() == expected.values()
    assert len(result.is_member) == 128


@pytest.mark.slow
def test_a_killed_hardening_resumes_and_does_not_load_again(first_files, tmp_path):
    outcomes = []
    for broken in (False, True):
        torch.manual_seed(3)
        model = WithoutDropout()
        if broken:
            first = trainer(tmp_path, callbacks=hardening(first_files), max_epochs=1)
            first.fit(model, datamodule=Plain())
            first.save_checkpoint(tmp_path / "half.ckpt")
            model = WithoutDropout()
        run = trainer(tmp_path, callbacks=hardening(first_files), max_epochs=3)
        run.fit(model, datamodule=Plain(), ckpt_path=tmp_path / "half.ckpt" if broken else None)
        outcomes.append(model)
    assert same_weights(outcomes[0], outcomes[1].state_dict())


class WithoutDropout(Classifier):
    """Lightning does not restore the random state of a resumed fit."""

    def __init__(self):
        super().__init__()
        self.net[4].p = 0.0


class Plain(Splits):
    def train_dataloader(self):
        return loader(0, 64)


def test_resuming_the_first_training_is_an_error(first_files):
    run = trainer(callbacks=hardening(first_files), max_epochs=40)
    with pytest.raises(MisconfigurationException, match="leave ckpt_path out"):
        run.fit(Classifier(), datamodule=Splits(), ckpt_path=first_files / "finished.ckpt")


def test_resuming_with_other_finished_weights_is_an_error(first_files, tmp_path):
    callbacks = [FinishedWeightsCallback(first_files / "finished.ckpt")]
    first = trainer(tmp_path, callbacks=callbacks, max_epochs=1)
    first.fit(Classifier(), loader(0, 64))
    first.save_checkpoint(tmp_path / "half.ckpt")
    torch.save(Classifier().state_dict(), tmp_path / "other.pt")
    again = trainer(tmp_path, callbacks=[FinishedWeightsCallback(tmp_path / "other.pt")])
    with pytest.raises(MisconfigurationException, match="did its work with weights="):
        again.fit(Classifier(), loader(0, 64), ckpt_path=tmp_path / "half.ckpt")
    gone = trainer(tmp_path, callbacks=[FinishedWeightsCallback(tmp_path / "gone.ckpt")])
    gone.fit(Classifier(), loader(0, 64), ckpt_path=tmp_path / "half.ckpt")  # which has the weights


def test_the_same_callback_loads_once_for_a_module_and_again_for_another(first_files):
    callback = FinishedWeightsCallback(first_files / "state.pt")
    model = Classifier()
    trainer(callbacks=[callback], max_epochs=1).fit(model, loader(0, 64))
    after = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(callbacks=[callback], max_epochs=1, limit_train_batches=0)
    run.fit(model, loader(0, 64))
    assert same_weights(model, after)
    other = Classifier()
    trainer(callbacks=[callback], max_epochs=1, limit_train_batches=0).fit(other, loader(0, 64))
    assert same_weights(other, weights_of(first_files))


class BuiltLater(Classifier):
    def __init__(self):
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = Classifier().net


def test_layers_of_configure_model_and_an_average_have_the_finished_weights(first_files):
    average = WeightAveraging()
    model = BuiltLater()
    run = trainer(callbacks=[FinishedWeightsCallback(first_files / "state.pt"), average], limit_train_batches=0)
    run.fit(model, loader(0, 64))
    assert same_weights(model, weights_of(first_files))
    assert same_weights(average._average_model.module, weights_of(first_files))


def test_weights_that_do_not_fit_are_an_error_that_names_them(first_files, tmp_path):
    def fit(model, state):
        torch.save(state, tmp_path / "bad.pt")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            run = trainer(callbacks=[FinishedWeightsCallback(tmp_path / "bad.pt")], limit_train_batches=0)
            run.fit(model, loader(0, 64))
        except ValueError:
            assert same_weights(model, before)
            raise

    state = weights_of(first_files)
    lacking = {name: value for name, value in state.items() if name != "net.5.bias"}
    with pytest.raises(ValueError, match=r"lack 'net\.5\.bias'"):
        fit(Classifier(), lacking)
    with pytest.raises(ValueError, match="have an unknown 'more'"):
        fit(Classifier(), {**state, "more": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'net\.0\.weight' of shape \(8, 1, 3, 3\) instead of \(4, 1, 3, 3\)"):
        fit(Classifier(width=4), state)
    with pytest.raises(ValueError, match=r"has 'net\.0\.weight' as torch\.int8"):
        fit(Classifier(), {name: (100 * value).to(torch.int8) for name, value in state.items()})
    with pytest.raises(ValueError, match=r"NaN or infinite values in 'net\.5\.bias'"):
        fit(Classifier(), {**state, "net.5.bias": torch.full((10,), torch.nan)})
    loose = Classifier()
    loose.strict_loading = False
    with pytest.raises(ValueError, match=r"lack 'net\.0\.weight'"):
        fit(loose, {})
    with pytest.warns(UserWarning, match=r"lack 'net\.5\.bias': strict_loading is False"):
        fit(loose, lacking)
    assert torch.equal(loose.net[0].weight, state["net.0.weight"])


def test_files_that_hold_no_weights_are_an_error(first_files, tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(FileNotFoundError, match="no finished weights"):
        trainer(callbacks=[FinishedWeightsCallback(tmp_path / "none.ckpt")]).fit(Classifier(), loader(0, 64))
    with pytest.raises(ValueError, match="cannot read finished weights"):
        trainer(callbacks=[FinishedWeightsCallback(tmp_path / "text.ckpt")]).fit(Classifier(), loader(0, 64))
    with pytest.raises(ValueError, match="Vanilla/1 instead of finished weights"):
        trainer(callbacks=[FinishedWeightsCallback(first_files / "init.safetensors")]).fit(Classifier(), loader(0, 64))
    with pytest.raises(TypeError, match="path must be"):
        FinishedWeightsCallback(Classifier())


def test_a_hardening_of_an_untrained_model_is_an_error_whatever_its_seed(first_files):
    for seed in (0, 1):  # 0 is that of the vanilla weights
        torch.manual_seed(seed)
        run = trainer(callbacks=hardening(first_files, finished=False))
        with pytest.raises(ValueError, match="looks untrained"):
            run.fit(Classifier(), datamodule=Splits())


CONFIG = (
    """
seed_everything: 5
model: {class_path: tests.helpers.Classifier}
data: {class_path: tests.callbacks.helpers.Splits}
"""
    + QUIET_TRAINER
    + """  callbacks:
    - {class_path: lightning_cwrf.FinishedWeightsCallback, init_args: {path: FOLDER/finished.ckpt}}
    - class_path: lightning_cwrf.PrivacyScoringCallback
      init_args: {nonmembers: val, vanilla: FOLDER/init.safetensors, steps: 2}
    - {class_path: lightning_cwrf.CriticalRewindCallback, init_args: {rate: 0.1}}
    - {class_path: lightning_cwrf.GradientMaskCallback}
    - class_path: lightning_cwrf.DefenseCallback
      init_args: {defense: {class_path: lightning_cwrf.RelaxLoss, init_args: {alpha: 0.2}}}
    - {class_path: lightning_cwrf.MIAAuditCallback, init_args: {nonmembers: test}}
"""
)


@pytest.mark.slow
def test_a_hardening_from_yaml_alone(first_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "harden.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG.replace("FOLDER", str(first_files)))))
    cli = LightningCLI(args=["fit", "--config", "harden.yaml"], save_config_callback=None)
    assert type(cli.model) is Classifier
    audit = next(each for each in cli.trainer.callbacks if isinstance(each, MIAAuditCallback))
    assert len(audit.result.is_member) == 128
    moved = (cli.model.net[0].weight - weights_of(first_files)["net.0.weight"]).abs().mean()
    fresh = (Classifier().net[0].weight - weights_of(first_files)["net.0.weight"]).abs().mean()
    assert moved < fresh / 2
