"""Every Python and YAML example of README and docs runs, with the names that the pages assume."""

import functools
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.nn import functional as F

import lightning_cwrf
from lightning_cwrf import (
    CriticalRewindCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    RelaxLossMixin,
    VanillaSnapshotCallback,
)
from lightning_cwrf.attacks.base import ATTACKS
from lightning_cwrf.defenses import available_defenses
from lightning_cwrf.defenses.registry import DEFENSES
from tests.helpers import Classifier, loader, part, trainer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = DOCS / "defenses"


class MyLitClassifier(Classifier):
    def __init__(self, width=8, lr=1e-2, dropout=0.1):
        super().__init__(width, lr)
        self.save_hyperparameters()
        self.net[4].p = dropout

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.hparams.lr)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class MyData(LightningDataModule):
    def train_dataloader(self):
        return loader(0, 64)

    def val_dataloader(self):
        return loader(200, 260)

    def test_dataloader(self):
        return loader(64, 128)


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def examples():
    others = [DOCS / f"{name}.md" for name in ("audit", "shadows", "guide", "models", "report", "command")]
    for page in [*sorted(PAGES.glob("*.md")), *others]:
        for i, code in enumerate(blocks(page)):
            slow = [pytest.mark.slow] if "train_shadows(" in code else []
            yield pytest.param(code, id=f"{page.stem}-{i}", marks=slow)
    yield pytest.param(
        "\n".join(blocks(ROOT / "README.md")), id="README", marks=pytest.mark.slow
    )  # its second example uses the first


def test_every_page_is_that_of_a_defense():
    """That every defense has one, with its settings, is in tests/defenses/test_registry.py."""
    assert {page.stem for page in PAGES.glob("*.md")} == {*available_defenses(), "README"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The finished model and the initial weights that README and guide load."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    run = trainer(folder, max_epochs=8, callbacks=[VanillaSnapshotCallback(folder / "init.safetensors")])
    run.fit(MyLitClassifier(), loader(0, 64))
    for name in ("finished.ckpt", "pretrained.ckpt"):
        run.save_checkpoint(folder / name)
    return folder


@pytest.fixture(scope="module")
def after_a_run(files):
    """What the guide's examples take from earlier ones: two fitted models with their Trainers and callbacks."""
    finished = MyLitClassifier.load_from_checkpoint(files / "finished.ckpt")
    plain_audit, hardened_audit = MIAAuditCallback(loader(64, 128)), MIAAuditCallback(loader(64, 128))
    first_trainer = trainer(max_epochs=1, callbacks=[plain_audit])
    first_trainer.fit(finished, loader(0, 64))
    hardened = MyLitClassifier.load_from_checkpoint(files / "finished.ckpt")
    scoring = PrivacyScoringCallback(loader(200, 260), files / "init.safetensors", steps=2)
    rewind = CriticalRewindCallback(rate=0.03)
    run = trainer(max_epochs=1, callbacks=[scoring, rewind, GradientMaskCallback(), hardened_audit])
    run.fit(RelaxLossMixin.attach(hardened, alpha=1.0), loader(0, 64))
    for audited in (plain_audit, hardened_audit):  # the guide plots LiRA, for which no shadow models are trained here
        audited.result.scores["lira"] = audited.result.scores["loss"]
        audited.result.estimates["lira"] = audited.result.estimates["loss"]
    return {
        "finished": finished, "first_trainer": first_trainer, "hardened": hardened, "trainer": run, "scoring": scoring,
        "rewind": rewind, "plain_audit": plain_audit, "hardened_audit": hardened_audit,
    }  # fmt: skip


@pytest.mark.parametrize("code", list(examples()))
def test_examples_run(code, files, after_a_run, monkeypatch, tmp_path):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = MyLitClassifier.load_from_checkpoint("finished.ckpt")
    names = {
        **{name: getattr(lightning_cwrf, name) for name in dir(lightning_cwrf)},
        "LightningModule": LightningModule,
        "model": model,
        "MyLitClassifier": MyLitClassifier,
        **(after_a_run if "hardened" in code or "scoring." in code else {"trainer": trainer(max_epochs=1)}),
        "train_loader": loader(0, 64),
        "test_loader": loader(64, 128),
        "reference_loader": loader(200, 260),
        "train_set": part(0, 64),
        "test_set": part(64, 128),
        "pool": part(0, 128),
        "population": part(300, 400),
        "members": loader(0, 64),
        "reference": loader(200, 260),
        "loader": loader(0, 64),
        "loss": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        "optimizer": torch.optim.Adam(model.parameters()),
        "functools": functools,
        "privacy": after_a_run["hardened_audit"],
    }
    with ATTACKS.temporary(), DEFENSES.temporary():
        exec(shortened(code), names)


def shortened(code):
    """The same with one epoch and four shadow models."""
    return re.sub(r"\bn=\d+", "n=4", re.sub(r"\bmax_epochs=\d+", "max_epochs=1", code))


@pytest.mark.slow
def test_the_yaml_example_hardens_the_finished_model(files, monkeypatch, tmp_path):
    (example,) = blocks(DOCS / "guide.md", "yaml")
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    (tmp_path / "harden.yaml").write_text(example.replace("max_epochs: 40", "max_epochs: 1"))
    cli = LightningCLI(args=["fit", "--config", "harden.yaml"], save_config_callback=None)
    assert type(cli.model) is MyLitClassifier
    audited = next(each for each in cli.trainer.callbacks if isinstance(each, MIAAuditCallback))
    assert audited.result.model_metrics["train_accuracy"].value > 0.5  # it was trained before
