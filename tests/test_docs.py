"""Every example of the pages runs, with the names that the pages assume."""

import functools
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from lightning_cwrf import ShadowRecipe, train_shadows
from lightning_cwrf.attacks.base import ATTACKS
from lightning_cwrf.auditing import audit
from lightning_cwrf.defenses import available_defenses
from lightning_cwrf.defenses.registry import _DEFENSES
from tests.helpers import Classifier, loader, part, trainer

DOCS = Path(__file__).parents[1] / "docs"
PAGES = DOCS / "defenses"


class MyLitClassifier(Classifier):
    def __init__(self, width=8, lr=1e-2, dropout=0.1):
        super().__init__(width, lr)
        self.save_hyperparameters()
        self.net[4].p = dropout

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def examples():
    for page in [*sorted(PAGES.glob("*.md")), *(DOCS / f"{name}.md" for name in ("audit", "guide", "shadows"))]:
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)):
            yield pytest.param(code, id=f"{page.stem}-{i}")


def test_every_page_is_that_of_a_defense():
    """That every defense has one, with its settings, is in tests/defenses/test_registry.py."""
    assert {page.stem for page in PAGES.glob("*.md")} == {*available_defenses(), "README"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files that a first training leaves."""
    folder = tmp_path_factory.mktemp("files")
    model, run = MyLitClassifier(), trainer(max_epochs=1)
    save_file(model.state_dict(), folder / "init.safetensors")
    run.fit(model, loader(0, 64))
    run.save_checkpoint(folder / "finished.ckpt")
    return folder


@pytest.mark.parametrize("code", list(examples()))
def test_examples_run(code, files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_cwrf.defenses.registry._DEFENSES", dict(_DEFENSES))
    torch.manual_seed(0)
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    names = {
        "audit": audit,
        "model": MyLitClassifier(),
        "finished": MyLitClassifier(),
        "hardened": MyLitClassifier(),
        "MyLitClassifier": MyLitClassifier,
        "trainer": trainer(max_epochs=1),
        "train_loader": loader(0, 64),
        "test_loader": loader(64, 128),
        "reference_loader": loader(200, 260),
        "train_set": part(0, 64),
        "test_set": part(64, 128),
        "pool": part(0, 128),
        "population": part(300, 400),
        "functools": functools,
        "ShadowRecipe": ShadowRecipe,
        "train_shadows": train_shadows,
    }
    with ATTACKS.temporary():
        exec(shortened(code), names)


def shortened(code):
    """The same with one epoch and four shadow models."""
    return re.sub(r"\bn=\d+", "n=4", re.sub(r"\bmax_epochs=\d+", "max_epochs=1", code))
