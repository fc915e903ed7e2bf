"""Edges of the formulas that cases drawn at random rarely reach."""

import pytest
import torch

from lightning_cwrf.metrics import functional as MF
from lightning_cwrf.metrics.functional.roc import count_scores
from tests.oracles import intervals as oracle


@pytest.mark.parametrize("value", [-0.1, 1.5, torch.tensor([0.5, 1.5])])
def test_p1_takes_shares(value):
    for given in ((value, 0.5), (0.5, value)):
        with pytest.raises(ValueError, match=r"must be a number in \[0, 1\], not"):
            MF.p1_score(*given)


@pytest.mark.parametrize("delta", [-0.1, 1.0, 1.5])
def test_one_run_epsilon_takes_a_delta_below_one(delta):
    scores, included = torch.rand(20), torch.arange(20) < 10
    with pytest.raises(ValueError, match=r"delta must be a number in \[0, 1\), not"):
        MF.one_run_epsilon(scores, included, delta=delta)


def test_advantage_interval_counts_the_curve_on_both_sides_of_the_best_thresholds():
    """The best thresholds are neither the first nor the last."""
    counts = [(14, 12), (24, 3), (1, 0), (29, 35), (9, 5), (29, 22), (0, 39), (1, 31)]
    members = [-float(score) for score, (found, _) in enumerate(counts) for _ in range(found)]
    nonmembers = [-float(score) for score, (_, false) in enumerate(counts) for _ in range(false)]
    scores = torch.tensor([*members, *nonmembers])
    found = MF.advantage_interval(count_scores(scores, torch.arange(len(scores)) < len(members)))
    assert [float(bound) for bound in found] == pytest.approx(oracle.advantage(members, nonmembers, 0.95), abs=1e-7)
