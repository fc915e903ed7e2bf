"""Every Python and YAML example of README and docs runs, with the names that the pages assume."""

import functools
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

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
from lightning_cwrf.report import comparison_table
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
    names = ("audit", "shadows", "guide", "models", "report", "command", "private_finetuning", "reconstruction")
    others = [DOCS / f"{name}.md" for name in names]
    for page in [*sorted(PAGES.glob("*.md")), *others]:
        for i, code in enumerate(blocks(page)):
            slow = [pytest.mark.slow] if "train_shadows(" in code else []
            yield pytest.param(code, id=f"{page.stem}-{i}", marks=slow)
    yield pytest.param(
        "\n".join(blocks(ROOT / "README.md")), id="README", marks=pytest.mark.slow
    )  # its second example uses the first


def test_every_page_is_that_of_a_defense():
    """That every defense has one, with its settings, is in tests/defenses/test_registry.py."""
    wrappers = {"rounding", "memguard"}
    assert {page.stem for page in PAGES.glob("*.md")} == {*available_defenses(), *wrappers, "README"}


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


@pytest.mark.slow
@pytest.mark.parametrize("code", list(examples()))
def test_examples_run(code, files, after_a_run, monkeypatch, tmp_path):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = MyLitClassifier.load_from_checkpoint("finished.ckpt")
    if "export(" in code:  # what was audited
        model = after_a_run["hardened"]
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
        "nn": nn,
        "torch": torch,
        "comparison_table": comparison_table,
        "privacy": after_a_run["hardened_audit"],
    }
    with ATTACKS.temporary(), DEFENSES.temporary():
        exec(shortened(code), names)


def shortened(code):
    """The same with one epoch, and with four shadow models, or the eight that an audit of a recipe needs."""
    models = 8 if "audit_recipe(" in code else 4
    if "econstruct" in code:  # an attack of a few steps
        code = re.sub(r"\bsteps=\d+", "steps=5", code)
    return re.sub(r"\bn=\d+", f"n={models}", re.sub(r"\bmax_epochs=\d+", "max_epochs=1", code))


WHOLE = [
    DOCS / "tutorial.md",
    *(page for page in sorted((DOCS / "howto").glob("*.md")) if page.stem not in ("README", "ddp")),
]


def whole_pages():
    """The pages whose examples are one script; a comment above an example names the packages that it needs."""
    for page in WHOLE:
        needs = re.findall(r"<!-- needs: (.*) -->", page.read_text(encoding="utf-8"))
        missing = {name for line in needs for name in line.split(", ") if importlib.util.find_spec(name) is None}
        skip = [pytest.mark.skip(reason=f"{name} is not installed") for name in sorted(missing)]
        yield pytest.param(page, id=page.stem, marks=[pytest.mark.slow, *skip])


@pytest.mark.slow
def test_the_notebook_is_that_of_the_tutorial_and_runs(monkeypatch, tmp_path):
    """Its cells run one after another, as in Jupyter; ``python tools/notebook.py`` writes it."""
    made = runpy.run_path(str(ROOT / "tools" / "notebook.py"))["notebook"]
    text = (DOCS / "tutorial.ipynb").read_text(encoding="utf-8")
    assert text == made((DOCS / "tutorial.md").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == len(blocks(DOCS / "tutorial.md")) > 5
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for cell in cells:
        exec(shortened(cell), names)
    assert set(names["results"]) == {"unprotected", "hardened"}


class RandomImages(Dataset):
    """In the place of CIFAR-10: 50 images of its shape, lighter with each class."""

    def __init__(self, root, train, transform, download=False):
        self.transform = transform

    def __len__(self):
        return 50

    def __getitem__(self, i):
        pixels = np.random.default_rng(i).integers(64, size=(32, 32, 3), dtype=np.uint8) + np.uint8(19 * (i % 10))
        return self.transform(Image.fromarray(pixels)), i % 10


class SmallNet(nn.Sequential):
    """In the place of ResNet18, for time: with the two layers that the page replaces."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.maxpool = nn.Conv2d(3, 64, 7), nn.MaxPool2d(2)
        for name, layer in (("relu", nn.ReLU()), ("pool", nn.AdaptiveAvgPool2d(4)), ("flatten", nn.Flatten())):
            self.add_module(name, layer)
        self.fc = nn.Linear(64 * 16, num_classes)


@pytest.mark.parametrize("page", list(whole_pages()))
def test_whole_pages_run(page, files, monkeypatch, tmp_path):
    shutil.copy(files / "finished.ckpt", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", RandomImages)
    monkeypatch.setattr(torchvision.models, "resnet18", SmallNet)
    names = {"MyLitClassifier": MyLitClassifier, "train_set": part(0, 64), "test_set": part(64, 128)}
    code = shortened("\n".join(blocks(page)))
    if page.stem == "cifar":  # fewer images, and a first training that learns something
        code = re.sub(r"(\d)_000\b", r"\1", code).replace(
            "max_epochs=1, callbacks=[Van", "max_epochs=40, callbacks=[Van"
        )
    exec(code, names)
    if page.stem == "ci_gate":  # of 64 members and non-members: too few for the page's own limits
        result = lightning_cwrf.audit(MyLitClassifier(), members=part(0, 64), nonmembers=part(64, 128))
        assert names["exceeded"](result, {("loss", "auroc"): 1.1}) == []
        assert len(names["exceeded"](result, {("loss", "auroc"): 0.5, ("loss", "advantage"): 0.0})) == 2
        with pytest.raises(KeyError):
            names["exceeded"](result, {("lira", "auroc"): 0.6})
        with pytest.raises(AssertionError):
            names["test_the_model_does_not_leak"]()
        assert lightning_cwrf.AuditResult.load("audit.json").scores.keys() == {"loss"}


@pytest.mark.slow
def test_the_ddp_page_runs_as_a_script_on_two_processes(files, tmp_path):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    (tmp_path / "harden.py").write_text(shortened(*blocks(DOCS / "howto" / "ddp.md")))
    (tmp_path / "mine.py").write_text(
        "from tests.helpers import loader\n"
        "from tests.test_docs import MyLitClassifier\n"
        "train_loader, test_loader, reference_loader = loader(0, 64), loader(64, 128), loader(200, 260)\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "harden.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("64 members, 64 non-members") == 1


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
