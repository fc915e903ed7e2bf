"""Shadow models on real local clusters; the user chooses one by joblib's own ``parallel_config``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import joblib
import pytest

from lightning_cwrf.shadows import train_shadows
from lightning_cwrf.shadows.train import model_seed
from lightning_cwrf.shadows.workers import Share, visible_gpus
from tests.helpers import part
from tests.recipe_functions import Counted, quick


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_cluster_loses_a_worker_and_nothing_else(tmp_path, backend):
    pytest.importorskip({"ray": "ray", "dask": "dask.distributed"}[backend])
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    environment["DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT"] = "3s"  # what it waits for a dead worker
    script = Path(__file__).with_name("cluster_script.py")
    done = subprocess.run(
        [sys.executable, str(script), backend, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(said["runs"]) == {str(model_seed(0, i)) for i in range(6)}
    assert len(said["runs"]) <= 6 + 2  # the two in flight
    alone = train_shadows(Counted(tmp_path / "log"), part(0, 20), 6, store=tmp_path / "x", workers=1, progress=False)
    assert said["sum"] == pytest.approx(alone.logits.double().sum().item())


def test_threads_of_one_process_train_one_after_another(tmp_path):
    """They share the random state: with two at once, neither would be a function of its seed."""
    with joblib.parallel_config("threading", n_jobs=2):
        threads = train_shadows(quick, part(0, 20), 4, store=tmp_path / "a", progress=False)
    alone = train_shadows(quick, part(0, 20), 4, store=tmp_path / "b", workers=1, progress=False)
    assert threads.logits.allclose(alone.logits, atol=1e-5)


def test_gpus_are_divided(monkeypatch):
    share = Share(threads=1, gpus=("2", "5"))
    assert [share.gpu_of(f"LokyProcess-{i}") for i in range(1, 5)] == ["2", "5", "2", "5"]
    assert share.gpu_of("MainProcess") == "2"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert visible_gpus() == ("4", "7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()


@pytest.mark.slow
def test_cores_are_divided(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    signals = train_shadows(threads_seen, part(0, 20), 2, store=tmp_path, workers=2, keep_weights=True, progress=False)
    assert [signals.weights(i)["threads"].item() for i in range(2)] == [3, 3]


def threads_seen(members, seed):
    import torch

    from tests.helpers import Classifier

    model = Classifier()
    model.register_buffer("threads", torch.tensor(torch.get_num_threads()))
    return model
