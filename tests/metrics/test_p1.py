"""P1: its accuracy, and its interval."""

import pytest
import torch

from lightning_cwrf.metrics import (
    P1Score,
)
from lightning_cwrf.metrics import functional as MF
from lightning_cwrf.metrics.functional.roc import count_scores
from tests.metrics.cases import floats


def test_p1_takes_accuracy_from_the_non_members():
    metric = P1Score()
    is_member = torch.tensor([True, True, False, False])
    metric.update(torch.zeros(4), is_member, correct=torch.tensor([True, True, True, False]))
    assert float(metric.compute()) == pytest.approx(2 * 0.5 * 1 / 1.5)
    with pytest.raises(ValueError, match="accuracy once"):
        metric.update(torch.zeros(4), is_member)
    with pytest.raises(ValueError, match="accuracy once"):
        P1Score(accuracy=1.0).update(torch.zeros(4), is_member, correct=is_member)
    with pytest.raises(ValueError, match="accuracy must be a number in"):
        P1Score(accuracy=90)


def test_the_interval_covers_the_accuracy_if_its_examples_are_known():
    scores, is_member = torch.randn(200, generator=torch.Generator().manual_seed(0)), torch.arange(200) < 100
    exact, measured, counted_ = P1Score(accuracy=0.7), P1Score(accuracy=0.7, accuracy_examples=100), P1Score()
    exact.update(scores, is_member)
    measured.update(scores, is_member)
    counted_.update(scores, is_member, correct=torch.arange(200) % 10 < 7)
    adv_low, adv_high = floats(MF.advantage_interval(count_scores(scores, is_member)))
    low, high = MF.clopper_pearson(70, 100)
    assert exact.interval() == pytest.approx((float(MF.p1_score(0.7, adv_high)), float(MF.p1_score(0.7, adv_low))))
    expected = float(MF.p1_score(low, adv_high)), float(MF.p1_score(high, adv_low))
    assert measured.interval() == pytest.approx(expected)
    assert counted_.interval() == pytest.approx(expected)
    with pytest.raises(ValueError, match="accuracy_examples goes with accuracy"):
        P1Score(accuracy_examples=100)
