"""The risk of each example over repeated trainings: by hand, on degenerate input, and how often intervals hold."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from lightning_cwrf import example_risk
from lightning_cwrf.metrics.functional import membership_auroc, tpr_at_fpr
from lightning_cwrf.metrics.functional.discoveries import rank_sum_p_values, signed_rank_p_values
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership
from tests.helpers import load_benchmark
from tests.oracles.discoveries import rank_sum, signed_rank

benchmark = load_benchmark("single_examples")


def models(separation, k, n, seed=0, step=0.0, correlation=0.0):
    """Models whose signal of each example is N(separation, 1) with it and N(0, 1) without it; one logit.

    The two models of a pair, which have opposite halves of the pool, have this ``correlation``.
    """
    generator = torch.Generator().manual_seed(seed)
    membership = balanced_membership(k, n, seed)
    first, own = torch.randn(2, k // 2, n, generator=generator)
    second = correlation * first + math.sqrt(1 - correlation**2) * own
    z = torch.stack([first, second], 1).reshape(k, n) + separation * membership
    z = step * (z / step).round() if step else z
    return ShadowOutputs.from_arrays(z, membership, torch.ones(n, dtype=torch.long))


@pytest.mark.slow
@given(st.integers(0, 10_000), st.integers(2, 7), st.booleans(), st.booleans())
def test_each_example_is_a_small_audit(seed, k, ties, paired):
    """AUC and TPR of each column by the functions of an audit, and every order, or sign, of the tests."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(k, 4, generator=generator)
    z = z.round() if ties else z
    membership = torch.rand(k, 4, generator=generator) < 0.5
    membership[0], membership[1] = True, False
    if paired and k % 2 == 0:
        membership[1::2] = ~membership[::2]
    found = example_risk(ShadowOutputs.from_arrays(z, membership, [1, 1, 1, 1]), fpr=0.5)
    for j in range(4):
        scores, inside = z[:, j], membership[:, j]
        assert float(found.auroc[j]) == pytest.approx(float(membership_auroc(scores, inside)))
        assert float(found.tpr[j]) == pytest.approx(float(tpr_at_fpr(scores, inside, 0.5)))
        expected = rank_sum(scores.tolist(), inside.tolist())
        if k % 2 == 0 and torch.equal(membership[::2], ~membership[1::2]):
            gaps = [a - b if first else b - a for (a, b), first in zip(scores.view(-1, 2), inside[::2], strict=True)]
            expected = signed_rank([float(gap) for gap in gaps])
        assert float(found.p_values[j]) == pytest.approx(expected)
        assert (int(found.models_in[j]), int(found.models_out[j])) == (int(inside.sum()), int((~inside).sum()))
    assert (found.auroc_low <= found.auroc).all()
    assert (found.auroc <= found.auroc_high).all()


@pytest.mark.parametrize("members", [1, 20, 32])
def test_rank_sums_are_those_of_scipy(members):
    generator = torch.Generator().manual_seed(members)
    scores, inside = torch.randn(10, 64, generator=generator), (torch.arange(64) < members).expand(10, 64)
    scores[:5, :members] += 1.5
    samples = [(s[:members], s[members:]) for s in scores.tolist()]
    expected = [stats.mannwhitneyu(*each, alternative="greater", method="exact").pvalue for each in samples]
    assert rank_sum_p_values(scores, inside).tolist() == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_signed_ranks_by_every_sign(differences):
    found = signed_rank_p_values(torch.tensor([differences], dtype=torch.float64))
    assert float(found) == pytest.approx(signed_rank(differences))


def test_signed_ranks_are_those_of_scipy():
    differences = torch.randn(20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    expected = stats.wilcoxon(differences.numpy(), axis=1, alternative="greater", method="exact").pvalue
    assert signed_rank_p_values(differences).tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("correlation", [0.0, -0.85])
@pytest.mark.parametrize("k", [8, 16, 64])
@pytest.mark.parametrize("separation", [0.0, 1.0, 3.5])
def test_intervals_hold_for_each_example(separation, k, correlation):
    """Also where the two models of a pair depend on each other, as two halves of a pool do."""
    found = example_risk(models(separation, k, 1000, seed=k, correlation=correlation))
    truth, tpr = special.ndtr(separation / math.sqrt(2)), special.ndtr(separation + special.ndtri(0.1))
    least = stats.binom.ppf(0.001, 1000, 0.94)
    for low, high, true in ((found.auroc_low, found.auroc_high, truth), (found.tpr_low, found.tpr_high, tpr)):
        assert int(((low <= true) & (true <= high)).sum()) >= least
    if correlation == 0:  # else one in k / 2 comparisons is within a pair
        error = 4 * float(found.auroc.std()) / math.sqrt(1000) + 1e-3
        assert float(found.auroc.mean()) == pytest.approx(truth, abs=error)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "correlation"), [(0.0, 0.0), (1.0, 0.0), (0.0, -0.85), (0.0, 0.85)])
def test_without_a_signal_hardly_anybody_is_at_risk(step, correlation):
    """P-values up to 5 % in at most 5 % of examples, and any discovery in at most 5 % of 60 pools of 50."""
    p_values = example_risk(models(0.0, 16, 4000, seed=1, step=step, correlation=correlation)).p_values
    for level in (0.01, 0.05):
        assert int((p_values <= level).sum()) <= stats.binom.ppf(0.999, 4000, level)
    pools = (models(0.0, 32, 50, seed=s, step=step, correlation=correlation) for s in range(60))
    found = sum(len(example_risk(pool).at_risk()) > 0 for pool in pools)
    assert found <= stats.binom.ppf(0.999, 60, 0.05)


def test_the_one_example_that_leaks_is_named():
    shadows = models(0.0, 32, 50, seed=3)
    shadows.logits[:, 17, 1] += 4.0 * shadows.membership[:, 17]
    found = example_risk(shadows)
    assert found.at_risk(0.01).tolist() == [17]
    lines = str(found).splitlines()
    assert lines[0] == "50 examples; at least 16 to 16 models with and without each."
    assert "1 examples can be told" in lines[2]
    assert lines[5].startswith("17 ")
    frame = found.to_pandas()
    assert frame.auroc.idxmax() == 17
    assert len(frame) == len(found) == 50
    assert {"tpr_low", "p_values", "models_in", "targets"} < set(frame.columns)


def test_a_pool_of_one_is_the_specific_setup():
    """Trainings on one data set with and without one record: every other example is the same in all.

    Where models with and without it alternate, they may be those of two halves, and count as pairs.
    """
    inside = torch.arange(20) < 10
    z = torch.randn(20, 1, generator=torch.Generator().manual_seed(0)) + 5.0 * inside[:, None]
    found = example_risk(ShadowOutputs.from_arrays(z, inside[:, None], [1]))
    assert float(found.auroc) == 1
    assert float(found.p_values) == pytest.approx(1 / math.comb(20, 10))
    order = torch.arange(20).view(2, 10).T.flatten()
    found = example_risk(ShadowOutputs.from_arrays(z[order], inside[order, None], [1]))
    assert float(found.p_values) == pytest.approx(2**-10)


def test_a_part_of_a_pool_keeps_its_pairs_and_too_few_models_are_said():
    membership, targets = balanced_membership(8, 24), torch.arange(24) % 2
    logits = torch.nn.functional.one_hot(targets, 2) * (membership[..., None] + torch.rand(8, 24, 1))
    whole = ShadowOutputs.from_arrays(logits, membership, targets)
    risk, one = example_risk(whole), example_risk(whole.part(torch.tensor([5])))
    assert float(one.p_values) == float(risk.p_values[5]) == 2**-4
    assert "With 8 models no p-value is below 0.062, so none could be: train more of them." in str(risk)


def test_other_signals_and_settings():
    shadows = models(2.0, 16, 20)

    def negative(logits, targets):
        return -logits[..., 1].double()

    opposite = example_risk(shadows, signal=negative)
    torch.testing.assert_close(opposite.auroc, 1 - example_risk(shadows).auroc)
    narrow, wide = (example_risk(shadows, confidence=c) for c in (0.5, 0.99))
    assert (wide.auroc_high - wide.auroc_low >= narrow.auroc_high - narrow.auroc_low).all()


ALL = torch.tensor([[True, True], [False, True]])


@pytest.mark.parametrize(
    ("given", "settings", "error", "message"),
    [
        (None, {}, TypeError, "train_shadows"),
        ([1.0], {}, TypeError, "train_shadows"),
        (ShadowOutputs.from_arrays(torch.randn(2, 2), ALL, [1, 1]), {}, ValueError, r"1 examples \(first \[1\]\)"),
        (models(0.0, 4, 4), {"fpr": 0}, ValueError, "fpr"),
        (models(0.0, 4, 4), {"confidence": 1.0}, ValueError, "confidence"),
        (models(0.0, 4, 4), {"signal": lambda z, y: z[..., 0] * math.nan}, ValueError, "NaN"),
    ],
)
def test_bad_input_raises(given, settings, error, message):
    with pytest.raises(error, match=message):
        example_risk(given, **settings)


def test_halves_that_are_not_beside_each_other_raise():
    """They would count as independent."""
    shadows = models(0.0, 8, 40)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    mixed = ShadowOutputs.from_arrays(shadows.logits[order], shadows.membership[order], shadows.targets)
    with pytest.raises(ValueError, match="models 0 and 4 are of two halves of the pool"):
        example_risk(mixed)
    one_of_each = ShadowOutputs.from_arrays(shadows.logits[::2], shadows.membership[::2], shadows.targets)
    chosen = (one_of_each.membership.any(0) & ~one_of_each.membership.all(0)).nonzero().flatten()
    assert len(example_risk(one_of_each.part(chosen))) == len(chosen)


def test_a_rate_of_false_discoveries_is_checked():
    with pytest.raises(ValueError, match="fdr"):
        example_risk(models(0.0, 4, 4)).at_risk(1.0)


def test_left_out_models_bias_lira_of_one_example_and_not_this():
    """Without a signal, LiRA's AUC over models of one example is below 1/2; docs/numbers.md has more."""
    of_targets, of_examples, of_signals = torch.tensor(
        [benchmark.attacked(16, "the pair left out", seed) for seed in range(8)]
    ).T
    assert float(of_targets.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(of_examples.mean()) < 0.48
    assert float(of_signals.mean()) == pytest.approx(0.5, abs=0.02)


def test_a_pool_halves_the_variance_of_what_is_drawn_from_it():
    spread = {}
    for factor in (2, None):
        drawn = [benchmark.draw(factor, torch.Generator().manual_seed(run)) for run in range(5)]
        spread[factor] = sum(float(s[:, j][~m[:, j]].var()) for s, m in drawn for j in range(benchmark.AUDITED))
    # 90 others, corrected by a half, and 19 audited examples, each in by the toss of a coin.
    assert spread[2] / spread[None] == pytest.approx((45 + 19 / 4) / (90 + 19 / 4), rel=0.1)
