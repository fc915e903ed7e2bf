"""Outputs of other engines, read into logits and targets."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cwrf import probabilities_to_logits
from lightning_cwrf.arrays import read_outputs
from lightning_cwrf.attacks import logit_signal
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(sum), min_size=1, max_size=5))
def test_logits_of_probabilities_by_hand(rows):
    rows = [[p / sum(row) for p in row] for row in rows]
    found = probabilities_to_logits(rows, floor=0.01)
    assert found.dtype == torch.float64
    assert found.tolist() == [[pytest.approx(math.log(max(p, 0.01))) for p in row] for row in rows]
    assert probabilities_to_logits(np.float32(rows)).dtype == torch.float32


def test_the_floor_bounds_the_signal():
    """A certain forest of 100 trees: LiRA's signal is near ± log of the floor, and finite."""
    z = probabilities_to_logits([[1.0, 0.0], [0.0, 1.0]], floor=1 / 200)
    torch.testing.assert_close(
        logit_signal(z, torch.tensor([0, 0])), torch.tensor([1.0, -1.0], dtype=torch.float64) * math.log(200)
    )


def test_one_probability_or_logit_is_that_of_class_1():
    p = np.array([0.2, 0.9])
    z = probabilities_to_logits(p)
    torch.testing.assert_close(z.softmax(-1)[:, 1], torch.from_numpy(p))
    for logits in (np.array([0.5, -2.0]), torch.tensor([[0.5], [-2.0]])):
        for targets in ([1, 0], [True, False], np.array([1.0, 0.0]), [[1], [0]]):
            z, y = read_outputs((logits, targets), "members")
            assert z.tolist() == [[0.0, 0.5], [0.0, -2.0]]
            assert y.tolist() == [1, 0]


def test_arrays_are_shared_where_they_can_be(tmp_path):
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32))
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    z, _ = read_outputs((mapped, [0, 1, 2, 0, 1]), "members")
    assert z.data_ptr() == mapped.ctypes.data
    assert read_outputs((mapped.astype(np.float64), np.arange(5) % 3), "members")[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "labels"),
    [
        (pd.DataFrame, lambda y: pd.Series(y, dtype="category")),
        (lambda z: z[::-1].copy()[::-1], lambda y: y.astype(np.uint16)),
        (lambda z: z[:, ::-1].copy()[:, ::-1], lambda y: y[::-1].astype(np.uint64)[::-1]),
        (lambda z: z.astype(">f4"), lambda y: y.astype(">i2")),
        (lambda z: z.astype(np.longdouble), lambda y: y.tolist()),
        (np.asfortranarray, lambda y: y.astype(np.uint32)),
    ],
)
def test_arrays_of_any_type_and_layout_are_taken(change, labels):
    z, y = np.float32([[1, -2, 0], [0.5, 3, -1], [2, 2, -4]]), np.array([2, 0, 1])
    found, targets = read_outputs((change(z), labels(y)), "members")
    assert found.tolist() == z.tolist()
    assert targets.tolist() == y.tolist()
    assert targets.dtype == torch.int64


def test_a_membership_is_read_as_outputs_are():
    z, membership = np.random.default_rng(0).normal(size=(4, 6, 3)), balanced_membership(4, 6).numpy()
    for each in (pd.DataFrame(membership), membership[:, ::-1].copy()[:, ::-1], membership.tolist()):
        assert ShadowOutputs.from_arrays(z, each, [0, 1, 2, 0, 1, 2]).membership.tolist() == membership.tolist()


def test_unsigned_tensors_are_taken_and_masked_or_sparse_ones_are_not():
    assert read_outputs((LOGITS, torch.tensor([0, 2]).to(torch.uint16)), "members")[1].tolist() == [0, 2]
    with pytest.raises(TypeError, match="the logits of members have masked values"):
        read_outputs((np.ma.masked_greater(LOGITS.numpy(), 2), [0, 1]), "members")
    with pytest.raises(TypeError, match="must be dense"):
        read_outputs((LOGITS.to_sparse(), [0, 1]), "members")


def test_models_that_are_the_same_are_found():
    z, membership = torch.randn(6, 8, 3), balanced_membership(6, 8)
    targets = torch.arange(8) % 3
    with pytest.raises(ValueError, match="the logits of all 6 models are the same"):
        ShadowOutputs.from_arrays(z[:1].expand(6, -1, -1), membership, targets)
    z[4] = z[1]
    with pytest.warns(UserWarning, match="models 1 and 4 have the same logits on every example"):
        ShadowOutputs.from_arrays(z, membership, targets)


LOGITS = torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, -1.0]])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (LOGITS, TypeError, "members must be a pair"),
        ((LOGITS, [0, 1], None), TypeError, "members must be a pair"),
        ((LOGITS.int(), [0, 1]), TypeError, "must be floats, not torch.int32"),
        ((LOGITS, ["cat", "dog"]), TypeError, "return_inverse"),
        ((LOGITS[None], [0, 1]), ValueError, r"shape \(n, K\) with K >= 2"),
        ((LOGITS[:0], []), ValueError, r"not \(0, 3\)"),
        ((LOGITS / 0, [0, 1]), ValueError, "NaN or infinite in 2 rows.*probabilities_to_logits"),
        ((LOGITS.softmax(-1), [0, 1]), ValueError, "are probabilities.*probabilities_to_logits"),
        ((LOGITS, [0]), ValueError, "logits of 2 examples and 1 targets"),
        ((LOGITS, [0, 3]), ValueError, "go from 0 to 3; with 3 classes"),
        ((LOGITS, [0, -1]), ValueError, "go from -1 to 0"),
        ((LOGITS, [0.5, 1.0]), ValueError, "must be class indices"),
        ((LOGITS, [[1, 0, 0], [0, 1, 0]]), ValueError, "argmax"),
        ((LOGITS, [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), ValueError, "multi-label.*one label at a time"),
        ((LOGITS, [[1, 1, 1], [0, 0, 0]]), ValueError, "multi-label"),
    ],
)
def test_what_is_no_output_of_a_classifier_raises(given, error, message):
    with pytest.raises(error, match=message):
        read_outputs(given, "members")


@pytest.mark.parametrize(
    ("given", "settings", "error", "message"),
    [
        ([[1, 0]], {}, TypeError, "floats"),
        ([["a", "b"]], {}, TypeError, "numbers"),
        ([[0.5, 0.6]], {}, ValueError, "sum 1; here sums go from 1.1 to 1.1"),
        ([[-0.5, 1.5]], {}, ValueError, "between 0 and 1"),
        ([[math.nan, 1.0]], {}, ValueError, "between 0 and 1"),
        ([[1.0]], {}, ValueError, "K >= 2"),
        (0.5, {}, ValueError, "K >= 2"),
        ([[0.5, 0.5]], {"floor": 0}, ValueError, "floor"),
        ([[0.5, 0.5]], {"floor": 0.6}, ValueError, "floor"),
    ],
)
def test_what_are_no_probabilities_raises(given, settings, error, message):
    with pytest.raises(error, match=message):
        probabilities_to_logits(given, **settings)


def test_probabilities_of_any_model_are_an_error():
    logits = torch.randn(4, 30, 3)
    logits[2] = logits[2].softmax(-1)
    with pytest.raises(ValueError, match="the shadow models, model 2 are probabilities"):
        ShadowOutputs.from_arrays(logits, balanced_membership(4, 30), torch.arange(30) % 3)
