"""The metrics that are functions of scores."""

import math
from functools import partial

import pytest
import torch

from lightning_cwrf.metrics import (
    AttackAdvantage,
    BalancedAccuracy,
    EpsilonLowerBound,
    LossGap,
    MembershipAUROC,
    P1Score,
    TPRAtFPR,
)
from lightning_cwrf.metrics import functional as MF
from lightning_cwrf.metrics.functional import (
    one_run_epsilon,
)
from tests.metrics.cases import examples, groups


@pytest.mark.parametrize(
    ("metric", "function"),
    [
        (MembershipAUROC(), MF.membership_auroc),
        (TPRAtFPR(0.1), lambda s, m: MF.tpr_at_fpr(s, m, 0.1)),
        (AttackAdvantage(), MF.attack_advantage),
        (BalancedAccuracy(), MF.balanced_accuracy),
        (LossGap(), MF.loss_gap),
        (P1Score(accuracy=0.9), lambda s, m: MF.p1_score(0.9, MF.attack_advantage(s, m))),
        (EpsilonLowerBound(1e-5, 0.8, seed=3), partial(MF.epsilon_lower_bound, delta=1e-5, confidence=0.8, seed=3)),
    ],
)
def test_the_value_is_that_of_the_function(metric, function):
    scores, is_member = examples()
    metric.update(scores, is_member)
    assert metric.compute() == function(scores, is_member)


def test_auroc_interval_covers_the_truth():
    """Of 200 intervals at 90 %, between 170 and 192 hold the true AUC (a binomial band of about 1 in 1,000)."""
    truth = float(torch.special.ndtr(torch.tensor(0.5**0.5)))
    held = 0
    for seed in range(200):
        metric = MembershipAUROC(seed=seed)
        metric.update(*examples(seed=seed))
        low, high = metric.interval(0.9)
        held += low <= truth <= high
    assert 166 <= held <= 193


def test_small_samples_have_a_note():
    metric = TPRAtFPR(max_fpr=0.01)
    metric.update(torch.cat([torch.arange(100.0), torch.arange(50.0) - 60]), torch.arange(150) < 100)
    assert float(metric.compute()) == 1.0
    assert metric.interval() == (0.0, 1.0)
    assert "50 non-members cannot show an FPR of 0.01" in metric.note
    metric.update(torch.zeros(350), torch.zeros(350, dtype=torch.bool))
    assert metric.note is None


def test_too_few_nonmembers_have_a_note():
    metric = TPRAtFPR(0.01)
    metric.update(torch.arange(400.0), torch.arange(400) >= 300)
    assert (
        metric.note == "300 non-members cannot bound the TPR at an FPR of 0.01 from below (at 95% confidence); 368 can"
    )
    metric.update(torch.zeros(68), torch.zeros(68, dtype=torch.bool))
    assert metric.note is None


def test_perfect_and_useless_attacks_have_exact_bounds():
    scores, is_member = torch.arange(80.0), torch.arange(80) >= 50
    metric = MembershipAUROC()
    metric.update(scores, is_member)
    # 30 disjoint pairs, all in order: at the bound this has the chance 2.5 %.
    assert metric.interval() == (pytest.approx(0.025 ** (1 / 30)), 1.0)
    metric = MembershipAUROC()
    metric.update(-scores, is_member)
    assert metric.interval() == (0.0, pytest.approx(1 - 0.025 ** (1 / 30)))


@pytest.mark.slow
def test_small_p_values_and_lower_bounds_agree():
    """Where an interval says that an attack beats chance, the one-sided p-value is small: it asks for half as much.

    The advantage's are of two tests: its interval weighs the ends of the ROC more than Kolmogorov–Smirnov does.
    """
    shown = dict.fromkeys(("auc", "advantage", "gap"), 0)
    for seed in range(150):
        scores, is_member = groups(seed, 80, 60, shift=0.3)
        for name, metric, values, chance in (
            ("auc", MembershipAUROC(), scores, 0.5),
            ("advantage", AttackAdvantage(), scores, 0.0),
            ("gap", LossGap(), -scores, 0.0),
        ):
            metric.update(values, is_member)
            if metric.interval().low > chance:
                shown[name] += 1
                assert metric.p_value() < (0.1 if name == "advantage" else 0.05), (name, seed)
    assert min(shown.values()) > 5


def test_a_strong_signal_is_significant():
    scores, is_member = groups(0, 300, 300, shift=3.0)
    for metric in (MembershipAUROC(), TPRAtFPR(0.05), AttackAdvantage(), BalancedAccuracy(), P1Score(accuracy=0.9)):
        metric.update(scores, is_member)
        assert metric.p_value() < 1e-6
    gap = LossGap()
    gap.update(-scores, is_member)
    assert gap.p_value() < 1e-6
    epsilon = EpsilonLowerBound(delta=1e-5)
    epsilon.update(scores, is_member)
    assert 1 < float(epsilon.compute()) < float(epsilon.interval(0.5).low) < epsilon.interval().high == math.inf
    assert "no lower bound can be above 4.7," in epsilon.note
    assert float(one_run_epsilon(scores, is_member)) > 1
