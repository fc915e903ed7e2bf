"""What several files of tests start from."""

import pytest
import torch
from safetensors.torch import save_file

from lightning_cwrf import VanillaSnapshotCallback
from tests.helpers import Classifier, loader, trainer


@pytest.fixture(scope="module")
def first_files(tmp_path_factory):
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
