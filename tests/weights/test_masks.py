import math
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import nn

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, VanillaSnapshotCallback
from lightning_cwrf.files import load_tensors, save_tensors
from lightning_cwrf.weights.frozen import Frozen
from lightning_cwrf.weights.masks import WeightMask
from lightning_cwrf.weights.selection import apportion
from tests.oracles.formulas import top_by_sorting

floats = st.floats(0, width=32, allow_nan=False, allow_infinity=False)
few = st.sampled_from([0.0, 1e-45, 0.25, 0.5, 1.0, 3e38])  # many ties, a subnormal, a huge one


@given(
    st.lists(npst.arrays(np.float32, npst.array_shapes(max_dims=3, max_side=7), elements=floats | few), min_size=1),
    st.floats(0, 1),
)
def test_exactly_round_rn_and_the_largest(arrays, rate):
    scores = {f"p{i}.weight": torch.from_numpy(a) for i, a in enumerate(arrays)}
    mask = WeightMask.top(scores, rate)
    flat = torch.cat([s.flatten() for s in scores.values()]).tolist()
    chosen = torch.cat([mask.masks[n].flatten() for n in scores]).nonzero().flatten().tolist()
    assert len(chosen) == mask.count == round(rate * len(flat))
    assert set(chosen) == top_by_sorting(flat, len(chosen))
    assert all(mask.masks[n].shape == scores[n].shape for n in scores)


@given(st.lists(npst.arrays(np.float32, st.integers(1, 40), elements=few), min_size=1, max_size=6), st.floats(0, 1))
def test_per_layer_shares(arrays, rate):
    scores = {f"layer{i}.weight": torch.from_numpy(a) for i, a in enumerate(arrays)}
    mask = WeightMask.top(scores, rate, per_layer=True)
    total = sum(map(len, arrays))
    assert mask.count == round(rate * total)
    for name, score in scores.items():
        got, fair = int(mask.masks[name].sum()), round(rate * total) * len(score) / total
        assert math.floor(fair) <= got <= math.ceil(fair)
        assert set(mask.masks[name].nonzero().flatten().tolist()) == top_by_sorting(score.tolist(), got)


@pytest.mark.parametrize(
    ("sizes", "wanted", "expected"),
    [
        ([9, 8, 3], 5, [2, 2, 1]),  # 2.25, 2 and 0.75
        ([10, 7, 3], 10, [5, 4, 1]),  # 5, 3.5 and 1.5: the earlier of two equal remainders
        ([1, 2, 7], 5, [1, 1, 3]),  # 0.5, 1 and 3.5
        ([6, 6, 6], 2, [1, 1, 0]),
        ([4, 0, 4], 8, [4, 0, 4]),
        ([3, 5], 0, [0, 0]),
    ],
)
def test_shares_by_hand(sizes, wanted, expected):
    assert apportion(sizes, wanted) == expected


def test_per_layer_takes_weight_and_bias_together():
    scores = {"a.weight": torch.zeros(8), "a.bias": torch.ones(2), "b.weight": torch.ones(10)}
    mask = WeightMask.top(scores, 0.2, per_layer=True)
    assert mask.masks["a.bias"].all()
    assert mask.masks["b.weight"].sum() == 2


def test_layers_are_the_modules_that_hold_the_parameters():
    scores = {n: torch.arange(4.0) for n in ("a.b.weight", "a.c.weight", "a.b.bias", "c.weight")}
    masks = WeightMask.top(scores, 1 / 2, per_layer=True).masks
    # Four of the eight of a.b, the largest of both its parameters; two of the four of each other layer.
    assert list(masks) == list(scores)
    assert all(mask.tolist() == [False, False, True, True] for mask in masks.values())
    masks = WeightMask.top({**scores, "a.b.bias": torch.zeros(4)}, 1 / 2, per_layer=True).masks
    assert [int(mask.sum()) for mask in masks.values()] == [4, 2, 0, 2]


def test_negative_zero_is_zero_and_chunks_do_not_matter(monkeypatch):
    monkeypatch.setattr("lightning_cwrf.weights.selection._CHUNK", 3)
    score = torch.tensor([-0.0, 0.0, 5.0, -0.0, 0.0, 5.0, 1.0, 0.0])
    mask = WeightMask.top({"w": score}, 5 / 8).masks["w"]
    assert set(mask.nonzero().flatten().tolist()) == top_by_sorting(score.tolist(), 5) == {0, 1, 2, 5, 6}


@pytest.mark.parametrize(
    ("scores", "rate", "error", "message"),
    [
        ({"w": torch.ones(3)}, 1.5, ValueError, "rate must be a number in"),
        ({"w": torch.ones(3)}, float("nan"), ValueError, "rate must be a number in"),
        ({}, 0.5, ValueError, "no scores"),
        ({"w": torch.tensor([1.0, float("nan")])}, 0.5, ValueError, "'w' hold NaN"),
        ({"w": -torch.tensor([1.0, float("nan")])}, 0.5, ValueError, "negative|NaN"),
        ({"w": torch.tensor([1.0, float("inf")])}, 0.5, ValueError, "'w' hold NaN or infinite"),
        ({"w": torch.tensor([1.0, -1.0])}, 0.5, ValueError, "'w' hold negative"),
        ({"w": torch.ones(2, dtype=torch.float64)}, 0.5, TypeError, "must be float32"),
    ],
)
def test_bad_scores(scores, rate, error, message):
    with pytest.raises(error, match=message):
        WeightMask.top(scores, rate)


def random_case(layout=torch.contiguous_format):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4)).to(memory_format=layout)
    vanilla = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    scores = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    return model, vanilla, WeightMask.top(scores, 0.3)


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def algorithms(request):
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("algorithms")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rewind_is_eq_6_and_hold_is_eq_7(layout):
    model, vanilla, mask = random_case(layout)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask.rewind_(model, vanilla)
    for name, p in model.named_parameters():
        b_r = mask.masks[name].float()
        assert torch.equal(p, (1 - b_r) * before[name] + b_r * vanilla[name])
        p.grad = torch.randn_like(p)
        p.grad[mask.masks[name]] = float("nan")  # 0 · NaN is NaN: a mask by multiplication would keep it
        p.grad.flatten()[0] = float("inf")
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    mask.zero_grad_(model)
    for name, p in model.named_parameters():
        assert (p.grad[mask.masks[name]] == 0).all()
        assert torch.equal(p.grad[~mask.masks[name]], grads[name][~mask.masks[name]])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert sum(mask.moved(model).values()) == mask.count
    mask.restore_(model)
    assert mask.moved(model) == {}
    for name, p in model.named_parameters():
        m = mask.masks[name]
        assert torch.equal(p[m], vanilla[name][m])
        assert torch.equal(p[~m], before[name][~m] + 1.0)


def test_hooks_are_where_there_is_something_to_clear():
    model = nn.ModuleDict({"none": nn.Linear(2, 1), "kept": nn.Linear(2, 1), "held": nn.Linear(2, 1, bias=False)})
    model["kept"].requires_grad_(False)
    masks = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    mask = WeightMask({**masks, "none.weight": torch.zeros(1, 2).bool(), "none.bias": torch.zeros(1).bool()})
    mask.freeze(model)
    hooks = mask.clear_gradients_of(model)
    assert len(hooks) == 1
    model["held"](torch.ones(1, 2)).sum().backward()
    assert model["held"].weight.grad.tolist() == [[0, 0]]


def test_a_mask_of_nothing_holds_nothing_and_needs_no_values():
    model = nn.Linear(2, 1)
    mask = WeightMask({"weight": torch.zeros(1, 2, dtype=torch.bool)})
    assert mask.is_frozen
    mask.restore_(model)
    mask.zero_grad_(model)
    assert mask.moved(model) == {}
    assert not (~mask).is_frozen
    assert (~mask).count == 2


class Swapping(torch.optim.SGD):
    """Exchanges its copies with the weights, or does one half of it."""

    def eval(self):
        pass

    def train(self):
        pass


def test_copies_of_the_weights_in_an_optimizer_are_those_of_one_that_exchanges_them():
    for without in ((), ("train",), ("eval",)):
        model = nn.Linear(2, 2)
        mask = WeightMask({"weight": torch.eye(2).bool()})
        mask.freeze(model)
        optimizer = Swapping(model.parameters(), 0.1)
        for name in without:
            setattr(optimizer, name, None)
        copies = {name: torch.full((2, 2), 7.0) for name in ("x", "y", "z", "exp_avg")}
        optimizer.state[model.weight].update(copies, step=7.0)
        held = torch.where(torch.eye(2).bool(), model.weight.detach(), torch.tensor(7.0))
        mask.restore_(model, optimizer)
        for name, copied in copies.items():
            written = name != "exp_avg" and not without
            assert torch.equal(copied, held if written else torch.full((2, 2), 7.0))
        optimizer.state[model.weight]["z"] = odd = torch.full((4,), 7.0)
        mask.restore_(model, optimizer)
        assert odd.tolist() == [7.0] * 4  # of another shape: no copy


def test_no_gradient_stays_no_gradient():
    model, vanilla, mask = random_case()
    mask.rewind_(model, vanilla)
    mask.zero_grad_(model)
    assert all(p.grad is None for p in model.parameters())


def test_sparse_gradients_are_masked():
    model = nn.Embedding(6, 3, sparse=True)
    mask = WeightMask({"weight": torch.arange(18).view(6, 3) % 2 == 0})
    mask.freeze(model)
    model(torch.tensor([1, 4, 4])).sum().backward()
    dense = model.weight.grad.to_dense()
    mask.zero_grad_(model)
    assert torch.equal(model.weight.grad.to_dense(), dense.masked_fill(mask.masks["weight"], 0))


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


def test_masks_of_another_model():
    model, vanilla, _ = random_case()
    with pytest.raises(ValueError, match=r"no parameter 'head\.weight'"):
        WeightMask({"head.weight": torch.ones(2, dtype=torch.bool)}).rewind_(model, vanilla)
    with pytest.raises(ValueError, match="has shape"):
        WeightMask({"0.bias": torch.ones(2, dtype=torch.bool)}).freeze(model)
    with pytest.raises(ValueError, match=r"vanilla weights for '0\.bias': expected shape \(8,\), found nothing"):
        WeightMask({"0.bias": torch.ones(8, dtype=torch.bool)}).rewind_(model, {})
    with pytest.raises(TypeError, match="bool"):
        WeightMask({"0.bias": torch.ones(8)})


def test_equal_parameters_are_told_apart_by_name_not_value():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[1].bias)
    mask = WeightMask({"1.bias": torch.tensor([True, True])})
    mask.rewind_(model, {"1.bias": torch.ones(2)})
    assert model[0].bias.tolist() == [0, 0]
    assert model[1].bias.tolist() == [1, 1]


def test_users_own_mask_buffers_are_left_alone():
    model = nn.Linear(2, 2)
    model.register_buffer("attn_mask", torch.ones(2, 2))
    mask = WeightMask({"weight": torch.tensor([[True, False], [False, False]])})
    mask.rewind_(model, {"weight": torch.zeros(2, 2)})
    mask.restore_(model)
    assert model.attn_mask.sum() == 4


@pytest.mark.parametrize(
    "there", [torch.zeros(3, device="meta"), torch.zeros(3).double(), torch.zeros(3, device="meta").half()]
)
def test_held_values_go_to_the_device_and_precision_of_the_weights(there):
    held = Frozen(torch.tensor([0, 2]), torch.tensor([1.0, 2.0]))
    copied = held.like(there)
    assert (held.index.device, held.value.device, held.value.dtype) == (
        torch.device("cpu"), torch.device("cpu"), torch.float32
    )  # fmt: skip
    held.follow(there)
    for frozen in (held, copied):
        assert frozen.index.device == frozen.value.device == there.device
        assert frozen.index.dtype == torch.int64
        assert frozen.value.dtype == there.dtype
    value = held.value
    held.follow(there)
    assert held.value is value  # nothing is copied where nothing changes


def test_a_mask_is_frozen_where_the_weights_are():
    mask = WeightMask({"weight": torch.eye(2).bool()})
    mask.freeze(nn.Linear(2, 2, device="meta"))
    held = mask._frozen["weight"]
    assert held.index.device.type == held.value.device.type == "meta"


def test_bf16_weights_are_held_in_their_own_dtype():
    model = nn.Linear(3, 3).bfloat16()
    mask = WeightMask({"weight": torch.ones(3, 3, dtype=torch.bool)})
    vanilla = {"weight": torch.randn(3, 3)}
    mask.rewind_(model, vanilla)
    with torch.no_grad():
        model.weight.add_(1)
    mask.restore_(model)
    assert torch.equal(model.weight, vanilla["weight"].bfloat16())


# --- What is stored.


def frozen_case():
    model, vanilla, mask = random_case()
    mask.rewind_(model, vanilla)
    return model, vanilla, mask


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


def test_a_state_dict_gets_the_held_values_by_tensors_of_its_own():
    model, vanilla, mask = frozen_case()
    state = model.state_dict()
    assert mask.restore_in_(state) == {}
    assert state["0.weight"].data_ptr() == model[0].weight.data_ptr()
    with torch.no_grad():
        model[0].weight.add_(1)
    moved, kept = state["0.weight"], model[0].weight.detach().clone()
    count = int(mask.masks["0.weight"].sum())
    assert mask.restore_in_(state) == {"0.weight": count}
    chosen = mask.masks["0.weight"]
    assert torch.equal(state["0.weight"][chosen], vanilla["0.weight"][chosen])
    assert torch.equal(state["0.weight"][~chosen], kept[~chosen])
    assert torch.equal(moved, kept)  # the model's own tensor is as it was
    assert mask.restore_in_({"0.weight": torch.ones(1), "other": torch.ones(2)}) == {}


def test_nan_that_is_held_is_not_moved():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    mask = WeightMask({"weight": torch.tensor([[True, True]])})
    mask.freeze(model)
    assert mask.moved(model) == {}
    with torch.no_grad():
        model.weight[0, 0] = 1
    assert mask.moved(model) == {"weight": 1}
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    assert mask.moved(model) == {"weight": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightMask.top({"w": torch.ones(4)}, True), "rate must be a number, not the bool True"),
        (lambda: WeightMask.top({"w": torch.ones(4)}, "0.5"), "rate must be a number, not the str '0.5'"),
        (lambda: WeightMask.top({"w": torch.ones(4)}, None), "rate must be a number, not None"),
        (lambda: WeightMask.top({"w": torch.ones(4)}, 0.5, per_layer="no"), "per_layer must be True or False"),
        (lambda: WeightMask([torch.ones(2).bool()]), "masks must be bool tensors by parameter name, not a list"),
        (lambda: WeightMask({"w": [True, False]}), "the mask of 'w' must be a bool tensor, not list"),
        (lambda: CriticalRewindCallback(rate=True), "rate must be a number, not the bool True"),
        (lambda: CriticalRewindCallback(rate=None), "rate must be a number, not None. It is the fraction"),
        (lambda: CriticalRewindCallback(per_layer="no"), "per_layer must be True or False, not the str 'no'"),
        (lambda: CriticalRewindCallback(scores=[1.0]), "scores must be a file or tensors by parameter name"),
        (lambda: CriticalRewindCallback(mask={}), "mask must be a WeightMask or a file of one, not a dict"),
        (lambda: GradientMaskCallback(mask=0.5), "mask must be a WeightMask or a file of one, not a float"),
        (lambda: VanillaSnapshotCallback("a", overwrite="no"), "overwrite must be True or False, not the str 'no'"),
    ],
)
def test_arguments_of_the_wrong_type(make, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make()
