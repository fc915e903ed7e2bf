"""BaVarIA: against loops, in its limits, and against LiRA at few models."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_cwrf.attacks import (
    bavaria,
    lira,
)
from lightning_cwrf.attacks.bavaria import log_t_cdf
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.shadows import balanced_membership
from tests.attacks.cases import close, seeds, shadowed, tensor
from tests.oracles import attacks as oracle


@pytest.mark.slow
@given(seeds, st.sampled_from(["t", "normal"]), st.sampled_from([0.5, 2.0, 10.0]), st.sampled_from([4, 8]))
def test_bavaria_against_loops(seed, predictive, prior, k):
    target, shadows, membership = shadowed(seed, k=k)
    lists = target.tolist(), shadows.tolist(), membership.tolist()
    ours = bavaria(target, shadows, membership, predictive=predictive, prior_models=prior)
    close(ours, oracle.bavaria(*lists, True, predictive, prior))
    offline = bavaria(target, shadows, membership, online=False, predictive=predictive, prior_models=prior)
    # Student's distribution function is an approximation that rises as the exact one does.
    close(offline, oracle.bavaria(*lists, False, predictive, prior), 1e-8 if predictive == "normal" else 0.02)


def test_bavaria_with_many_models_is_lira():
    """The prior counts for two models; among hundreds it is gone."""
    target, shadows, membership = shadowed(n=20, k=800)
    shadows += 3 * torch.randn(20)  # examples differ, so the prior's mean has little information
    target += shadows.mean(0)
    own = lira(target, shadows, membership, variance="per_example")
    assert float((bavaria(target, shadows, membership, predictive="normal") - own).abs().max()) < 0.05


def test_bavaria_beats_lira_at_few_models_of_unequal_spread():
    """Examples differ in spread, which four models cannot estimate: the case for a prior."""
    n, k = 4000, 4
    torch.manual_seed(0)
    membership, spread = balanced_membership(k, n, 0), torch.empty(n).exponential_() + 0.2
    shadows = spread * torch.randn(k, n) + membership.float()
    is_member = torch.rand(n) < 0.5
    target = spread * torch.randn(n) + is_member.float()
    auc = {
        "t": membership_auroc(bavaria(target, shadows, membership), is_member),
        "normal": membership_auroc(bavaria(target, shadows, membership, predictive="normal"), is_member),
        "pooled": membership_auroc(lira(target, shadows, membership, variance="pooled"), is_member),
        "own": membership_auroc(lira(target, shadows, membership, variance="per_example"), is_member),
    }
    assert min(auc["t"], auc["normal"]) > max(auc["pooled"], auc["own"]) + 0.01, auc


@pytest.mark.slow
@given(st.floats(-8, 8), st.floats(1.5, 60))
@settings(max_examples=60)
def test_students_distribution_function_is_hills(t, nu):
    if t == 0:
        t = 1e-3
    ours = float(log_t_cdf(tensor(t), tensor(nu)))
    assert ours == pytest.approx(oracle.log_t_cdf(t, nu), rel=1e-7, abs=1e-9)
    if nu >= 2.5 and t > -5:
        assert ours == pytest.approx(stats.t.logcdf(t, nu), abs=0.004)


def test_students_distribution_function_at_zero():
    assert float(log_t_cdf(tensor(0.0), tensor(4.0))) == pytest.approx(math.log(0.5))


def test_bavaria_of_one_example_and_of_models_that_agree():
    membership = torch.tensor([[True], [True], [False], [False]])
    shadows = tensor([3], [5], [0], [1])
    lists = [2.0], shadows.tolist(), membership.tolist()
    for predictive in ("t", "normal"):
        expected = oracle.bavaria(*lists, True, predictive, 2.0)
        # The prior's weight is enormous: there is no variance between examples.
        assert bavaria(tensor(2), shadows, membership, predictive=predictive).tolist() == pytest.approx(expected)
    agree = torch.ones(4, 1)
    assert torch.isfinite(bavaria(tensor(1.0), agree, membership)).all()
    default = bavaria(tensor(2), shadows, membership)
    assert torch.equal(default, bavaria(tensor(2), shadows, membership, online=True, predictive="t", prior_models=2.0))


@given(seeds, st.sampled_from(["t", "normal"]))
@settings(max_examples=15)
def test_bavaria_with_more_models_on_one_side(seed, predictive):
    """The densities' constants, which depend on the number of models, do not cancel."""
    torch.manual_seed(seed)
    target, shadows = torch.randn(4).double(), torch.randn(7, 4).double()
    inside = torch.tensor([2, 3, 5, 5])  # of seven
    membership = torch.stack([torch.randperm(7) < count for count in inside], 1)
    expected = oracle.bavaria(target.tolist(), shadows.tolist(), membership.tolist(), True, predictive, 2.0)
    assert bavaria(target, shadows, membership, predictive=predictive).tolist() == pytest.approx(
        expected, rel=1e-6, abs=1e-7
    )
