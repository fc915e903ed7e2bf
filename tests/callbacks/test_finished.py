"""A hardening that loads the finished weights itself."""

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file
from torch.utils.data import DataLoader, random_split

from lightning_cwrf import (
    AuditResult,
    CriticalRewindCallback,
    DefenseCallback,
    FinishedWeightsCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    VanillaSnapshotCallback,
)
from tests.helpers import Classifier, loader, part, trainer


class Splits(LightningDataModule):
    """Digits with a split for everything; the test split exists only after ``setup("test")``."""

    def setup(self, stage):
        self.stages = [*getattr(self, "stages", []), stage]
        if stage == "test":
            self.test = part(200, 264)

    def train_dataloader(self):
        return loader(0, 64, shuffle=True)

    def val_dataloader(self):
        return loader(100, 140)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=16)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The files of a first training: its checkpoint and its vanilla weights."""
    folder = tmp_path_factory.mktemp("first")
    torch.manual_seed(0)
    model = Classifier()
    first = trainer(folder, max_epochs=6, callbacks=[VanillaSnapshotCallback(folder / "init.safetensors")])
    first.fit(model, loader(0, 64, shuffle=True))
    first.save_checkpoint(folder / "finished.ckpt")
    torch.save(model.state_dict(), folder / "state.pt")
    save_file(model.state_dict(), folder / "state.safetensors")
    return folder


def weights_of(runs):
    return torch.load(runs / "state.pt", weights_only=True)


def same_weights(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["finished.ckpt", "state.pt", "state.safetensors"])
def test_weights_alone_are_loaded_and_the_training_starts_at_its_beginning(runs, name):
    model = Classifier(lr=0.0, optimizer="sgd")
    run = trainer(max_epochs=1, limit_train_batches=1, callbacks=[FinishedWeightsCallback(runs / name)])
    model.net[1].momentum = 0.0  # running statistics stay
    run.fit(model, loader(0, 64))
    assert run.global_step == 1
    state = weights_of(runs)
    assert same_weights(model, {**state, "net.1.num_batches_tracked": state["net.1.num_batches_tracked"] + 1})


def hardening(runs, finished=True, **data):
    data = {"nonmembers": "val", **data}
    return [
        *([FinishedWeightsCallback(runs / "finished.ckpt")] if finished else []),
        PrivacyScoringCallback(**data, vanilla=runs / "init.safetensors", steps=2),
        CriticalRewindCallback(rate=0.1),
        GradientMaskCallback(),
        DefenseCallback("relaxloss", alpha=0.2),
        MIAAuditCallback(nonmembers="test"),
    ]


def test_a_hardening_without_code_is_that_of_a_loaded_model(runs):
    models = []
    for finished in (True, False):
        torch.manual_seed(7)
        model = Classifier() if finished else Classifier.load_from_checkpoint(runs / "finished.ckpt")
        torch.manual_seed(8)
        callbacks = hardening(runs, finished)
        trainer(callbacks=callbacks).fit(model, datamodule=Splits())
        models.append((model, callbacks[-1].result))
    (ours, result), (theirs, expected) = models
    assert same_weights(ours, theirs.state_dict())
    assert result.values() == expected.values()
    assert len(result.is_member) == 128


def test_a_killed_hardening_resumes_and_does_not_load_again(runs, tmp_path):
    outcomes = []
    for broken in (False, True):
        torch.manual_seed(3)
        model = WithoutDropout()
        if broken:
            first = trainer(tmp_path, callbacks=hardening(runs), max_epochs=1)
            first.fit(model, datamodule=Plain())
            first.save_checkpoint(tmp_path / "half.ckpt")
            model = WithoutDropout()
        run = trainer(tmp_path, callbacks=hardening(runs), max_epochs=3)
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


def test_resuming_the_first_training_is_an_error(runs):
    run = trainer(callbacks=hardening(runs), max_epochs=40)
    with pytest.raises(MisconfigurationException, match="leave ckpt_path out"):
        run.fit(Classifier(), datamodule=Splits(), ckpt_path=runs / "finished.ckpt")


def test_resuming_with_other_finished_weights_is_an_error(runs, tmp_path):
    callbacks = [FinishedWeightsCallback(runs / "finished.ckpt")]
    first = trainer(tmp_path, callbacks=callbacks, max_epochs=1)
    first.fit(Classifier(), loader(0, 64))
    first.save_checkpoint(tmp_path / "half.ckpt")
    torch.save(Classifier().state_dict(), tmp_path / "other.pt")
    again = trainer(tmp_path, callbacks=[FinishedWeightsCallback(tmp_path / "other.pt")])
    with pytest.raises(MisconfigurationException, match="did its work with weights="):
        again.fit(Classifier(), loader(0, 64), ckpt_path=tmp_path / "half.ckpt")
    gone = trainer(tmp_path, callbacks=[FinishedWeightsCallback(tmp_path / "gone.ckpt")])
    gone.fit(Classifier(), loader(0, 64), ckpt_path=tmp_path / "half.ckpt")  # which has the weights


def test_the_same_callback_loads_once_for_a_module_and_again_for_another(runs):
    callback = FinishedWeightsCallback(runs / "state.pt")
    model = Classifier()
    trainer(callbacks=[callback], max_epochs=1).fit(model, loader(0, 64))
    after = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(callbacks=[callback], max_epochs=1, limit_train_batches=0)
    run.fit(model, loader(0, 64))
    assert same_weights(model, after)
    other = Classifier()
    trainer(callbacks=[callback], max_epochs=1, limit_train_batches=0).fit(other, loader(0, 64))
    assert same_weights(other, weights_of(runs))


class BuiltLater(Classifier):
    def __init__(self):
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = Classifier().net


def test_layers_of_configure_model_and_an_average_have_the_finished_weights(runs):
    average = WeightAveraging()
    model = BuiltLater()
    run = trainer(callbacks=[FinishedWeightsCallback(runs / "state.pt"), average], limit_train_batches=0)
    run.fit(model, loader(0, 64))
    assert same_weights(model, weights_of(runs))
    assert same_weights(average._average_model.module, weights_of(runs))


def test_weights_that_do_not_fit_are_an_error_that_names_them(runs, tmp_path):
    def fit(model, state):
        torch.save(state, tmp_path / "bad.pt")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            run = trainer(callbacks=[FinishedWeightsCallback(tmp_path / "bad.pt")], limit_train_batches=0)
            run.fit(model, loader(0, 64))
        except ValueError:
            assert same_weights(model, before)
            raise

    state = weights_of(runs)
    lacking = {name: value for name, value in state.items() if name != "net.5.bias"}
    with pytest.raises(ValueError, match=r"lack 'net\.5\.bias'"):
        fit(Classifier(), lacking)
    with pytest.raises(ValueError, match="have an unknown 'more'"):
        fit(Classifier(), {**state, "more": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'net\.0\.weight' of shape \(8, 1, 3, 3\) instead of \(4, 1, 3, 3\)"):
        fit(Classifier(width=4), state)
    with pytest.raises(ValueError, match=r"have 'net\.0\.weight' as torch\.int8"):
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


def test_files_that_hold_no_weights_are_an_error(runs, tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(FileNotFoundError, match="no finished weights"):
        trainer(callbacks=[FinishedWeightsCallback(tmp_path / "none.ckpt")]).fit(Classifier(), loader(0, 64))
    with pytest.raises(ValueError, match="cannot read finished weights"):
        trainer(callbacks=[FinishedWeightsCallback(tmp_path / "text.ckpt")]).fit(Classifier(), loader(0, 64))
    with pytest.raises(ValueError, match="Vanilla/1 instead of finished weights"):
        trainer(callbacks=[FinishedWeightsCallback(runs / "init.safetensors")]).fit(Classifier(), loader(0, 64))
    with pytest.raises(TypeError, match="path must be"):
        FinishedWeightsCallback(Classifier())


def test_a_hardening_of_an_untrained_model_is_an_error_whatever_its_seed(runs):
    for seed in (0, 1):  # 0 is that of the vanilla weights
        torch.manual_seed(seed)
        run = trainer(callbacks=hardening(runs, finished=False))
        with pytest.raises(ValueError, match="looks untrained"):
            run.fit(Classifier(), datamodule=Splits())


def test_splits_of_a_datamodule_are_read_for_their_stage(runs):
    data = Splits()
    callbacks = hardening(runs, members="train")
    trainer(callbacks=callbacks, max_epochs=1).fit(Classifier(), datamodule=data)
    assert data.stages == ["fit"]  # the test split is that of a copy
    assert len(callbacks[1].nonmembers.dataset) == 40
    assert len(callbacks[-1].nonmembers.dataset) == 64
    given = MIAAuditCallback(nonmembers=Splits())  # its test split
    trainer(callbacks=[given], max_epochs=1).fit(Classifier(), loader(0, 64))
    assert given.result is not None


class SplitsAtRandom(Splits):
    """Splits all data in each ``setup``, and scales them by the stage."""

    generator = None

    def setup(self, stage):
        parts = random_split(part(0, 300), [100, 100, 100], generator=self.generator and self.generator())
        self.train, self.val, self.test = parts
        self.scale = 1.0 if stage == "fit" else 0.5

    def train_dataloader(self):
        self.made = (list(self.train.indices), self.scale)
        return DataLoader(self.train, batch_size=50)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=50)


def test_reading_a_split_does_not_change_what_the_fit_trains_on():
    class Seeded(SplitsAtRandom):
        def generator(self):
            return torch.Generator().manual_seed(1)

    made = []
    for audits in ([], [MIAAuditCallback(nonmembers="test")]):
        torch.manual_seed(3)
        data = Seeded()
        trainer(callbacks=audits, max_epochs=1).fit(Classifier(), datamodule=data)
        made.append((*data.made, torch.rand(1).item()))
    assert made[0] == made[1]
    assert made[0][1] == 1.0


def test_a_split_that_depends_on_the_random_state_is_an_error():
    with pytest.raises(MisconfigurationException, match="SplitsAtRandom splits its data at random"):
        trainer(callbacks=[MIAAuditCallback(nonmembers="test")]).fit(Classifier(), datamodule=SplitsAtRandom())


def test_a_datamodule_beside_that_of_the_fit_is_prepared_and_one_loader_may_be_in_a_list():
    class Prepared(Splits):
        def prepare_data(self):
            self.ready = True

        def test_dataloader(self):
            assert self.ready
            return [super().test_dataloader()]

    audit = MIAAuditCallback(nonmembers=Prepared())
    trainer(callbacks=[audit], max_epochs=1).fit(Classifier(), loader(0, 64))
    assert len(audit.result.is_member) == 128


def test_splits_that_are_not_there_are_an_error():
    class Two(Splits):
        def test_dataloader(self):
            return [loader(200, 264), loader(264, 300)]

    for data, problem in ((Two(), "several loaders"), (None, "has no test_dataloader")):
        run = trainer(callbacks=[MIAAuditCallback(nonmembers="test")])
        given = {"datamodule": data} if data else {"train_dataloaders": loader(0, 64)}
        with pytest.raises(MisconfigurationException, match=problem):
            run.fit(Classifier(), **given)
    with pytest.raises(ValueError, match="nonmembers must be 'train' or 'val'"):
        MIAAuditCallback(nonmembers="tset")
    with pytest.raises(TypeError, match="members: expected a DataLoader"):
        MIAAuditCallback(nonmembers="test", members=3)


def test_the_last_audit_is_saved_and_an_earlier_file_is_not_replaced(tmp_path):
    path = tmp_path / "audit.json"
    callback = MIAAuditCallback(loader(100, 140), every_n_epochs=1, save=path)
    model = Classifier()
    trainer(callbacks=[callback], max_epochs=2).fit(model, loader(0, 64))
    assert AuditResult.load(path).values() == callback.result.values()
    with pytest.raises(MisconfigurationException, match="overwrite=True"):
        again = MIAAuditCallback(loader(100, 140), save=path)
        trainer(callbacks=[again], max_epochs=2).fit(model, loader(0, 64))
    replaced = MIAAuditCallback(loader(100, 160), save=path, overwrite=True)
    trainer(callbacks=[replaced], max_epochs=2).fit(model, loader(0, 64))
    assert len(AuditResult.load(path).is_member) == 124


def test_files_that_no_audit_can_be_saved_to_are_refused_before_the_training(tmp_path):
    (tmp_path / "file").touch()
    for path, message in (("a.ckpt", "suffix of another kind"), ("", "is a folder"), ("file/a.json", "not a folder")):
        with pytest.raises(ValueError, match=message):
            MIAAuditCallback(loader(100, 140), save=tmp_path / path)
    twins = [MIAAuditCallback(loader(100, 140), save=tmp_path / "a.json", name=name) for name in ("one", "two")]
    with pytest.raises(MisconfigurationException, match="two audits in this Trainer save to"):
        trainer(callbacks=twins, max_epochs=1).fit(Classifier(), loader(0, 64))


CONFIG = """
seed_everything: 5
model: {class_path: tests.helpers.Classifier}
data: {class_path: tests.callbacks.test_finished.Splits}
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {class_path: lightning_cwrf.FinishedWeightsCallback, init_args: {path: FOLDER/finished.ckpt}}
    - class_path: lightning_cwrf.PrivacyScoringCallback
      init_args: {nonmembers: val, vanilla: FOLDER/init.safetensors, steps: 2}
    - {class_path: lightning_cwrf.CriticalRewindCallback, init_args: {rate: 0.1}}
    - {class_path: lightning_cwrf.GradientMaskCallback}
    - class_path: lightning_cwrf.DefenseCallback
      init_args: {defense: {class_path: lightning_cwrf.RelaxLoss, init_args: {alpha: 0.2}}}
    - {class_path: lightning_cwrf.MIAAuditCallback, init_args: {nonmembers: test}}
"""


def test_a_hardening_from_yaml_alone(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "harden.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG.replace("FOLDER", str(runs)))))
    cli = LightningCLI(args=["fit", "--config", "harden.yaml"], save_config_callback=None)
    assert type(cli.model) is Classifier
    audit = next(each for each in cli.trainer.callbacks if isinstance(each, MIAAuditCallback))
    assert len(audit.result.is_member) == 128
    moved = (cli.model.net[0].weight - weights_of(runs)["net.0.weight"]).abs().mean()
    fresh = (Classifier().net[0].weight - weights_of(runs)["net.0.weight"]).abs().mean()
    assert moved < fresh / 2
