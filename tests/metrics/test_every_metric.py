"""What holds for every registered metric: a new one is tested here without being named."""

import math
import os

import matplotlib
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.utilities.data import dim_zero_cat

from lightning_cwrf.metrics import EpsilonLowerBound, P1Score, TPRAtFPR
from lightning_cwrf.metrics import functional as MF
from tests.metrics.cases import examples, instances, is_calibrated

NAMES = list(instances())


def reported(metric):
    return float(metric.compute()), *metric.interval(), metric.p_value(), metric.note


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("name", NAMES)
def test_batches_do_not_matter(name):
    scores, is_member = examples()
    metric, whole = instances()[name], instances()[name]
    whole.update(scores, is_member)
    for begin in range(0, 200, 50):
        metric.update(scores[begin : begin + 50], is_member[begin : begin + 50])
    assert metric.compute().shape == ()
    assert reported(metric) == reported(whole)
    metric.reset()
    with pytest.raises(ValueError, match="has no examples"):
        metric.compute()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("rng_untouched")
def test_numbers_are_deterministic_and_the_interval_holds_the_value(name):
    metric = instances()[name]
    metric.update(*examples())
    value, low, high, p_value, _ = reported(metric)
    assert low <= value <= high
    assert p_value is None or 0 <= p_value <= 1
    assert reported(metric)[1:] == (low, high, *reported(metric)[3:])
    inner = metric.interval(0.5)
    assert low <= inner.low
    assert inner.high <= high


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_p_values_and_bounds_are_calibrated_on_noise(name):
    assert is_calibrated(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integer_and_bool_scores(name, dtype):
    scores = torch.tensor([3, 0, 1, 1, 0, 0], dtype=torch.int64).to(dtype)
    is_member = torch.tensor([True, True, True, False, False, False])
    whole, floating = instances()[name], instances()[name]
    whole.update(scores, is_member)
    floating.update(scores.double(), is_member)
    assert reported(whole) == reported(floating)
    thresholds = MF.membership_roc(scores, is_member)[2]
    assert thresholds.dtype == torch.float64
    assert thresholds[0] == float("inf")
    assert MF.one_run_epsilon(scores, is_member) == MF.one_run_epsilon(scores.double(), is_member)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("scores", "is_member", "message"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.bool), "of one length"),
        (torch.zeros(3), torch.zeros(3), "must be a bool tensor"),
        (torch.tensor([0.0, float("nan")]), torch.tensor([True, False]), r"1 scores are NaN \(first at \[1\]\)"),
        (torch.zeros(3), torch.ones(3, dtype=torch.bool), "3 members, 0 non-members"),
    ],
)
def test_invalid_values_raise(name, scores, is_member, message):
    metric = instances()[name]
    with pytest.raises(ValueError, match=message):
        metric.update(scores, is_member)
        metric.compute()


@pytest.mark.parametrize(
    ("scores", "is_member", "message"),
    [
        ([0.0, 1.0], torch.tensor([True, False]), r"scores must be a tensor, not a list; use torch.as_tensor\(scores"),
        (np.zeros(2), torch.tensor([True, False]), "scores must be a tensor, not a ndarray"),
        (torch.zeros(2), np.array([True, False]), r"is_member must be a tensor, not a ndarray; use torch.as_tensor\("),
        (torch.zeros(2), [True, False], "is_member must be a tensor, not a list"),
        (torch.zeros(2, dtype=torch.complex64), torch.tensor([True, False]), "scores must be real numbers"),
    ],
)
def test_wrong_types_raise(scores, is_member, message):
    for metric in instances().values():
        with pytest.raises(TypeError, match=message):
            metric.update(scores, is_member)
    with pytest.raises(TypeError, match=message):
        MF.membership_auroc(scores, is_member)
    with pytest.raises(TypeError, match=message):
        MF.one_run_epsilon(scores, is_member)


@pytest.mark.parametrize("name", NAMES)
def test_every_interval_checks_its_confidence(name):
    metric = instances()[name]
    metric.update(torch.randn(20), torch.arange(20) < 10)
    with pytest.raises(TypeError, match="confidence must be a number, not the str"):
        metric.interval("0.95")
    with pytest.raises(ValueError, match="confidence must be a number in"):
        metric.interval(95)


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_is_plotted(name):
    metric = instances()[name]
    metric.update(*examples())
    axes = matplotlib.figure.Figure().add_subplot()
    assert metric.plot(ax=axes)[1] is axes
    assert metric.plot([metric.compute(), metric.compute()], ax=axes)[1] is axes
    assert len(axes.lines) >= 2


@st.composite
def sides(draw):
    """Scores of members and non-members, with ties more often than not."""
    value = st.integers(-3, 3).map(float) if draw(st.booleans()) else st.floats(-3, 3)
    return tuple(draw(st.lists(value, min_size=1, max_size=25)) for _ in range(2))


BOUNDED = [name for name, metric in instances().items() if metric.plot_upper_bound is not None]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BOUNDED, "tpr", "p1 of 30 examples"])
@settings(deadline=None, max_examples=40)
@given(sides())
def test_bounded_intervals_hold_the_value_have_width_and_grow_with_the_confidence(name, case):
    more = {"tpr": TPRAtFPR(0.1), "p1 of 30 examples": P1Score(accuracy=0.9, accuracy_examples=30)}
    metric = {**instances(), **more}[name]
    scores = torch.tensor([case[0] + case[1]], dtype=torch.float64)[0]
    metric.update(scores, torch.arange(len(scores)) < len(case[0]))
    value, before = float(metric.compute()), (math.inf, -math.inf)
    for confidence in (0.3, 0.5, 0.95, 0.999):
        low, high = metric.interval(confidence)
        assert metric.plot_lower_bound - 1e-12 <= low <= value + 1e-12
        assert value - 1e-12 <= high <= metric.plot_upper_bound + 1e-12
        assert high > low
        assert low <= before[0] + 1e-12
        assert high >= before[1] - 1e-12
        before = low, high


SHARES = {0: slice(0, 230), 1: slice(230, 301)}
SETTINGS = {
    "tpr": lambda: TPRAtFPR(max_fpr=0.1),
    "p1 from predictions": P1Score,
    "epsilon": lambda: EpsilonLowerBound(delta=1e-5),
}
SYNCED = [*NAMES, *SETTINGS]


def measured(name, share):
    """All numbers of a metric on a share of the examples."""
    scores, is_member = examples(301)
    strong = 4 if name == "epsilon" else 0  # so that there is a bound
    scores = scores.round(decimals=1) * (3 if strong else 1) + strong * is_member
    metric = SETTINGS[name]() if name in SETTINGS else instances(sync_on_compute=True)[name]
    more = {"correct": (torch.arange(301) % 3 > 0)[share]} if name == "p1 from predictions" else {}
    metric.update(scores[share], is_member[share], **more)
    return reported(metric), len(dim_zero_cat(metric.scores))


def two_processes(rank, port, results):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name in SYNCED:
        results[rank, name] = measured(name, SHARES[rank])
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_single_process_numbers():
    """Value, interval, p-value and note, where one process has three times the examples of the other."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(two_processes, (29_500 + os.getpid() % 1000, results), nprocs=2)
        found = dict(results)
    for name in SYNCED:
        expected, _ = measured(name, slice(None))
        for rank, local in ((0, 230), (1, 71)):
            numbers, left = found[rank, name]
            assert numbers == pytest.approx(expected, abs=1e-12), name
            assert left == local  # the states are each process's own again
    assert measured("epsilon", slice(None))[0][0] > 0
