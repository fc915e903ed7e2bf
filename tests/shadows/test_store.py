"""The files of shadow models are checked before they are used."""

import functools
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_cwrf.shadows import train_shadows
from tests import recipe_functions
from tests.helpers import part
from tests.recipe_functions import quick

train = functools.partial(train_shadows, workers=1, progress=False)


def flip(path, back=5):
    """Flip one bit of the content, as a disk may."""
    content = bytearray(path.read_bytes())
    content[-back] ^= 64
    path.write_bytes(content)


def no_training(members, seed):
    pytest.fail("it trained")


untrained = functools.partial(recipe_functions.setting, "untrained")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return train(untrained, part(0, 20), 4, store=tmp_path_factory.mktemp("once"), keep_weights=True)


@pytest.fixture
def stored(once, tmp_path):
    shutil.copytree(once.store.root, tmp_path, dirs_exist_ok=True)
    return replace(once, store=replace(once.store, root=tmp_path))


def with_base(members, seed, base):
    pytest.fail("it trained")


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
def test_a_changed_file_raises(stored, tmp_path, name, harm, message):
    """In outputs, before anything is trained; in weights, before anything is fine-tuned."""

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


def test_weights_of_another_recipe_raise(stored, tmp_path):
    other = train(quick, part(0, 20), 4, store=tmp_path, keep_weights=True)
    stored.store.weights_path(1).write_bytes(other.store.weights_path(1).read_bytes())
    with pytest.raises(ValueError, match="belongs to another run"):
        stored.weights(1)


def test_outputs_of_another_shape_raise(stored, tmp_path):
    stored.store.save(1, {"logits": torch.zeros(3, 10)})
    with pytest.raises(ValueError, match=r"model-0001.*\(3, 10\).*\(20, 10\)"):
        train(untrained, part(0, 20), 4, store=tmp_path)


def test_every_file_names_its_run_and_model(stored):
    for path in (stored.store.outputs_path(2), stored.store.weights_path(2)):
        with safe_open(path, "pt") as file:
            said = file.metadata()
        assert (said["key"], said["model"]) == (stored.store.key, "2")
        assert said["digest"]


def test_a_read_only_store_raises_before_training(tmp_path, monkeypatch):
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


def test_damaged_and_foreign_files_raise(tmp_path):
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


@pytest.mark.slow
def test_a_relative_store_is_relative_to_the_call(tmp_path, monkeypatch):
    """Worker processes outlive a run; the next one may begin in another folder."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        signals = train_shadows(quick, part(0, 20), 2, store="store", workers=2, progress=False)
        assert signals.store.outputs_path(1).is_relative_to(tmp_path / name)


@pytest.mark.slow
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
