"""What train_shadows refuses before it trains, and what its store refuses to read."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, TensorDataset

from lightning_cwrf.shadows import balanced_membership, train_shadows
from lightning_cwrf.shadows.jobs import OTHER_CODE
from lightning_cwrf.shadows.workers import Share
from tests import recipe_functions
from tests.helpers import digits, part
from tests.recipe_functions import quick

train = functools.partial(train_shadows, workers=1, progress=False)
ROOT = Path(__file__).parents[2]


def no_training(members, seed):
    pytest.fail("it trained")


def flip(path, back=5):
    """One bit of the content, as a disk may."""
    content = bytearray(path.read_bytes())
    content[-back] ^= 64
    path.write_bytes(content)


untrained = functools.partial(recipe_functions.setting, "untrained")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return train(untrained, part(0, 20), 4, store=tmp_path_factory.mktemp("once"), keep_weights=True)


@pytest.fixture
def stored(once, tmp_path):
    shutil.copytree(once.store.root, tmp_path, dirs_exist_ok=True)
    return replace(once, store=replace(once.store, root=tmp_path))


@pytest.mark.parametrize("name", ["outputs_path", "weights_path"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path, store: flip(path), "model-0001.*damaged.*delete it"),
        (lambda path, store: flip(path, path.stat().st_size - 30), "model-0001.*delete it"),
        (lambda path, store: path.write_bytes(path.read_bytes()[:-8]), "model-0001.*(damaged|truncated).*delete it"),
        (lambda path, store: path.write_bytes(b""), "model-0001.*(damaged|truncated).*delete it"),
        (lambda path, store: path.write_bytes(getattr(store, path.harm)(2).read_bytes()), "shadow model 2, not 1"),
        (lambda path, store: save_file(load_file(path), path), "(belongs to another run|tensors of another program)"),
        (lambda path, store: save_file(load_file(path), path, {"key": store.key, "model": "1"}), "is no"),
    ],
)  # fmt: skip
def test_a_changed_file_is_refused(stored, tmp_path, name, harm, message):
    """In signals, before anything is trained; in weights, before anything goes on from them."""

    class Named(type(Path())):
        harm = name

    harm(Named(getattr(stored.store, name)(1)), stored.store)
    with pytest.raises(ValueError, match=message):
        if name == "outputs_path":
            train(untrained, part(0, 20), 4, store=tmp_path, keep_weights=True)
        else:
            train(with_base, part(0, 20), 4, store=tmp_path, base=stored)
    if name == "weights_path":
        with pytest.raises(ValueError, match=message):
            stored.weights(1)


def test_files_of_two_models_exchanged(stored, tmp_path):
    first, second = stored.store.outputs_path(0), stored.store.outputs_path(1)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(ValueError, match="holds shadow model 1, not 0"):
        train(untrained, part(0, 20), 4, store=tmp_path)


def test_the_weights_of_another_recipe_are_foreign(stored, tmp_path):
    other = train(quick, part(0, 20), 4, store=tmp_path, keep_weights=True)
    stored.store.weights_path(1).write_bytes(other.store.weights_path(1).read_bytes())
    with pytest.raises(ValueError, match="belongs to another run"):
        stored.weights(1)


def test_signals_of_another_shape_are_refused(stored, tmp_path):
    stored.store.save(1, {"logits": torch.zeros(3, 10)})
    with pytest.raises(ValueError, match=r"model-0001.*\(3, 10\).*\(20, 10\)"):
        train(untrained, part(0, 20), 4, store=tmp_path)


def test_every_file_says_whose_it_is(stored):
    for path in (stored.store.outputs_path(2), stored.store.weights_path(2)):
        with safe_open(path, "pt") as file:
            said = file.metadata()
        assert (said["key"], said["model"]) == (stored.store.key, "2")
        assert said["digest"]


def test_a_store_that_cannot_be_written_is_known_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for store in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ValueError, match=r"the store .*file.* cannot be written: .*Pass store="):
            train(no_training, part(0, 20), 2, store=store)

    def read_only(self, data):
        raise PermissionError(13, "Permission denied", str(self))

    whole = train(quick, part(0, 20), 2, store=tmp_path / "whole")
    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(ValueError, match=r"cannot be written: .*Permission denied"):
        train(no_training, part(0, 20), 2, store=tmp_path / "new")
    assert torch.equal(train(quick, part(0, 20), 2, store=tmp_path / "whole").logits, whole.logits)  # nothing to write
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.part"))


class Labels(Dataset):
    """Inputs that read alike, and labels that are drawn anew in the second batch."""

    def __len__(self):
        return 300

    def __getitem__(self, i):
        return torch.full((1, 8, 8), float(i)), i % 10 if i < 256 else int(torch.randint(10, ()))


class Fickle(Dataset):
    """Reads alike for a while."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 8

    def __getitem__(self, i):
        self.reads += 1
        return torch.full((1, 8, 8), float(i + (self.reads > 20))), 0


class Stream(IterableDataset):
    def __iter__(self):
        return iter(part(0, 20))


def triples():
    return TensorDataset(*digits()[:20], torch.ones(20))


def with_base(members, seed, base):
    pytest.fail("it trained")


PAIRS = [digits()[i] for i in range(20)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pool": Labels()}, ValueError, "the pool reads differently each time, in its labels|differently each time"),
        ({"pool": Stream()}, TypeError, "the pool must be a torch data set .* not a Stream"),
        ({"pool": PAIRS}, TypeError, "the pool must be a torch data set .* not a list"),
        ({"pool": iter(PAIRS)}, TypeError, "the pool must be a torch data set"),
        ({"pool": triples()}, TypeError, "the pool must give pairs"),
        ({"pool": TensorDataset(torch.rand(20, 4), torch.rand(20))}, ValueError, "labels of the pool must be"),
        ({"pool": TensorDataset(torch.rand(20, 4), torch.arange(20) - 1)}, ValueError, "some of them negative"),
        ({"pool": part(0, 0)}, ValueError, "the pool is empty"),
        ({"population": Stream()}, TypeError, "the population must be a torch data set"),
        ({"n": 2.0}, TypeError, "number of shadow models must be an integer"),
        ({"n": "2"}, TypeError, "number of shadow models must be an integer"),
        ({"n": -2}, ValueError, "even and at least 2"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0"),
        ({"seed": 1.0}, TypeError, "seed must be an integer"),
        ({"seed": None}, TypeError, "seed must be an integer, not None"),
        ({"stack": 1.5}, TypeError, "stack must be an integer"),
        ({"stack": True}, TypeError, "stack must be an integer"),
        ({"stack": 0}, ValueError, "stack must be an integer of at least 1"),
        ({"workers": "2"}, TypeError, "workers must be an integer, not the str '2'"),
        ({"workers": 1.0}, TypeError, "workers must be an integer"),
        ({"workers": 0}, ValueError, "workers must not be 0"),
        ({"store": None}, TypeError, "store must be the path of a folder, not None"),
        ({"store": 3}, TypeError, "store must be the path of a folder"),
        ({"keep_weights": "yes"}, TypeError, "keep_weights must be True or False"),
        ({"progress": 1}, TypeError, "progress must be True or False"),
        ({"dtype": "float16"}, ValueError, "float32 or float16, not float16"),
        ({"views": torch.flip}, TypeError, "views must be a list of functions"),
        ({"views": [1]}, TypeError, "views must be a list of functions"),
        ({"version": 3}, TypeError, "version must be a text"),
        ({"version": ""}, TypeError, "version must be a text"),
        ({"recipe": with_base}, TypeError, r"called as recipe\(members, seed\)(.|\n)*pass them as base="),
        ({"base": True}, TypeError, r"called as recipe\(members, seed, base\)(.|\n)*leave base out"),
        ({"recipe": lambda: None}, TypeError, r"called as recipe\(members, seed\)"),
        ({"recipe": lambda members, seed: None}, TypeError, "a lambda has no name"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_any_training(tmp_path, arguments, error, message):
    if arguments.get("base") is True:
        arguments = {"base": train(quick, part(0, 20), 2, store=tmp_path, keep_weights=True)}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        train(**{"recipe": no_training, "pool": part(0, 20), "n": 2, "store": tmp_path, **arguments})
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [(2.0, 4), (2, 4.0), ("2", 4), (2, 4, -1), (2, 4, 1.5)])
def test_membership_wants_whole_numbers(arguments):
    with pytest.raises((TypeError, ValueError), match="must be an integer"):
        balanced_membership(*arguments)


def test_a_pool_that_changes_later_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="the pool gave other examples after this training than before"):
        train(quick, Fickle(), 2, store=tmp_path)


def test_copies_of_an_example_are_in_or_out_together(tmp_path):
    pool = ConcatDataset([part(0, 20), part(5, 10), part(5, 6)])
    with pytest.warns(UserWarning, match="6 of the 26 examples of the pool are copies of others"):
        signals = train(untrained, pool, 4, store=tmp_path)
    assert torch.equal(signals.membership[:, 5:10], signals.membership[:, 20:25])
    assert torch.equal(signals.membership[:, 5], signals.membership[:, 25])
    assert (signals.membership.sum(0) == 2).all()
    assert torch.equal(signals.membership[:, :20], balanced_membership(4, 20, 0))


def test_a_version_is_part_of_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_functions, "LOCK", __import__("threading").Lock(), raising=False)
    recipe = functools.partial(recipe_functions.setting, "LOCK")
    keys = [train(recipe, part(0, 20), 2, store=tmp_path, version=v).store.key for v in ("1", "2", "1", None)]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3


def test_workers_begin_anew_with_a_changed_environment(tmp_path, monkeypatch):
    """They are used again, and keep the environment that they began with."""
    arguments = {"workers": 2, "progress": False, "keep_weights": True}
    for width in ("3", "5"):
        monkeypatch.setenv("CWRF_TEST_WIDTH", width)
        signals = train_shadows(recipe_functions.reads_environment, part(0, 20), 2, store=tmp_path, **arguments)
        assert all(signals.weights(i)["net.0.weight"].shape[0] == int(width) for i in range(2))


def test_workers_do_not_train_what_the_key_does_not_say(tmp_path, monkeypatch):
    """A worker imports the recipe's module by itself, so a setting that was changed at run time is not there."""
    monkeypatch.setattr(Share, "take", lambda self: None)
    ended, tried = [], []

    def in_a_worker(work, items, workers, **_):
        tried.append(len(items))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(recipe_functions.SETTINGS, "width", 4)  # as its module says
            return [work(item, Share()) for item in items], []

    monkeypatch.setattr("lightning_cwrf.shadows.dispatch.run", in_a_worker)
    monkeypatch.setattr("lightning_cwrf.shadows.dispatch.end_workers", lambda: ended.append(1))
    assert len(train(recipe_functions.reads_width, part(0, 20), 2, store=tmp_path)) == 2
    monkeypatch.setitem(recipe_functions.SETTINGS, "width", 7)
    with pytest.raises(RuntimeError) as error:
        train(recipe_functions.reads_width, part(0, 20), 2, store=tmp_path)
    assert OTHER_CODE in str(error.value)
    assert (ended, tried) == ([1], [2, 2, 2])  # they began anew once
    train(recipe_functions.reads_width, part(0, 20), 2, store=tmp_path, version="the width does not matter")


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
