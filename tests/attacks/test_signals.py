"""Per-example signals, and the checks of attacks' inputs."""

import math

import numpy as np
import pytest
import torch

from lightning_cwrf import attacks
from lightning_cwrf.attacks import (
    entropy,
    example_losses,
    lira,
    logit_signal,
    modified_entropy,
    rmia,
    signals,
    true_class_probability,
)
from lightning_cwrf.attacks.metric_based import confidence, correctness
from lightning_cwrf.attacks.signals import check_coverage, check_finite, check_targets
from tests.attacks.cases import shadowed
from tests.oracles import formulas


def test_signals_against_loops_and_at_huge_logits():
    z = torch.randn(6, 5, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 4, 4])
    for i, row in enumerate(z.tolist()):
        p = formulas.softmax(row)[int(y[i])]
        assert float(true_class_probability(z, y)[i]) == pytest.approx(p)
        assert float(logit_signal(z, y)[i]) == pytest.approx(torch.logit(torch.tensor(p, dtype=torch.float64)).item())
        assert float(example_losses(z, y)[i]) == pytest.approx(formulas.cross_entropy(row, int(y[i])))
    huge = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    assert logit_signal(huge, torch.tensor([0, 0])).tolist() == [1e4, -2e4]
    stacked = torch.stack([z, z + 1])
    assert torch.allclose(logit_signal(stacked, y)[1], logit_signal(z, y))


def test_inputs_stay_as_they_were():
    target, shadows, membership = (t.double() if t.is_floating_point() else t for t in shadowed())
    before = [t.clone() for t in (target, shadows, membership)]
    lira(target, shadows, membership)
    rmia(target.sigmoid(), shadows.sigmoid(), membership, torch.rand(5), torch.rand(6, 5))
    assert all(torch.equal(a, b) for a, b in zip(before, (target, shadows, membership), strict=True))


def test_logit_signals_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, 1.0]], dtype=torch.float64)
    found = logit_signal(logits, torch.tensor([0, 2]))
    expected = [2 - math.log(math.e + 1), 1 - math.log(1 + math.exp(5))]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("signal", [logit_signal, true_class_probability, example_losses])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_signals_of_low_precision_are_computed_in_float64(signal, dtype):
    logits = (7 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.arange(40) % 5
    torch.testing.assert_close(signal(logits, targets), signal(logits.double(), targets), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "signal",
    [logit_signal, true_class_probability, example_losses, correctness, confidence, entropy, modified_entropy],
)
def test_blocks_of_examples_do_not_matter_for_signals(signal, monkeypatch):
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 2, 11, 5), torch.randint(5, (11,))
    whole = signal(logits, targets)
    assert whole.shape == (3, 2, 11)
    for block in (1, 10, 25, 55):
        monkeypatch.setattr(signals, "BLOCK", block)
        assert torch.equal(signal(logits, targets), whole)
        assert torch.equal(signal(logits[1, 0], targets), whole[1, 0])
    strided = logits.transpose(0, 1)
    assert torch.equal(signal(strided, targets), whole.transpose(0, 1))


def test_many_bad_examples_are_counted_and_ten_are_named():
    values = torch.zeros(2, 30)
    values[1, 5:16] = math.nan
    with pytest.raises(ValueError, match=r"x has NaN .* \[5, 6, 7, 8, 9, 10, 11, 12, 13, 14\], … \(11 in all\)"):
        check_finite("x", values)
    values[1, 15] = 0
    with pytest.raises(ValueError, match=r"examples \[5, 6, 7, 8, 9, 10, 11, 12, 13, 14\] \(10 in all\)"):
        check_finite("x", values)
    with pytest.raises(TypeError, match=r"x must be a tensor of numbers, not torch\.complex64"):
        check_finite("x", torch.zeros(1, dtype=torch.complex64))
    assert check_finite("x", torch.tensor([1, 2])).dtype == torch.float64


def test_targets_are_checked_and_made_int64():
    logits = torch.zeros(2, 3, 4)
    assert check_targets(logits, torch.tensor([0, 3, 1], dtype=torch.int32)).dtype == torch.int64
    assert check_targets(torch.zeros(1, 2), torch.tensor([1])).tolist() == [1]
    for wrong in ([0, 1], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match=r"targets must have shape \(3,\)"):
            check_targets(logits, torch.tensor(wrong))
    with pytest.raises(ValueError, match="classes from 0 to 3"):
        check_targets(logits, torch.tensor([0, 4, 1]))


def test_coverage_counts_each_side():
    membership = torch.tensor([[True, False, True], [True, False, False], [False, True, False], [False, True, False]])
    check_coverage(membership, least_in=1, least_out=2)
    with pytest.raises(ValueError, match=r"1 examples \(first \[2\]\) have fewer than 2 IN .*2 IN and 1 OUT.*least 4"):
        check_coverage(membership, least_in=2, least_out=1)
    with pytest.raises(ValueError, match=r"2 examples \(first \[0, 1\]\) have fewer than 3 OUT .* at least 6 shadow"):
        check_coverage(membership, least_in=0, least_out=3)


@pytest.mark.parametrize("function", [correctness, confidence, modified_entropy, attacks.logit_signal])
@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"shape \(..., n, K\) with K >= 2 classes, not \(3,\)"),
        (torch.zeros(3, 1), ValueError, r"with K >= 2 classes, not \(3, 1\)"),
        (torch.zeros(3, 2).long(), TypeError, "logits must be a tensor of floats, not torch.int64"),
        (np.zeros((3, 2)), TypeError, "logits must be a tensor of floats, not a ndarray"),
    ],
)
def test_invalid_logits_raise(function, logits, error, message):
    with pytest.raises(error, match=message):
        function(logits, torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"targets must have shape \(2,\)"):
        correctness(torch.zeros(2, 2), torch.zeros(3).long())
