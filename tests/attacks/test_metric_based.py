"""Metric-based attacks and their thresholds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cwrf import attacks
from lightning_cwrf.attacks import (
    calibrated,
    entropy,
    modified_entropy,
)
from lightning_cwrf.metrics.functional import membership_roc
from tests.attacks.cases import close, seeds, shadowed, tensor
from tests.oracles import attacks as oracle
from tests.oracles import formulas


@given(seeds, st.integers(2, 6), st.sampled_from([1.0, 5.0]))
def test_metric_based_scores_against_loops(seed, k, scale):
    torch.manual_seed(seed)
    logits, y = torch.randn(5, k, dtype=torch.float64) * scale, torch.randint(k, (5,))
    rows = list(zip(logits.tolist(), y.tolist(), strict=True))
    close(modified_entropy(logits, y), [-oracle.modified_entropy(*row) for row in rows])
    close(attacks.entropy(logits, y), [-formulas.entropy(formulas.softmax(row)) for row, _ in rows])
    close(attacks.confidence(logits, y), [-formulas.cross_entropy(*row) for row in rows])
    close(attacks.correctness(logits, y), [float(max(row) == row[c]) for row, c in rows])
    assert torch.isfinite(modified_entropy(logits * 1e4, y)).all()
    twice = torch.stack([logits, logits + 1])
    assert torch.allclose(modified_entropy(twice, y)[1], modified_entropy(logits, y))


def test_modified_entropy_and_entropy_by_hand():
    p = [0.5, 0.25, 0.25]
    logits = torch.tensor([p, p], dtype=torch.float64).log()
    by_label = []
    for y in (0, 1):
        value = -(1 - p[y]) * math.log(p[y])
        value -= sum(p[c] * math.log(1 - p[c]) for c in range(3) if c != y)
        by_label.append(-value)
    assert modified_entropy(logits, torch.tensor([0, 1])).tolist() == pytest.approx(by_label)
    assert entropy(logits).tolist() == pytest.approx([0.5 * math.log(0.5) + 0.5 * math.log(0.25)] * 2)
    sure = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64)  # 1 − p is below what p can hold
    rest = 2 * math.exp(-60)
    expected = -(-rest * math.log1p(-rest)) + 2 * math.exp(-60) * math.log1p(-math.exp(-60))
    assert float(modified_entropy(sure, torch.tensor([0]))) == pytest.approx(expected, rel=1e-6, abs=1e-40)
    wrong = float(modified_entropy(sure, torch.tensor([1])))
    assert wrong == pytest.approx(-(60 + math.log1p(rest)) - (60 - math.log(2)), rel=1e-9)


@given(seeds, st.booleans())
def test_thresholds_come_from_shadow_models_per_class(seed, per_class):
    signal, shadows, membership = shadowed(seed, n=12)
    targets = torch.arange(12) % 3
    expected = []
    for i in range(12):
        chosen = targets == targets[i] if per_class else torch.ones(12, dtype=torch.bool)
        known, inside = shadows[:, chosen].flatten().tolist(), membership[:, chosen].flatten().tolist()
        expected.append(float(signal[i]) - oracle.best_threshold(known, inside))
    close(calibrated(signal, targets, shadows, membership, per_class=per_class), expected)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_one_threshold_of_many_signals_is_that_of_their_roc(shift):
    """With more members than blocks of the search; some signals are equal."""
    n = 150_000
    shadows = torch.randn(2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(1e5).round()
    membership = torch.arange(n) % 2 == torch.arange(2)[:, None]
    shadows += 1e5 * shift * membership
    fpr, tpr, thresholds = membership_roc(shadows.flatten(), membership.flatten())
    best = int((tpr - fpr).argmax())
    expected = (thresholds[best] + thresholds[best + 1]) / 2
    ours = calibrated(torch.zeros(n), torch.zeros(n, dtype=torch.long), shadows, membership, per_class=False)
    assert ours.tolist() == [-float(expected)] * n


def test_thresholds_per_class_by_hand():
    """Class 0: members 3, 4, others 1, 2, so 2.5. Class 1 has members only, and uses the threshold of all classes."""
    shadows = tensor([3, 9, 1], [4, 7, 2])
    membership = torch.tensor([[True, True, False], [True, True, False]])
    targets = torch.tensor([0, 1, 0])
    scores = calibrated(tensor(3, 6, 2), targets, shadows, membership)
    assert scores.tolist() == [0.5, 3.5, -0.5]
    assert torch.equal(scores, calibrated(tensor(3, 6, 2), targets, shadows, membership, per_class=True))
    alone = torch.zeros(2, 3, dtype=torch.bool)
    alone[:, 1] = True
    # Classes 0 (all OUT) and 1 (all IN) have no threshold of their own: of 9, 7 against 3, 4, 1, 2 it is 5.5.
    assert calibrated(tensor(3, 6, 2), targets, shadows, alone).tolist() == [-2.5, 0.5, -3.5]


def test_of_equal_thresholds_the_one_with_fewest_positives_is_best():
    targets = torch.zeros(4).long()
    membership = torch.tensor([[True, False, True, False]])
    # 4 is a member, 3 none, 2 a member, 1 none: above 3.5 and above 1.5 the gain is one half each.
    assert calibrated(tensor(0, 0, 0, 0), targets, tensor([4, 3, 2, 1]), membership).tolist() == [-3.5] * 4
    # Non-members score higher: one above the highest.
    assert calibrated(tensor(0, 0, 0, 0), targets, tensor([1, 4, 1, 4]), membership).tolist() == [-5.0] * 4
    # Everything ties: nothing is gained.
    assert calibrated(tensor(0, 0, 0, 0), targets, tensor([2, 2, 2, 2]), membership).tolist() == [-3.0] * 4
    # The members are the lowest in part; the best threshold is the smallest score: one half below it.
    both = torch.tensor([[True, True, True, False]])
    assert calibrated(tensor(0, 0, 0, 0), targets, tensor([4, 3, 2, 1]), both).tolist() == [-1.5] * 4
