"""Checkpoints of a training that sharded the weights, audited on one device as the guide says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_cwrf.auditing import audit
from lightning_cwrf.weights import weights_digest
from lightning_cwrf.weights.reading import read_finished
from tests.auditing.fsdp_script import Sharded
from tests.helpers import part

ROOT = Path(__file__).parents[2]


def run(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "distributed"])
def test_a_checkpoint_of_sharded_weights_is_audited_on_one_device(kind, tmp_path):
    run(Path(__file__).with_name("fsdp_script.py"), tmp_path, kind)
    checkpoint = tmp_path / "model.ckpt"
    assert checkpoint.is_dir() is (kind == "distributed")
    if kind == "distributed":
        dcp_to_torch_save(checkpoint, tmp_path / "whole.pt")
        model = Sharded()
        model.load_state_dict(read_finished(tmp_path / "whole.pt", unpickle=True)[1])
    else:
        model = Sharded.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=False)
    whole = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(p, whole[name]) for name, p in model.named_parameters())
    found = audit(model, members=part(0, 64), nonmembers=part(100, 164), attacks=["loss"])
    assert found.weights == weights_digest(model) != ""
    assert 0.5 < found.estimates["loss"]["auroc"].value < 1
