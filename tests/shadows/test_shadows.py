import functools
import importlib
import linecache
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from lightning_cwrf.attacks.augmentation import default_views
from lightning_cwrf.shadows import balanced_membership, train_shadows
from lightning_cwrf.shadows.identity import identity
from lightning_cwrf.shadows.train import model_seed
from tests.helpers import digits, part
from tests.recipe_functions import Counted, Memorise, Slow, quick

train = functools.partial(train_shadows, workers=1, progress=False)


@given(st.integers(1, 8), st.integers(2, 50), st.integers(0, 99))
def test_membership_is_balanced(pairs, examples, seed):
    membership = balanced_membership(2 * pairs, examples, seed)
    assert (membership.sum(0) == pairs).all()
    assert ((membership.sum(1) - examples / 2).abs() <= 0.5).all()
    assert torch.equal(membership, balanced_membership(2 * pairs, examples, seed))
    more = balanced_membership(2 * pairs + 2, examples, seed)
    assert torch.equal(more[: 2 * pairs], membership)


def test_pairs_differ():
    membership = balanced_membership(6, 40)
    assert len({tuple(row.tolist()) for row in membership}) == 6


@pytest.mark.parametrize(("k", "n", "message"), [(3, 10, "even"), (0, 10, "even"), (2, 1, "at least 2 examples")])
def test_bad_sizes(k, n, message):
    with pytest.raises(ValueError, match=message):
        balanced_membership(k, n)


@dataclass(frozen=True)
class Settings:
    rate: float
    weights: torch.Tensor


def test_identity_is_of_content():
    def values():
        return [
            *(None, True, 1, 1.0, "1", b"1", Path("1"), [1], (1, 2), {"a": 1}, torch.float32, torch.device("cpu")),
            *(torch.ones(2), torch.ones(1, 2), torch.ones(2, dtype=torch.int32), np.zeros(2), np.float32(0)),
            *(quick, functools.partial(quick, seed=1), functools.partial(quick, seed=2), Settings),
            *(Settings(1.0, torch.ones(1)), Settings(1.0, torch.zeros(1)), Settings(2.0, torch.ones(1))),
        ]

    first = [identity(value) for value in values()]
    assert first == [identity(value) for value in values()]
    assert len(set(first)) == len(first)


WIDTH = 3


def reads_a_constant(members, seed):
    return [WIDTH for _ in range(2)] or helper()


def helper():
    return WIDTH


@dataclass(frozen=True)
class ReadsToo:
    def __call__(self, members, seed):
        return helper()


@pytest.mark.parametrize("recipe", [reads_a_constant, ReadsToo(), functools.partial(reads_a_constant, seed=1)])
def test_identity_sees_the_constants_that_a_recipe_reads(monkeypatch, recipe):
    before = identity(recipe)
    assert identity(recipe) == before
    monkeypatch.setitem(globals(), "WIDTH", 4)
    assert identity(recipe) != before


def test_identity_refuses_what_it_cannot_see():
    rate = 0.3
    with pytest.raises(TypeError, match=r"closure over \('rate',\)"):
        identity(lambda members, seed: rate)
    with pytest.raises(TypeError, match="lambda has no name"):
        identity(lambda members, seed: None)
    with pytest.raises(TypeError, match="content of an object"):
        identity({"a": object()})


def test_signals_are_those_of_the_trained_models(tmp_path):
    shadows = train(quick, part(0, 40), 2, population=part(60, 70), store=tmp_path, keep_weights=True)
    assert shadows.logits.shape == (2, 40, 10)
    assert shadows.population_logits.shape == (2, 10, 10)
    assert shadows.targets.tolist() == digits().tensors[1][:40].tolist()
    from tests.helpers import Classifier

    for i in range(2):
        model = Classifier().eval()
        model.load_state_dict(shadows.weights(i))
        with torch.no_grad():
            torch.testing.assert_close(model(digits().tensors[0][:40]), shadows.logits[i])
            torch.testing.assert_close(model(digits().tensors[0][60:70]), shadows.population_logits[i])
    assert not torch.equal(shadows.logits[0], shadows.logits[1])


def test_the_callers_rng_is_kept_and_does_not_matter(tmp_path):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = train(quick, part(0, 20), 2, store=tmp_path / "a")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    torch.manual_seed(123)
    np.random.seed(5)
    random.seed(6)
    second = train(quick, part(0, 20), 2, store=tmp_path / "b")
    assert torch.equal(first.logits, second.logits)


def test_two_workers_give_what_one_gives(tmp_path):
    one = train(quick, part(0, 20), 4, store=tmp_path / "a")
    two = train_shadows(quick, part(0, 20), 4, store=tmp_path / "b", workers=2, progress=False)
    torch.testing.assert_close(one.logits, two.logits)
    assert one.store.key == two.store.key


def runs(log):
    return log.read_text().splitlines() if log.exists() else []


def test_nothing_is_trained_twice_and_more_models_add_to_the_first(tmp_path):
    recipe = Counted(tmp_path / "log")
    first = train(recipe, part(0, 20), 2, store=tmp_path)
    again = train(recipe, part(0, 20), 4, store=tmp_path)
    assert torch.equal(again.logits[:2], first.logits)
    assert runs(recipe.log) == [str(model_seed(0, i)) for i in range(4)]
    assert len(set(runs(recipe.log))) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {**c, "pool": part(1, 21)},
        lambda c: {**c, "pool": Subset(digits(), list(range(19, -1, -1)))},
        lambda c: {**c, "pool": TensorDataset(digits().tensors[0][:20], digits().tensors[1][:20].roll(1))},
        lambda c: {**c, "recipe": Counted(c["recipe"].log, fail_at=99)},
        lambda c: {**c, "seed": 1},
        lambda c: {**c, "population": part(70, 80)},
    ],
)
def test_other_data_recipe_or_seed_is_another_key(tmp_path, change):
    """Signals are matched by content, never by their number: all these have 20 rows."""
    case = {"recipe": Counted(tmp_path / "log"), "pool": part(0, 20), "population": part(60, 70), "seed": 0}
    first = train(**case, n=2, store=tmp_path)
    other = train(**change(case), n=2, store=tmp_path)
    assert first.store.key != other.store.key
    assert len(runs(case["recipe"].log)) == 4


def test_a_failing_model_stops_no_other_and_is_named(tmp_path):
    recipe = Counted(tmp_path / "log", fail_at=3)
    with pytest.raises(RuntimeError, match=r"1 of 4 shadow models failed(.|\n)*shadow model 2 (.|\n)*the third one"):
        train(recipe, part(0, 20), 4, store=tmp_path)
    train(recipe, part(0, 20), 4, store=tmp_path)
    assert len(runs(recipe.log)) == 5


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


def test_start_goes_on_from_the_base_models(tmp_path):
    base_log, log = Counted(tmp_path / "base"), Counted(tmp_path / "log")
    pool = part(0, 20)
    base = train(base_log, pool, 4, store=tmp_path, keep_weights=True)
    tuned = train(log, pool, 4, store=tmp_path, base=base)
    assert torch.equal(tuned.membership, base.membership)
    assert runs(log.log) == runs(base_log.log)  # the same seeds
    assert not torch.equal(tuned.logits, base.logits)
    train(log, pool, 4, store=tmp_path, base=base)
    assert len(runs(log.log)) == 4
    with pytest.raises(ValueError, match="another pool"):
        train(log, part(1, 21), 4, store=tmp_path, base=base)
    with pytest.raises(ValueError, match="too few models or another seed"):
        train(log, pool, 6, store=tmp_path, base=base)
    with pytest.raises(ValueError, match="another seed"):
        train(log, pool, 4, store=tmp_path, base=base, seed=3)
    light = train(quick, pool, 2, store=tmp_path)
    with pytest.raises(FileNotFoundError, match="keep_weights=True"):
        train(log, pool, 2, store=tmp_path, base=light)


def test_damaged_and_foreign_files_are_named(tmp_path):
    shadows = train(quick, part(0, 20), 2, store=tmp_path)
    path = shadows.store.folder / "model-0001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    with pytest.raises(ValueError, match=r"model-0001.safetensors is damaged .* delete it"):
        train(quick, part(0, 20), 2, store=tmp_path)
    other = train(quick, part(20, 40), 2, store=tmp_path)
    path.write_bytes((other.store.folder / "model-0001.safetensors").read_bytes())
    with pytest.raises(ValueError, match="belongs to another run"):
        train(quick, part(0, 20), 2, store=tmp_path)


class Jittered(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.rand(1, 8, 8), 0


def test_bad_pools(tmp_path):
    with pytest.raises(ValueError, match="reads differently each time"):
        train(quick, Jittered(), 2, store=tmp_path)
    with pytest.raises(ValueError, match="2 of the 12 examples of the population are in the pool"):
        train(quick, part(0, 20), 2, population=part(18, 30), store=tmp_path)
    with pytest.raises(ValueError, match="the pool is empty"):
        train(quick, part(0, 0), 2, store=tmp_path)
    with pytest.raises(ValueError, match="even"):
        train(quick, part(0, 20), 3, store=tmp_path)
    with pytest.raises(RuntimeError, match="must return the trained module"):
        train(nothing, part(0, 20), 2, store=tmp_path)


def nothing(members, seed):
    return None


def test_identity_sees_the_users_other_modules(tmp_path, monkeypatch):
    """The network in one file, its base class in another, the recipe in a third."""
    monkeypatch.syspath_prepend(tmp_path)
    files = {
        "cwrf_base": "class Base:\n    momentum = 0.9\n    def f(self): return 1\n",
        "cwrf_net": "import cwrf_base\nfrom cwrf_base import Base\nclass Net(Base):\n    pass\ndef width(): return 3\n",
        "cwrf_recipe": "import cwrf_net\nfrom cwrf_net import Net\ndef recipe(m, s): return Net(), cwrf_net.width()\n",
    }
    seen = []
    for change in (None, ("cwrf_base", "0.9", "0.8"), ("cwrf_net", "return 3", "return 4")):
        if change is not None:
            files[change[0]] = files[change[0]].replace(change[1], change[2])
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        linecache.clearcache()
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        seen.append(identity(importlib.import_module("cwrf_recipe").recipe))
    assert len(set(seen)) == 3


def test_recipes_are_told_apart_by_their_arguments():
    assert identity(Memorise(3)) != identity(Memorise(4))


def test_a_relative_store_is_where_the_run_began(tmp_path, monkeypatch):
    """Worker processes outlive a run; the next one may begin in another folder."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        signals = train_shadows(quick, part(0, 20), 2, store="store", workers=2, progress=False)
        assert signals.store.outputs_path(1).is_relative_to(tmp_path / name)


def test_a_killed_worker_loses_nothing(tmp_path):
    """One of two worker processes is killed in mid-run: what it held is trained again, nothing else is."""
    (tmp_path / "kill once").write_text("3")
    recipe = Counted(tmp_path / "log")
    with pytest.warns(UserWarning, match="a worker process was killed; . trainings are tried again"):
        signals = train_shadows(recipe, part(0, 20), 6, store=tmp_path, workers=2, progress=False)
    assert signals.logits.shape[0] == 6
    again = runs(recipe.log)
    assert set(again) == {str(model_seed(0, i)) for i in range(6)}
    assert len(again) <= 6 + 2  # the two in flight
    torch.testing.assert_close(
        signals.logits, train(Counted(tmp_path / "log"), part(0, 20), 6, store=tmp_path / "x").logits
    )


def test_a_full_disk_is_named_and_leaves_a_usable_store(tmp_path):
    """Files may not grow beyond a few kilobytes in the first run."""
    script = (
        "import resource, signal; from tests.recipe_functions import quick; from tests.helpers import part;"
        "from lightning_cwrf.shadows import train_shadows;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (512, -1));"
        f"train_shadows(quick, part(0, 20), 2, store={str(tmp_path)!r}, workers=1, progress=False)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1
    assert "2 of 2 shadow models failed" in done.stderr
    assert "File too large" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(train(quick, part(0, 20), 2, store=tmp_path)) == 2


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


def test_float16_signals_and_views(tmp_path):
    views = default_views()
    settings = {"population": part(60, 70), "views": views}
    full = train(quick, part(0, 40), 2, **settings, store=tmp_path)
    half = train(quick, part(0, 40), 2, **settings, store=tmp_path, dtype=torch.float16)
    assert full.store.key != half.store.key
    assert full.view_logits.shape == (2, len(views), 40, 10)
    torch.testing.assert_close(full.view_logits[:, 0], full.logits)  # the first view is the image itself
    for name in ("logits", "population_logits", "view_logits"):
        kept = getattr(half, name)
        assert kept.dtype == torch.float16
        torch.testing.assert_close(kept.float(), getattr(full, name), rtol=1e-3, atol=1e-3)
    sizes = [s.store.outputs_path(0).stat().st_size for s in (half, full)]
    assert sizes[0] < 0.6 * sizes[1]
    assert len({s.store.key for s in (full, train(quick, part(0, 40), 2, views=views[:2], store=tmp_path))}) == 2
    with pytest.raises(ValueError, match="float32 or float16, not"):
        train(quick, part(0, 40), 2, store=tmp_path, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"logits are not all finite as torch\.float16"):
        train(huge, part(0, 40), 2, store=tmp_path, dtype=torch.float16)


def huge(members, seed):
    model = quick(members, seed)
    for p in model.parameters():
        p.data *= 1e4
    return model
