import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_cwrf.files import load_tensors, save_tensors

KIND = "lightning_cwrf.Test/1"
CONTENT = {
    "a": torch.arange(12.0).view(3, 4).t(),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0, 3),
    "one": torch.tensor(4),
    "flags": torch.tensor([True, False]),
}


def test_round_trip(tmp_path):
    tied = torch.ones(4)
    path = save_tensors({**CONTENT, "x": tied, "y": tied}, tmp_path / "new" / "file.any", KIND, {"note": "ä"})
    found = load_tensors(path, KIND)
    assert (found.kind, found.metadata) == (KIND, {"note": "ä"})
    assert set(found.tensors) == {*CONTENT, "x", "y"}
    for name, value in CONTENT.items():
        assert torch.equal(found.tensors[name], value)
        assert found.tensors[name].dtype == value.dtype
    assert [p.name for p in path.parent.iterdir()] == ["file.any"]


@given(st.data())
def test_no_flipped_bit_is_read(tmp_path_factory, data):
    path = save_tensors(CONTENT, tmp_path_factory.mktemp("flip") / "file", KIND, {"note": "text"})
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        found = load_tensors(path, KIND)
    except ValueError:
        return
    # A bit of the header's padding says nothing.
    assert all(torch.equal(found.tensors[name], value) for name, value in CONTENT.items())
    assert found.metadata == {"note": "text"}


@given(st.data())
def test_no_truncated_file_is_read(tmp_path_factory, data):
    path = save_tensors(CONTENT, tmp_path_factory.mktemp("cut") / "file", KIND)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match="is no weight mask"):
        load_tensors(path, KIND, what="weight mask")


def test_files_of_other_kinds(tmp_path):
    path = save_tensors(CONTENT, tmp_path / "mask", "lightning_cwrf.Other/1")
    with pytest.raises(ValueError, match=r"is no vanilla file: it holds lightning_cwrf.Other/1, not lightning_cwrf"):
        load_tensors(path, KIND, what="vanilla file")
    assert load_tensors(path).kind == "lightning_cwrf.Other/1"
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    assert load_tensors(tmp_path / "foreign").kind is None
    with pytest.raises(ValueError, match="tensors of another program"):
        load_tensors(tmp_path / "foreign", KIND)
    save_file({"a": torch.ones(2)}, tmp_path / "stripped", metadata={"format": KIND})
    with pytest.raises(ValueError, match="damaged"):
        load_tensors(tmp_path / "stripped", KIND)
    with pytest.raises(FileNotFoundError, match="no mask at"):
        load_tensors(tmp_path / "absent", what="mask")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = save_tensors(CONTENT, tmp_path / "file", KIND)
    before = path.read_bytes()

    def full(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("lightning_cwrf.files.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_tensors({"other": torch.ones(1)}, path, KIND)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
