"""A metric of examples alone is what reset, update and compute give."""

import pytest
import torch

from lightning_cwrf.auditing.estimates import attack_metrics
from lightning_cwrf.metrics import MembershipAUROC, P1Score

SCORES, INSIDE = torch.tensor([0.9, 0.3, 0.8, 0.1, 0.5, 0.5]), torch.tensor([1, 1, 1, 0, 0, 0]).bool()


class Doubled(MembershipAUROC):
    def compute(self):
        return 2 * super().compute()


class Inverted(MembershipAUROC):
    def update(self, scores, is_member):
        super().update(-scores, is_member)


class HalfP1(P1Score):
    def compute(self):
        return super().compute() / 2


METRICS = [*attack_metrics(0.9).values(), Doubled(), Inverted(), HalfP1(0.9)]


@pytest.mark.parametrize("metric", METRICS, ids=lambda each: type(each).__name__)
def test_the_value_of_examples_is_that_of_the_states(metric):
    metric.update(torch.rand(4), torch.tensor([True, False, True, False]))
    found = metric.value_of(SCORES, INSIDE)
    metric.reset()
    metric.update(SCORES, INSIDE)
    assert torch.equal(found, metric.compute())


def test_p1_without_an_accuracy_raises():
    with pytest.raises(ValueError, match="P1Score needs the accuracy once"):
        P1Score().value_of(SCORES, INSIDE)


def test_wrong_scores_raise():
    with pytest.raises(ValueError, match="NaN"):
        MembershipAUROC().value_of(torch.full((6,), torch.nan), INSIDE)
