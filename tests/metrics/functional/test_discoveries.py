"""Single examples that stand out: against slow versions, on degenerate input, and how often they are false."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_cwrf.metrics import functional as MF
from lightning_cwrf.metrics.functional.discoveries import fewest_nulls
from tests.oracles import discoveries as oracle

few = st.lists(st.integers(-3, 3).map(float) | st.sampled_from([math.inf, -math.inf]), min_size=1, max_size=12)
chances = st.lists(st.integers(0, 20).map(lambda i: i / 20), max_size=12)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@given(few, few)
def test_ranks_by_hand(scores, nulls):
    assert MF.conformal_p_values(tensor(scores), tensor(nulls)).tolist() == pytest.approx(
        oracle.conformal(scores, nulls)
    )
    found = MF.exposure(tensor(scores), tensor(nulls)).tolist()
    assert found == pytest.approx(oracle.exposure(scores, nulls), abs=1e-12)


@given(chances, st.sampled_from([0.0499, 0.1001, 0.2501, 0.5001]))
def test_corrections_by_hand(p_values, level):
    bh, holm = (f(tensor(p_values)) for f in (MF.benjamini_hochberg, MF.holm))
    assert (bh <= level).tolist() == oracle.rejected_by_bh(p_values, level)
    assert (holm <= level).tolist() == oracle.rejected_by_holm(p_values, level)


@given(chances)
def test_benjamini_hochberg_is_that_of_scipy(p_values):
    if p_values:
        expected = stats.false_discovery_control(p_values)
        assert MF.benjamini_hochberg(tensor(p_values)).tolist() == pytest.approx(list(expected))


def simulated(null_share, step, runs=400, m=100, n=100, fdr=0.1):
    """Discoveries in each run, and the share of them that are false."""
    generator = torch.Generator().manual_seed(round(100 * null_share + 10 * step))
    nulls = torch.arange(m) < null_share * m
    shares, found = [], []
    for _ in range(runs):
        scores = torch.randn(m, generator=generator) + 3.5 * ~nulls
        others = torch.randn(n, generator=generator)
        if step:
            scores, others = (step * (each / step).round() for each in (scores, others))
        chosen = MF.benjamini_hochberg(MF.conformal_p_values(scores, others)) <= fdr
        found.append(int(chosen.sum()))
        shares.append(float((chosen & nulls).sum()) / max(1, found[-1]))
    return tensor(shares), tensor(found)


@pytest.mark.slow
@pytest.mark.parametrize("step", [0.0, 1.0])
@pytest.mark.parametrize("null_share", [0.2, 0.5, 0.9, 1.0])
def test_the_false_discovery_rate_is_at_most_what_was_asked(null_share, step):
    """The mean share of false ones is at most the share of true nulls times 10 %, up to three standard errors."""
    shares, found = simulated(null_share, step)
    error = float(shares.std()) / math.sqrt(len(shares))
    assert float(shares.mean()) <= 0.1 * null_share + 3 * error
    if null_share <= 0.5 and not step:
        assert float(found.mean()) > 20  # so it can fail


def test_without_a_correction_the_simulation_would_fail():
    generator = torch.Generator().manual_seed(0)
    any_found = sum(
        bool((MF.conformal_p_values(*torch.randn(2, 100, generator=generator)) <= 0.1).any()) for _ in range(100)
    )
    assert any_found > 50


def test_the_exposure_of_nothing_is_about_one_over_ln_2():
    generator = torch.Generator().manual_seed(0)
    found = MF.exposure(torch.randn(100_000, generator=generator), torch.randn(1000, generator=generator))
    assert float(found.mean()) == pytest.approx(1 / math.log(2), abs=0.1)
    assert float(found.max()) <= math.log2(1001)
    assert float(found.min()) == 0


def test_the_fewest_nulls_are_those_that_can_show_it():
    for fdr in (0.01, 0.05, 0.1, 0.3, 0.5):
        n = fewest_nulls(fdr)
        p = MF.conformal_p_values(tensor([1.0]), torch.zeros(n))
        assert float(p) <= fdr + 1e-12
        assert 1 / n > fdr


@pytest.mark.parametrize(
    ("function", "given", "error"),
    [
        (MF.conformal_p_values, ([1.0], tensor([0.0])), TypeError),
        (MF.conformal_p_values, (tensor([1.0]), tensor([])), ValueError),
        (MF.conformal_p_values, (tensor([math.nan]), tensor([0.0])), ValueError),
        (MF.exposure, (tensor([1.0]), tensor([[0.0]])), ValueError),
        (MF.exposure, (tensor([1.0]), tensor([math.nan])), ValueError),
        (MF.benjamini_hochberg, ([0.5],), TypeError),
        (MF.benjamini_hochberg, (tensor([1.5]),), ValueError),
        (MF.holm, (tensor([math.nan]),), ValueError),
        (fewest_nulls, (0.0,), ValueError),
    ],
)
def test_bad_input_raises(function, given, error):
    with pytest.raises(error):
        function(*given)


def test_nothing_to_test_gives_nothing():
    for function in (MF.benjamini_hochberg, MF.holm):
        assert function(tensor([])).tolist() == []
    assert MF.conformal_p_values(tensor([]), tensor([0.0])).tolist() == []
