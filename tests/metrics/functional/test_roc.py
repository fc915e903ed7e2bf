"""The ROC and what is read off it: against loops and scikit-learn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from lightning_cwrf.metrics import functional as MF
from tests.oracles import formulas

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
