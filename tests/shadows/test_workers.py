"""Worker processes: the same results, killed or interrupted, and never another recipe."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_cwrf.shadows import train_shadows
from lightning_cwrf.shadows.jobs import OTHER_CODE
from lightning_cwrf.shadows.train import model_seed
from lightning_cwrf.shadows.workers import Share
from tests import recipe_functions
from tests.helpers import part
from tests.recipe_functions import Counted, Slow, quick, runs

train = functools.partial(train_shadows, workers=1, progress=False)


@pytest.mark.slow
def test_two_workers_give_the_outputs_of_one(tmp_path):
    one = train(quick, part(0, 20), 4, store=tmp_path / "a")
    two = train_shadows(quick, part(0, 20), 4, store=tmp_path / "b", workers=2, progress=False)
    torch.testing.assert_close(one.logits, two.logits)
    assert one.store.key == two.store.key


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_model_in_flight(tmp_path):
    script = (
        "from pathlib import Path; from tests.recipe_functions import Counted; from tests.helpers import part;"
        "from lightning_cwrf.shadows import train_shadows;"
        f"d = Path({str(tmp_path)!r});"
        "train_shadows(Counted(d / 'log'), part(0, 20), 4, store=d, workers=1, progress=False)"
    )
    (tmp_path / "kill").write_text("3")
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True)
    assert killed.returncode == -9
    recipe = Counted(tmp_path / "log")
    train(recipe, part(0, 20), 4, store=tmp_path)
    seeds = [str(model_seed(0, i)) for i in range(4)]
    assert runs(recipe.log) == [*seeds[:3], *seeds[2:]]
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path):
    """One of two worker processes is killed in mid-run: what it held is trained again, nothing else is."""
    (tmp_path / "kill once").write_text("3")
    recipe = Counted(tmp_path / "log")
    with pytest.warns(UserWarning, match="a worker process was killed; . trainings are repeated"):
        signals = train_shadows(recipe, part(0, 20), 6, store=tmp_path, workers=2, progress=False)
    assert signals.logits.shape[0] == 6
    again = runs(recipe.log)
    assert set(again) == {str(model_seed(0, i)) for i in range(6)}
    assert len(again) <= 6 + 2  # the two in flight
    torch.testing.assert_close(
        signals.logits, train(Counted(tmp_path / "log"), part(0, 20), 6, store=tmp_path / "x").logits
    )


@pytest.mark.slow
def test_two_runs_on_one_store_end_with_the_same_models(tmp_path):
    script = (
        "from pathlib import Path; from tests.recipe_functions import Counted; from tests.helpers import part;"
        "from lightning_cwrf.shadows import train_shadows;"
        f"d = Path({str(tmp_path)!r});"
        "s = train_shadows(Counted(d / 'log'), part(0, 20), 4, store=d, workers=1, progress=False);"
        "print(s.logits.double().sum().item())"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0].split()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_stops_cleanly_and_the_run_resumes(tmp_path, workers):
    script = (
        "from pathlib import Path; from tests.recipe_functions import Slow; from tests.helpers import part;"
        "from lightning_cwrf.shadows import train_shadows;"
        f"d = Path({str(tmp_path)!r});"
        f"train_shadows(Slow(d / 'log'), part(0, 20), 6, store=d, workers={workers}, progress=False)"
    )
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=root,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        # Tests that a shell runs in its background inherit a SIGINT that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    recipe = Slow(tmp_path / "log")
    until = time.monotonic() + 120
    while len(runs(recipe.log)) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)  # what a terminal sends: to the workers too
    assert run.wait(timeout=60) != 0
    assert not list(tmp_path.rglob("*.part"))
    stored = len(list(tmp_path.rglob("model-*.safetensors")))
    assert 1 <= stored < 6
    before = len(runs(recipe.log))
    assert len(train(recipe, part(0, 20), 6, store=tmp_path)) == 6
    assert len(runs(recipe.log)) == before + 6 - stored


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_workers_restart_with_a_changed_environment(tmp_path, monkeypatch):
    """They are used again, and keep the environment that they began with."""
    arguments = {"workers": 2, "progress": False, "keep_weights": True}
    for width in ("3", "5"):
        monkeypatch.setenv("CWRF_TEST_WIDTH", width)
        signals = train_shadows(recipe_functions.reads_environment, part(0, 20), 2, store=tmp_path, **arguments)
        assert all(signals.weights(i)["net.0.weight"].shape[0] == int(width) for i in range(2))


def test_workers_do_not_train_another_recipe(tmp_path, monkeypatch):
    """A worker imports the recipe's module by itself, so a setting that was changed at run time is not there."""
    monkeypatch.setattr(Share, "take", lambda self: None)
    ended, tried = [], []

    def in_a_worker(work, items, workers, **_):
        tried.append(len(items))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(recipe_functions.SETTINGS, "width", 4)  # as its module says
            return [work(item, Share()) for item in items], []

    monkeypatch.setattr("lightning_cwrf.shadows.train.run", in_a_worker)
    monkeypatch.setattr("lightning_cwrf.shadows.train.end_workers", lambda: ended.append(1))
    assert len(train(recipe_functions.reads_width, part(0, 20), 2, store=tmp_path)) == 2
    monkeypatch.setitem(recipe_functions.SETTINGS, "width", 7)
    with pytest.raises(RuntimeError) as error:
        train(recipe_functions.reads_width, part(0, 20), 2, store=tmp_path)
    assert OTHER_CODE in str(error.value)
    assert (ended, tried) == ([1], [2, 2, 2])  # they began anew once
    train(recipe_functions.reads_width, part(0, 20), 2, store=tmp_path, version="the width does not matter")


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    """SIGKILL leaves the parent no time to end them; they are in the middle of a training."""
    script = (
        "from pathlib import Path; from tests.recipe_functions import Pids; from tests.helpers import part;"
        "from lightning_cwrf.shadows import train_shadows;"
        f"train_shadows(Pids(Path({str(tmp_path)!r})), part(0, 20), 4, store={str(tmp_path / 's')!r}, workers=2)"
    )
    run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(workers) == 2
    assert all(map(alive, workers))
    os.kill(run.pid, signal.SIGKILL)
    run.wait(timeout=30)
    until = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
