"""Eq. 6 and 7: rewinding the masked weights and keeping them frozen."""

import re

import pytest
import torch
from torch import nn

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, VanillaSnapshotCallback
from lightning_cwrf.weights.frozen_weights import Frozen
from lightning_cwrf.weights.masks import WeightMask
from tests.weights.helpers import frozen_case, random_case


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


def test_equal_parameters_are_distinguished_by_name_not_value():
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
        (lambda: CriticalRewindCallback(structured=1), "structured must be True or False, not the int 1"),
        (lambda: CriticalRewindCallback(scores=[1.0]), "scores must be a file or tensors by parameter name"),
        (lambda: CriticalRewindCallback(mask={}), "mask must be a WeightMask or a file of one, not a dict"),
        (lambda: GradientMaskCallback(mask=0.5), "mask must be a WeightMask or a file of one, not a float"),
        (lambda: VanillaSnapshotCallback("a", overwrite="no"), "overwrite must be True or False, not the str 'no'"),
    ],
)
def test_arguments_of_the_wrong_type(make, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


def test_complex_weights_are_compared_in_both_parts():
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(3, dtype=torch.complex64))})
    mask = WeightMask({"w": torch.tensor([True, True, False])})
    mask.freeze(model)
    assert mask.moved(model) == {}
    with torch.no_grad():
        model["w"][0] += 1j
        model["w"][2] += 1
    assert mask.moved(model) == {"w": 1}
    mask.restore_(model)
    assert model["w"].tolist() == [0, 0, 1]
