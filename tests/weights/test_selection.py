"""Eq. 5: exactly the largest scores."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

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


def test_negative_zero_is_below_the_smallest_scores():
    assert WeightMask.top({"a": torch.tensor([-0.0, 1e-9, 2e-9])}, rate=1 / 3).masks["a"].tolist() == [
        False,
        False,
        True,
    ]
