import os

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score, roc_curve
from torchmetrics.utilities.data import dim_zero_cat

from lightning_cwrf import metrics
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
from tests.oracles import formulas

ALL = [MembershipAUROC, TPRAtFPR, AttackAdvantage, BalancedAccuracy, LossGap, lambda: P1Score(accuracy=0.9)]

tied = st.sampled_from([-1e300, -2.0, -0.5, 0.0, 0.5, 7.0, float("inf"), float("-inf")])


@st.composite
def scored(draw):
    n = draw(st.integers(2, 30))
    scores = draw(st.lists(tied | st.floats(-5, 5), min_size=n, max_size=n))
    flags = draw(st.lists(st.booleans(), min_size=n - 2, max_size=n - 2))
    return torch.tensor(scores, dtype=torch.float64), torch.tensor([True, False, *flags])


@given(scored())
def test_auroc_and_advantage_against_pairs_and_thresholds(case):
    scores, is_member = case
    lists = scores.tolist(), is_member.tolist()
    assert float(MF.membership_auroc(scores, is_member)) == pytest.approx(formulas.auc_by_pairs(*lists))
    best = formulas.best_over_thresholds(*lists, lambda tpr, fpr: tpr - fpr)
    assert float(MF.attack_advantage(scores, is_member)) == pytest.approx(best)
    best = formulas.best_over_thresholds(*lists, lambda tpr, fpr: (tpr + 1 - fpr) / 2)
    assert float(MF.balanced_accuracy(scores, is_member)) == pytest.approx(best)


@given(scored(), st.sampled_from([0.0, 1e-3, 0.1, 0.34, 1.0]))
def test_tpr_against_every_threshold(case, max_fpr):
    scores, is_member = case
    best = formulas.best_over_thresholds(
        scores.tolist(), is_member.tolist(), lambda tpr, fpr: tpr if fpr <= max_fpr else 0.0
    )
    assert float(MF.tpr_at_fpr(scores, is_member, max_fpr)) == pytest.approx(best)


@given(scored())
def test_roc_is_scikit_learns(case):
    scores, is_member = case
    scores = scores.clamp(-1e3, 1e3)  # scikit-learn takes no infinite scores
    fpr, tpr, thresholds = MF.membership_roc(scores, is_member)
    theirs = roc_curve(is_member.numpy(), scores.numpy(), drop_intermediate=False)
    for ours, sk in zip((fpr, tpr, thresholds), theirs, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(sk))
    assert float(MF.membership_auroc(scores, is_member)) == pytest.approx(roc_auc_score(is_member, scores))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_constant_scores_have_auc_one_half_and_end_points(dtype):
    scores, is_member = torch.zeros(9, dtype=dtype), torch.arange(9) < 4
    assert float(MF.membership_auroc(scores, is_member)) == 0.5
    fpr, tpr, _ = MF.membership_roc(scores, is_member)
    assert fpr.tolist() == tpr.tolist() == [0.0, 1.0]


def test_log_ratios_do_not_saturate_into_ties():
    scores = torch.tensor([1001.0, 1000.0, 1002.0, 999.0])
    assert float(MF.membership_auroc(scores, torch.tensor([True, False, True, False]))) == 1.0


def examples(n=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    is_member = torch.rand(n, generator=g) < 0.5
    return torch.randn(n, generator=g) + is_member, is_member


@pytest.mark.parametrize("make", ALL)
def test_class_is_function_over_batches(make):
    scores, is_member = examples()
    functions = {
        "MembershipAUROC": MF.membership_auroc,
        "TPRAtFPR": MF.tpr_at_fpr,
        "AttackAdvantage": MF.attack_advantage,
        "BalancedAccuracy": MF.balanced_accuracy,
        "LossGap": MF.loss_gap,
        "P1Score": lambda s, m: MF.p1_score(0.9, MF.attack_advantage(s, m)),
    }
    metric = make()
    for begin in range(0, 200, 50):
        metric.update(scores[begin : begin + 50], is_member[begin : begin + 50])
    value = metric.compute()
    assert value.shape == ()
    assert float(value) == pytest.approx(float(functions[type(metric).__name__](scores, is_member)))
    low, high = metric.interval()
    assert low <= float(value) <= high
    assert metric.interval() == (low, high)
    inner = metric.interval(0.5)
    assert high - low > inner.high - inner.low
    metric.reset()
    with pytest.raises(ValueError, match="has no examples"):
        metric.compute()


@pytest.mark.usefixtures("rng_untouched")
def test_intervals_draw_nothing_from_the_callers_rng():
    scores, is_member = examples()
    for make in ALL:
        metric = make()
        metric.update(scores, is_member)
        metric.interval()


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


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_clopper_pearson_is_scipys(counts, confidence):
    theirs = binomtest(*counts).proportion_ci(confidence, method="exact")
    assert MF.clopper_pearson(*counts, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_small_samples_say_what_they_cannot_show():
    metric = TPRAtFPR(max_fpr=0.01)
    metric.update(torch.cat([torch.arange(100.0), torch.arange(50.0) - 60]), torch.arange(150) < 100)
    assert float(metric.compute()) == 1.0
    assert metric.interval() == (0.0, 1.0)
    assert "50 non-members cannot show an FPR of 0.01" in metric.note
    metric.update(torch.zeros(350), torch.zeros(350, dtype=torch.bool))
    assert metric.note is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_whole_and_bool_scores_are_scores(dtype):
    scores = torch.tensor([3, 0, 1, 1, 0, 0], dtype=torch.int64).to(dtype)
    is_member = torch.tensor([True, True, True, False, False, False])
    for make in (*ALL, EpsilonLowerBound):
        whole, floating = make(), make()
        whole.update(scores, is_member)
        floating.update(scores.double(), is_member)
        assert whole.compute() == floating.compute()
        assert whole.interval() == floating.interval()
        assert whole.p_value() == floating.p_value()
    thresholds = MF.membership_roc(scores, is_member)[2]
    assert thresholds.dtype == torch.float64
    assert thresholds[0] == float("inf")
    assert MF.one_run_epsilon(scores, is_member) == MF.one_run_epsilon(scores.double(), is_member)


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


@pytest.mark.parametrize(
    ("scores", "is_member", "message"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.bool), "of one length"),
        (torch.zeros(3), torch.zeros(3), "must be a bool tensor"),
        (torch.tensor([0.0, float("nan")]), torch.tensor([True, False]), r"1 scores are NaN \(first at \[1\]\)"),
        (torch.zeros(3), torch.ones(3, dtype=torch.bool), "3 members, 0 non-members"),
    ],
)
def test_bad_values(scores, is_member, message):
    metric = MembershipAUROC()
    with pytest.raises(ValueError, match=message):
        metric.update(scores, is_member)
        metric.compute()


@pytest.mark.parametrize(
    ("scores", "is_member", "message"),
    [
        (
            [0.0, 1.0],
            torch.tensor([True, False]),
            r"scores must be a tensor, not a list; use torch.as_tensor\(scores\)",
        ),
        (np.zeros(2), torch.tensor([True, False]), "scores must be a tensor, not a ndarray"),
        (torch.zeros(2), np.array([True, False]), r"is_member must be a tensor, not a ndarray; use torch.as_tensor\("),
        (torch.zeros(2), [True, False], "is_member must be a tensor, not a list"),
        (torch.zeros(2, dtype=torch.complex64), torch.tensor([True, False]), "scores must be real numbers"),
    ],
)
def test_bad_types(scores, is_member, message):
    for make in ALL:
        with pytest.raises(TypeError, match=message):
            make().update(scores, is_member)
    with pytest.raises(TypeError, match=message):
        MF.membership_auroc(scores, is_member)
    with pytest.raises(TypeError, match=message):
        MF.one_run_epsilon(scores, is_member)


def test_bad_settings():
    with pytest.raises(ValueError, match="max_fpr"):
        TPRAtFPR(max_fpr=2)
    with pytest.raises(ValueError, match="confidence"):
        MF.clopper_pearson(1, 2, 95)


SHARES = {0: slice(0, 230), 1: slice(230, 301)}
EVERY = {
    "auroc": MembershipAUROC,
    "tpr": lambda: TPRAtFPR(max_fpr=0.1),
    "tpr_too_low": lambda: TPRAtFPR(max_fpr=1e-3),
    "advantage": AttackAdvantage,
    "balanced_accuracy": BalancedAccuracy,
    "loss_gap": LossGap,
    "p1": lambda: P1Score(accuracy=0.9),
    "p1_correct": P1Score,
    "epsilon": lambda: EpsilonLowerBound(delta=1e-5),
}


def test_every_metric_is_tried_on_two_processes():
    assert {type(make()).__name__ for make in EVERY.values()} == {
        name for name in metrics.__all__ if name not in ("MembershipMetric", "Interval")
    }


def measured(name, share):
    """All that a metric says, of a share of the examples."""
    scores, is_member = examples(301)
    scores = 3 * scores.round(decimals=1) if name == "epsilon" else scores.round(decimals=1)
    scores[is_member] += 4 if name == "epsilon" else 0  # so that there is a bound
    metric = EVERY[name]()
    more = {"correct": (torch.arange(301) % 3 > 0)[share]} if name == "p1_correct" else {}
    metric.update(scores[share], is_member[share], **more)
    said = (float(metric.compute()), *metric.interval(), metric.p_value(), metric.note)
    return said, len(dim_zero_cat(metric.scores))


def two_processes(rank, port, results):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name in EVERY:
        results[rank, name] = measured(name, SHARES[rank])
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_single_process_numbers():
    """Value, interval, p-value and note, where one process has three times the examples of the other."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(two_processes, (29_500 + os.getpid() % 1000, results), nprocs=2)
        found = dict(results)
    for name in EVERY:
        expected, _ = measured(name, slice(None))
        for rank, local in ((0, 230), (1, 71)):
            said, left = found[rank, name]
            assert said == pytest.approx(expected, abs=1e-12), name
            assert left == local  # the states are each process's own again
    assert measured("epsilon", slice(None))[0][0] > 0
