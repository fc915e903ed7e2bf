"""Every example of the pages on defenses runs as it stands, with the names that the pages assume."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lightning_cwrf.defenses import available_defenses
from lightning_cwrf.defenses.registry import _DEFENSES
from tests.helpers import Classifier, loader, trainer

PAGES = Path(__file__).parents[1] / "docs" / "defenses"


class MyLitClassifier(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def examples():
    for page in sorted(PAGES.glob("*.md")):
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)):
            yield pytest.param(code, id=f"{page.stem}-{i}")


def test_every_defense_has_a_page():
    assert {page.stem for page in PAGES.glob("*.md")} == {*available_defenses(), "README"}


@pytest.mark.parametrize("code", list(examples()))
def test_examples_run(code, monkeypatch):
    monkeypatch.setattr("lightning_cwrf.defenses.registry._DEFENSES", dict(_DEFENSES))
    torch.manual_seed(0)
    names = {
        "model": MyLitClassifier(),
        "MyLitClassifier": MyLitClassifier,
        "trainer": trainer(max_epochs=1),
        "train_loader": loader(0, 64),
        "reference_loader": loader(200, 260),
    }
    exec(code, names)
