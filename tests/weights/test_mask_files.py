"""Masks in files and checkpoints."""

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis.extra import numpy as npst

from lightning_cwrf.files import load_tensors, save_tensors
from lightning_cwrf.weights.masks import WeightMask
from tests.weights.helpers import frozen_case, random_case


def test_save_load_keeps_masks_and_values(tmp_path):
    model, vanilla, mask = random_case()
    bare = WeightMask.load(mask.save(tmp_path / "bare.safetensors"))
    assert not bare.is_frozen
    with pytest.raises(RuntimeError, match="holds no values"):
        bare.restore_(model)
    mask.rewind_(model, vanilla)
    again = WeightMask.load(mask.save(tmp_path / "mask.safetensors"))
    assert all(torch.equal(again.masks[n], mask.masks[n]) for n in mask.masks)
    with torch.no_grad():
        model[0].weight.zero_()
    again.restore_(model)
    assert again.moved(model) == mask.moved(model) == {}


def test_files_that_are_no_masks(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a weight mask"):
        WeightMask.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        WeightMask.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(evil=torch.ones(1)), "unknown entry 'evil'"),
        (lambda t: t.update({"masks/": torch.ones(1).bool()}), "unknown entry 'masks/'"),
        (lambda t: t.update({"other/0.bias": torch.ones(1).bool()}), "unknown entry 'other/0.bias'"),
        (lambda t: t.update({"values/0.bias": torch.ones(2)}), r"2 values for the \d masked weights of '0.bias'"),
        (lambda t: t.pop("masks/0.bias"), "has values for '0.bias', and no mask"),
        (lambda t: t.pop("values/0.bias"), "it lacks the values for '0.bias'"),
        (lambda t: t.update({"masks/0.bias": torch.ones(8)}), "the mask of '0.bias' must be a bool tensor"),
    ],
)
def test_mask_files_with_other_content_are_refused(tmp_path, change, message):
    path = frozen_case()[2].save(tmp_path / "mask.safetensors")
    tensors = dict(load_tensors(path).tensors)
    change(tensors)
    save_tensors(tensors, path, "lightning_cwrf.WeightMask/1")
    with pytest.raises(ValueError, match=message) as error:
        WeightMask.load(path)
    assert str(path) in str(error.value)


def test_damaged_mask_files_are_found_and_early_ones_without_a_digest_are_read(tmp_path):
    mask = frozen_case()[2]
    path = mask.save(tmp_path / "mask.safetensors")
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            WeightMask.load(path)
    path.write_bytes(whole)
    tensors = load_tensors(path).tensors
    safetensors.torch.save_file(tensors, path, metadata={"format": "lightning_cwrf.WeightMask/1"})
    again = WeightMask.load(path)
    assert again.is_frozen
    assert all(torch.equal(again.masks[n], m) for n, m in mask.masks.items())


def test_states_are_small_and_those_of_early_versions_are_read():
    model, _, mask = frozen_case()
    state = mask.state_dict()
    stored = sum(t.numel() * t.element_size() for part in state.values() for t in part.values())
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert all(isinstance(t, torch.Tensor) for part in state.values() for t in part.values())
    assert stored < weights * (0.3 + 1 / 32) + 200  # the values, a bit per weight, and the shapes
    early = {"masks": mask.masks, "values": state["values"]}
    for other in (WeightMask.from_state_dict(state), WeightMask.from_state_dict(early)):
        assert all(torch.equal(other.masks[n], m) for n, m in mask.masks.items())
        assert other.moved(model) == {}
        with torch.no_grad():
            model[0].weight.add_(1)
        assert other.moved(model) == {"0.weight": int(mask.masks["0.weight"].sum())}
        other.restore_(model)
        assert mask.moved(model) == {}


@given(npst.arrays(np.bool_, npst.array_shapes(min_dims=0, max_dims=3, max_side=9)))
def test_bits_are_packed_and_unpacked(array):
    mask = WeightMask({"w": torch.from_numpy(np.asarray(array))})
    again = WeightMask.from_state_dict(mask.state_dict())
    assert torch.equal(again.masks["w"], mask.masks["w"])
    assert not again._frozen
