"""Whole units: channels, neurons and the heads of an attention."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import nn

from lightning_cwrf.weights import attention_heads
from lightning_cwrf.weights.masks import WeightMask
from tests.oracles import formulas

floats = st.floats(0, width=32, allow_nan=False, allow_infinity=False)
few = st.sampled_from([0.0, 1e-45, 0.25, 0.5, 1.0, 3e38])  # many ties, a subnormal, a huge one


def _weights_of(mask):
    return {
        (name, unit, index)
        for name, chosen in mask.masks.items()
        for unit in range(len(chosen))
        for index in chosen[unit].flatten().nonzero().flatten().tolist()
    }


@given(
    st.lists(st.tuples(npst.arrays(np.float32, npst.array_shapes(max_dims=3, max_side=5), elements=few | floats),
                       st.booleans()), min_size=1, max_size=4),
    st.floats(0, 1),
)  # fmt: skip
def test_whole_units_by_their_mean_scores(layers, rate):
    scores = {}
    for i, (array, with_bias) in enumerate(layers):
        scores[f"layer{i}.weight"] = torch.from_numpy(array)
        if with_bias:
            scores[f"layer{i}.bias"] = torch.from_numpy(array.reshape(len(array), -1)[:, 0].copy())
    total = sum(score.numel() for score in scores.values())
    mask = WeightMask.top(scores, rate, structured=True)
    found = _weights_of(mask)
    assert mask.count <= round(rate * total)
    assert {name: chosen.shape for name, chosen in mask.masks.items()} == {n: s.shape for n, s in scores.items()}
    # Means of huge and tiny numbers round: a unit may stand in for one of the same mean.
    expected = formulas.top_units(scores, round(rate * total))
    if found != expected:
        means = [_unit_means(scores, each) for each in (found, expected)]
        assert sorted(means[0]) == pytest.approx(sorted(means[1]), rel=1e-6)


def _unit_means(scores, chosen):
    units = {(name.rpartition(".")[0], unit) for name, unit, _ in chosen}
    return [
        float(
            torch.cat([s[unit].flatten() for n, s in scores.items() if n.rpartition(".")[0] == module]).double().mean()
        )
        for module, unit in units
    ]


def test_scalars_are_units_and_invalid_scores_raise():
    masks = WeightMask.top({"a.t": torch.tensor(2.0), "b.w": torch.ones(3, 2)}, 0.2, structured=True).masks
    assert masks["a.t"].item() is True
    assert not masks["b.w"].any()
    for bad, message in ((-1.0, "negative"), (float("nan"), "NaN")):
        with pytest.raises(ValueError, match=message):
            WeightMask.top({"a": torch.tensor([bad, 1.0])}, 0.5, structured=True)
    with pytest.raises(ValueError, match="pass one of them"):
        WeightMask.top({"a": torch.ones(2)}, 0.5, structured=True, per_layer=True)


def random_scores(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}


@given(
    st.sampled_from([{}, {"kdim": 5, "vdim": 3}, {"bias": False}, {"add_bias_kv": True}]),
    st.sampled_from([(4, 1), (4, 2), (6, 3)]),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_whole_heads_by_their_mean_scores(settings, sizes, rate, seed):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(*sizes, **settings), "last": nn.Linear(4, 2)})
    scores = random_scores(model, seed)
    mask = WeightMask.top(scores, rate, structured=attention_heads(model))
    assert _weights_of(mask) == formulas.top_units(scores, round(rate * mask.total), {"attention": sizes[1]})


def test_a_chosen_head_is_what_the_attention_computes_as_one():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 3, batch_first=True)})
    nn.init.normal_(model["attention"].in_proj_bias)
    scores = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    scores["attention.in_proj_weight"][8 + 6] = 1  # a row of the values, of the second head
    mask = WeightMask.top(scores, 1 / 3, structured=attention_heads(model))
    mask.rewind_(model, {name: torch.zeros_like(p) for name, p in model.named_parameters()})
    model["attention"].out_proj.weight.data = torch.eye(6)  # each head's output on its own
    inputs = torch.rand(2, 4, 6)
    found, weights = model["attention"](inputs, inputs, inputs, average_attn_weights=False)
    assert [bool((found[..., part] == 0).all()) for part in (slice(0, 2), slice(2, 4), slice(4, 6))] == [
        False,
        True,
        False,
    ]
    assert torch.equal(weights[:, 1], torch.full((2, 4, 4), 0.25))
    assert not torch.allclose(weights[:, 0], torch.full((2, 4, 4), 0.25), atol=0.01)


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        ("heads", "scores do not say how many heads there are: pass structured=attention_heads(model)"),
        ("head", "structured must be True, False or 'heads', not 'head'"),
        ({}, "structured names no attention: pass True"),
        ({"attention": 2, "attentoin": 2}, "structured names 'attentoin', and no scores are of such a module"),
        ({"attention": 5}, "the 12 rows of 'attention.in_proj_weight' are not those of 5 heads"),
        ({"attention": 0}, "the number of heads of 'attention' must be an integer of at least 1, not 0"),
    ],
)
def test_wrong_heads_raise(structured, message):
    scores = random_scores(nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)}), 0)
    with pytest.raises(ValueError, match=re.escape(message)):
        WeightMask.top(scores, 0.5, structured=structured)
