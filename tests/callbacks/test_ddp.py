import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_cwrf.auditing import attack_metrics
from lightning_cwrf.metrics import LossGap

pytestmark = pytest.mark.slow


def test_two_processes_agree_on_the_mask_and_hold_it(tmp_path):
    root = Path(__file__).parents[2]
    script = Path(__file__).with_name("ddp_script.py")
    environment = {**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_CURRENT_TEST", None)  # Lightning launches other processes differently under a test runner
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"rank{i}.safetensors") for i in range(2)]
    vanilla = load_file(tmp_path / "vanilla.safetensors")
    # An audit is of each process's own outputs: BatchNorm's running statistics are not shared.
    for name in (n for n in ranks[0] if n.split("/")[0] not in ("audit", "measured")):
        assert torch.equal(ranks[0][name], ranks[1][name]), name
    masks = {name.removeprefix("mask/"): m for name, m in ranks[0].items() if name.startswith("mask/")}
    assert sum(int(m.sum()) for m in masks.values()) == round(0.1 * sum(m.numel() for m in masks.values()))
    for name, mask in masks.items():
        weight = ranks[0][f"weight/{name}"]
        assert torch.equal(weight[mask], vanilla[name][mask]), name
        assert mask.all() or not torch.equal(weight[~mask], vanilla[name][~mask]), name
    assert ranks[0]["trace/losses"].shape == (3, 64)  # of both ranks' shares, the same on each, as the loop above saw
    assert ranks[0]["trace/nonmembers"].shape == (21,)
    for rank in ranks:  # a share measured with another rank's BatchNorm statistics is close to one's own
        torch.testing.assert_close(rank["trace/losses"][-1].double(), rank["audit/losses"][:64], rtol=0.2, atol=0.2)
    assert ranks[0]["audited"] == 104  # 64 members and 40 non-members, each once
    for rank in ranks:  # each audits all examples: they must not be counted once per process
        said = {n.removeprefix("measured/"): v for n, v in rank.items() if n.startswith("measured/")}
        alone = attack_metrics(float(rank["audit/accuracy"]), accuracy_examples=40)
        assert set(said) == {*alone, "loss_gap"}
        for name, metric in {**alone, "loss_gap": LossGap()}.items():
            scores = rank["audit/losses" if name == "loss_gap" else "audit/scores"]
            metric.update(scores, rank["audit/is_member"])
            expected = (float(metric.compute()), *metric.interval(), metric.p_value() or 0.0)
            assert said[name].tolist() == pytest.approx(expected, abs=1e-9), name


def test_gradients_cleared_as_they_are_accumulated_are_reduced_like_others(tmp_path):
    root = Path(__file__).parents[2]
    script = Path(__file__).with_name("ddp_gradients_script.py")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_audit_of_a_fit_in_spawned_processes_reaches_the_caller_as_a_file(tmp_path):
    root = Path(__file__).parents[2]
    script = Path(__file__).with_name("spawn_script.py")
    environment = {**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "members: 64" in done.stdout
