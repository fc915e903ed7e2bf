"""Saving the vanilla weights in the first training."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cwrf import (
    VanillaSnapshotCallback,
)
from tests.callbacks.helpers import cwrf, finished
from tests.helpers import Classifier, loader, trainer


def test_snapshot_is_taken_before_the_first_step_and_never_on_resume(tmp_path):
    torch.manual_seed(0)
    model = Classifier()
    initial = {n: t.clone() for n, t in model.state_dict().items()}
    path = tmp_path / "deep" / "init.safetensors"
    run = trainer(tmp_path, callbacks=[VanillaSnapshotCallback(path)])
    run.fit(model, loader(0, 64))
    run.save_checkpoint(tmp_path / "last.ckpt")
    from safetensors.torch import load_file

    assert all(torch.equal(load_file(path)[n], initial[n]) for n in initial)
    stamp = path.stat().st_mtime_ns
    again = trainer(tmp_path, callbacks=[VanillaSnapshotCallback(path)], max_epochs=3)
    again.fit(Classifier(), loader(0, 64), ckpt_path=tmp_path / "last.ckpt")
    assert path.stat().st_mtime_ns == stamp
    with pytest.raises(MisconfigurationException, match="vanilla weights of another run"):
        trainer(callbacks=[VanillaSnapshotCallback(path)]).fit(Classifier(), loader(0, 64))
    late = trainer(tmp_path, callbacks=[VanillaSnapshotCallback(tmp_path / "other.safetensors")], max_epochs=3)
    with pytest.raises(MisconfigurationException, match="initial weights are lost"):
        late.fit(Classifier(), loader(0, 64), ckpt_path=tmp_path / "last.ckpt")


def test_a_snapshot_under_any_name_is_read_again_and_a_damaged_one_is_not_overwritten(tmp_path):
    for name in ("init.pt", "init", "init.ckpt"):
        torch.manual_seed(0)
        trainer(callbacks=[VanillaSnapshotCallback(tmp_path / name)], max_epochs=1).fit(Classifier(), loader(0, 32))
        callbacks = cwrf(tmp_path / name)
        trainer(callbacks=callbacks, max_epochs=1).fit(finished()[0], loader(0, 32))
        assert callbacks[1].mask.count
    (tmp_path / "init").write_bytes(b"not weights")
    with pytest.raises(MisconfigurationException, match=r"is no file of vanilla weights.*Pass overwrite=True"):
        trainer(callbacks=[VanillaSnapshotCallback(tmp_path / "init")]).fit(Classifier(), loader(0, 32))
    trainer(callbacks=[VanillaSnapshotCallback(tmp_path / "init", overwrite=True)], max_epochs=1).fit(
        Classifier(), loader(0, 32)
    )
