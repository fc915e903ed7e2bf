"""Constants and corners of the attacks' formulas, by numbers that were worked out by hand or by slow loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_cwrf.attacks import (
    attack_p,
    attack_r,
    augmentation_attack,
    bavaria,
    calibrated,
    entropy,
    example_losses,
    lira,
    logit_signal,
    modified_entropy,
    quantile_regression,
    rmia,
    true_class_probability,
    tune_offline_a,
)
from lightning_cwrf.attacks.augmentation import default_views
from lightning_cwrf.attacks.bavaria import _log_t_cdf
from lightning_cwrf.attacks.signals import check_coverage, check_finite, check_targets
from lightning_cwrf.shadows import balanced_membership
from tests.oracles import formulas

F64 = torch.float64
seeds = st.integers(0, 9999)


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def test_lira_by_hand():
    """IN models say 3 and 5, OUT models 0 and 2: means 4 and 1, variances 2 and 2; pooled with (1, 1), (0, 4)."""
    shadows = tensor([3, 1], [5, 1], [0, 0], [2, 4])
    membership = torch.tensor([[True, True]] * 2 + [[False, False]] * 2)
    target = tensor(2, 1)
    own = lira(target, shadows, membership, variance="per_example")
    # Equal variances: ((x − μ_out)² − (x − μ_in)²) / 2σ².
    assert float(own[0]) == pytest.approx((1 - 4) / 4)
    # IN squares 2 + 0 over 2 degrees of freedom, OUT squares 2 + 8 over 2.
    pooled = lira(target, shadows, membership, variance="pooled")
    expected = [stats.norm.logpdf(2, 4, 1) - stats.norm.logpdf(2, 1, 5**0.5)]
    expected += [stats.norm.logpdf(1, 1, 1) - stats.norm.logpdf(1, 2, 5**0.5)]
    assert pooled.tolist() == pytest.approx(expected, rel=1e-9)
    offline = lira(target, shadows, membership, online=False, variance="pooled")
    assert offline.tolist() == pytest.approx([stats.norm.logcdf(1 / 5**0.5), stats.norm.logcdf(-1 / 5**0.5)])
    assert torch.equal(lira(target, shadows, membership), pooled)


def test_offline_lira_trusts_an_examples_own_variance_by_its_out_models_alone():
    torch.manual_seed(0)
    shadows, target = torch.randn(36, 5), torch.randn(5)
    for out, same_as in ((32, "per_example"), (31, "pooled")):
        membership = (torch.arange(36) >= out)[:, None].expand(36, 5)
        case = target, shadows, membership
        assert torch.equal(lira(*case, online=False), lira(*case, online=False, variance=same_as))
        assert not torch.equal(
            lira(*case, online=False),
            lira(*case, online=False, variance="pooled" if same_as == "per_example" else "per_example"),
        )
        assert torch.equal(lira(*case), lira(*case, variance="pooled"))  # 4 or 5 IN models


@pytest.mark.parametrize("variance", ["pooled", "per_example"])
def test_models_that_all_agree_do_not_divide_by_zero(variance):
    shadows, membership = torch.ones(4, 1), torch.tensor([[True], [True], [False], [False]])
    scores = [
        float(lira(tensor(1 + d), shadows, membership, online=False, variance=variance)) for d in (0, 1e-6, -2e-6)
    ]
    assert scores == pytest.approx([stats.norm.logcdf(z) for z in (0, 1, -2)], rel=1e-6)
    assert float(lira(tensor(7), shadows, membership, variance=variance)) == 0
    assert float(lira(tensor(1), shadows, membership, online=False, variance="reference_code")) == pytest.approx(
        30 * math.log(10) * -1 + math.log(2 * math.pi) / 2
    )


def test_per_example_needs_two_and_pooled_one():
    shadows, target = torch.randn(3, 2), torch.randn(2)
    one_in = torch.tensor([[True, True], [False, False], [False, False]])
    with pytest.raises(ValueError, match="fewer than 2 IN"):
        lira(target, shadows, one_in, variance="per_example")
    assert lira(target, shadows, one_in, variance="per_example", online=False).shape == (2,)
    some = torch.tensor([[True, False], [False, True], [False, False]])
    with pytest.raises(ValueError, match="pooled variance needs"):
        lira(target, shadows, some)
    assert lira(target, torch.randn(4, 2), torch.tensor([[1, 1], [1, 0], [0, 0], [0, 0]]) > 0).shape == (2,)


@given(st.floats(-8, 8), st.floats(1.5, 60))
@settings(max_examples=60)
def test_students_distribution_function_is_hills(t, nu):
    if t == 0:
        t = 1e-3
    ours = float(_log_t_cdf(tensor(t), tensor(nu)))
    assert ours == pytest.approx(formulas.log_t_cdf(t, nu), rel=1e-7, abs=1e-9)
    if nu >= 2.5 and t > -5:
        assert ours == pytest.approx(stats.t.logcdf(t, nu), abs=0.004)


def test_students_distribution_function_at_zero():
    assert float(_log_t_cdf(tensor(0.0), tensor(4.0))) == pytest.approx(math.log(0.5))


def test_bavaria_of_one_example_and_of_models_that_agree():
    membership = torch.tensor([[True], [True], [False], [False]])
    shadows = tensor([3], [5], [0], [1])
    lists = [2.0], shadows.tolist(), membership.tolist()
    for predictive in ("t", "normal"):
        expected = formulas.bavaria(*lists, True, predictive, 2.0)
        # The prior's weight is enormous: nothing tells examples apart.
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
    expected = formulas.bavaria(target.tolist(), shadows.tolist(), membership.tolist(), True, predictive, 2.0)
    assert bavaria(target, shadows, membership, predictive=predictive).tolist() == pytest.approx(
        expected, rel=1e-6, abs=1e-7
    )


def test_rmia_by_hand():
    """Pr(x) = .5 and .4; ratios 1.6 and .5. The population's ratios are 1/2, 1 and 2."""
    shadows, membership = tensor([0.7, 0.2], [0.3, 0.6]), torch.tensor([[True, False], [False, True]])
    target = tensor(0.8, 0.2)
    population = tensor(0.2, 0.4, 0.8), tensor([0.4, 0.2, 0.3], [0.4, 0.6, 0.5])
    case = target, shadows, membership, *population
    # ratio(x) / ratio(z): 3.2, 1.6, .8 and 1, .5, .25.
    for gamma, shares in ((1.0, [2 / 3, 1 / 3]), (1.6, [2 / 3, 0]), (2.0, [1 / 3, 0]), (3.3, [0, 0])):
        found = rmia(*case, gamma=gamma, break_ties=False)
        assert found.tolist() == pytest.approx(shares)
        broken = [(3 * s + r / (1 + r)) / 4 for s, r in zip(shares, (1.6, 0.5), strict=True)]
        assert rmia(*case, gamma=gamma).tolist() == pytest.approx(broken)
    assert torch.equal(rmia(*case), rmia(*case, online=True, gamma=2.0, break_ties=True))
    # Offline with a = .3: Pr(x) = (1.3 · .3 + .7) / 2 and (1.3 · .2 + .7) / 2, Pr(z) = (1.3 · .4 + .7) / 2.
    ratios = [0.8 / 0.545, 0.2 / 0.48]
    others = [0.2 / 0.61, 0.4 / 0.61, 0.8 / 0.61]
    shares = [sum(r / z >= 2 for z in others) / 3 for r in ratios]
    offline = rmia(*case, online=False)
    assert offline.tolist() == pytest.approx([(3 * s + r / (1 + r)) / 4 for s, r in zip(shares, ratios, strict=True)])
    assert torch.equal(offline, rmia(*case, online=False, offline_a=0.3))


@pytest.mark.parametrize("name", ["target", "shadows", "population_target", "population_shadows"])
def test_probabilities_may_exceed_one_by_rounding_alone(name):
    case = {
        "target": torch.full((3,), 0.5, dtype=F64),
        "shadows": torch.full((2, 3), 0.5, dtype=F64),
        "membership": torch.tensor([[True] * 3, [False] * 3]),
        "population_target": torch.full((4,), 0.5, dtype=F64),
        "population_shadows": torch.full((2, 4), 0.5, dtype=F64),
    }
    for value, fine in ((1 + 5e-7, True), (0.0, True), (1 + 2e-6, False), (-1e-9, False)):
        spoiled = {**case, name: case[name].clone()}
        spoiled[name].view(-1)[2] = value  # of the first model
        if fine:
            rmia(**spoiled)
        else:
            with pytest.raises(ValueError, match=rf"{name} must hold probabilities; examples \[2\] lie outside"):
                rmia(**spoiled)


@given(seeds, st.sampled_from([1.0, 2.0]), st.sampled_from([1, 4]))
@settings(max_examples=10)
def test_offline_a_is_the_best_of_eleven(seed, gamma, models):
    torch.manual_seed(seed)
    membership = balanced_membership(6, 12, seed)
    shadows = (torch.randn(6, 12).double() + 2 * membership.double()).sigmoid()
    population = torch.randn(6, 9).double().sigmoid()
    found = tune_offline_a(shadows, membership, population, gamma=gamma, models=models)
    lists = shadows.tolist(), membership.tolist(), population.tolist()
    assert found == pytest.approx(formulas.tuned_offline_a(*lists, gamma, models))
    if gamma == 2.0 and models == 4:
        assert tune_offline_a(shadows, membership, population) == found


def test_attacks_p_and_r_by_hand():
    assert attack_p(tensor(1, 0, -0.5), tensor(1, 2, 0)).tolist() == pytest.approx([2.5 / 4, 4 / 4, 4 / 4])
    membership = torch.tensor([[False, True], [False, False], [True, False]])
    shadow_losses = tensor([1, 5], [3, 2], [9, 4])
    # OUT losses 1, 3 of the first and 2, 4 of the second.
    scores = attack_r(tensor(3, 1), shadow_losses, membership)
    expected = [(1 + 1 / (1 + math.exp(1))) / 3, (2 + 1 / (1 + math.exp(-2))) / 3]
    assert scores.tolist() == pytest.approx(expected)
    out_alone = torch.zeros(3, 2, dtype=torch.bool)
    assert attack_r(tensor(3, 1), shadow_losses, out_alone).shape == (2,)


@given(seeds, st.sampled_from([1, 4]))
@settings(max_examples=30)
def test_the_augmentation_attack_against_loops(seed, views):
    torch.manual_seed(seed)
    membership, correct = balanced_membership(4, 15, seed), torch.rand(views, 15) < 0.6
    shadows = torch.rand(views, 4, 15) < torch.where(membership, 0.8, 0.5)
    expected = formulas.augmentation(correct.tolist(), shadows.tolist(), membership.tolist())
    assert augmentation_attack(correct, shadows, membership).tolist() == pytest.approx(expected, rel=1e-12)
    shares = [sum(column) / views for column in zip(*correct.tolist(), strict=True)]
    assert augmentation_attack(correct).tolist() == pytest.approx(shares)


def test_the_views_are_the_image_small_rotations_and_moves_by_a_pixel():
    views = default_views()
    assert len(views) == 9
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = 1.0
    assert torch.equal(views[0](image), image)
    right, left, down, up = (view(image) for view in views[5:])
    for moved, place in ((right, (4, 5)), (left, (4, 3)), (down, (5, 4)), (up, (3, 4))):
        assert float(moved.sum()) == pytest.approx(1)
        assert float(moved[(0, 0, *place)]) == pytest.approx(1)
    assert [view(image)[0, 0, 3, 4] == 1 for view in default_views(pixels=2)[5:]] == [False] * 4
    bar = torch.zeros(1, 1, 21, 21)
    bar[0, 0, 10, :] = 1.0
    heights = [float((view(bar)[0, 0] * torch.arange(21.0)[:, None])[:, 18].sum()) for view in views[1:5]]
    angles = [math.degrees(math.atan((10 - h) / 8)) for h in heights]
    assert angles == pytest.approx([-8, -4, 4, 8], abs=1.2)
    assert len(default_views(degrees=(5,))) == 6
    for wrong in (torch.zeros(4, 4), torch.zeros(1, 1, 4, 4).long()):
        with pytest.raises(ValueError, match="the default views rotate and move images"):
            views[0](wrong)
    assert views[0](torch.zeros(2, 4, 4)).shape == (2, 4, 4)


def test_thresholds_per_class_by_hand():
    """Class 0: members 3, 4, others 1, 2, so 2.5. Class 1 has members alone, and takes the threshold of all."""
    shadows = tensor([3, 9, 1], [4, 7, 2])
    membership = torch.tensor([[True, True, False], [True, True, False]])
    targets = torch.tensor([0, 1, 0])
    scores = calibrated(tensor(3, 6, 2), targets, shadows, membership)
    assert scores.tolist() == [0.5, 3.5, -0.5]
    assert torch.equal(scores, calibrated(tensor(3, 6, 2), targets, shadows, membership, per_class=True))
    alone = torch.zeros(2, 3, dtype=torch.bool)
    alone[:, 1] = True
    # Classes 0 (all OUT) and 1 (all IN) have no threshold of their own: of 9, 7 against 3, 4, 1, 2 it is 5.5.
    assert calibrated(tensor(3, 6, 2), targets, shadows, alone).tolist() == [-2.5, 0.5, -3.5]


def test_a_threshold_that_accuses_fewest_and_one_that_accuses_nobody():
    targets = torch.zeros(4).long()
    membership = torch.tensor([[True, False, True, False]])
    # 4 is a member, 3 none, 2 a member, 1 none: above 3.5 and above 1.5 the gain is one half each.
    assert calibrated(tensor(0, 0, 0, 0), targets, tensor([4, 3, 2, 1]), membership).tolist() == [-3.5] * 4
    # Non-members score higher: one above the highest.
    assert calibrated(tensor(0, 0, 0, 0), targets, tensor([1, 4, 1, 4]), membership).tolist() == [-5.0] * 4
    # Everything ties: nothing is gained.
    assert calibrated(tensor(0, 0, 0, 0), targets, tensor([2, 2, 2, 2]), membership).tolist() == [-3.0] * 4
    # The members are the lowest in part; the best threshold is the smallest score: one half below it.
    both = torch.tensor([[True, True, True, False]])
    assert calibrated(tensor(0, 0, 0, 0), targets, tensor([4, 3, 2, 1]), both).tolist() == [-1.5] * 4


def test_modified_entropy_and_entropy_by_hand():
    p = [0.5, 0.25, 0.25]
    logits = torch.tensor([p, p], dtype=F64).log()
    by_label = []
    for y in (0, 1):
        value = -(1 - p[y]) * math.log(p[y])
        value -= sum(p[c] * math.log(1 - p[c]) for c in range(3) if c != y)
        by_label.append(-value)
    assert modified_entropy(logits, torch.tensor([0, 1])).tolist() == pytest.approx(by_label)
    assert entropy(logits).tolist() == pytest.approx([0.5 * math.log(0.5) + 0.5 * math.log(0.25)] * 2)
    sure = torch.tensor([[60.0, 0.0, 0.0]], dtype=F64)  # 1 − p is below what p can hold
    rest = 2 * math.exp(-60)
    expected = -(-rest * math.log1p(-rest)) + 2 * math.exp(-60) * math.log1p(-math.exp(-60))
    assert float(modified_entropy(sure, torch.tensor([0]))) == pytest.approx(expected, rel=1e-6, abs=1e-40)
    wrong = float(modified_entropy(sure, torch.tensor([1])))
    assert wrong == pytest.approx(-(60 + math.log1p(rest)) - (60 - math.log(2)), rel=1e-9)


def test_signals_of_one_example_do_not_see_the_others():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, 1.0]], dtype=F64)
    found = logit_signal(logits, torch.tensor([0, 2]))
    expected = [2 - math.log(math.e + 1), 1 - math.log(1 + math.exp(5))]
    assert found.tolist() == pytest.approx(expected)


def test_many_bad_examples_are_counted_and_ten_are_named():
    values = torch.zeros(2, 30)
    values[1, 5:16] = math.nan
    with pytest.raises(ValueError, match=r"x has NaN .* \[5, 6, 7, 8, 9, 10, 11, 12, 13, 14\], … \(11 in all\)"):
        check_finite("x", values)
    values[1, 15] = 0
    with pytest.raises(ValueError, match=r"examples \[5, 6, 7, 8, 9, 10, 11, 12, 13, 14\] \(10 in all\)"):
        check_finite("x", values)
    with pytest.raises(TypeError, match=r"x must be a tensor of numbers, not torch\.complex64"):
        check_finite("x", torch.zeros(1, dtype=torch.complex64))
    assert check_finite("x", torch.tensor([1, 2])).dtype == F64


def test_targets_are_checked_and_made_int64():
    logits = torch.zeros(2, 3, 4)
    assert check_targets(logits, torch.tensor([0, 3, 1], dtype=torch.int32)).dtype == torch.int64
    assert check_targets(torch.zeros(1, 2), torch.tensor([1])).tolist() == [1]
    for wrong in ([0, 1], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match=r"targets must have shape \(3,\)"):
            check_targets(logits, torch.tensor(wrong))
    with pytest.raises(ValueError, match="classes from 0 to 3"):
        check_targets(logits, torch.tensor([0, 4, 1]))


def test_coverage_counts_each_side():
    membership = torch.tensor([[True, False, True], [True, False, False], [False, True, False], [False, True, False]])
    check_coverage(membership, least_in=1, least_out=2)
    with pytest.raises(ValueError, match=r"1 examples \(first \[2\]\) have fewer than 2 IN .*2 IN and 1 OUT.*least 4"):
        check_coverage(membership, least_in=2, least_out=1)
    with pytest.raises(ValueError, match=r"2 examples \(first \[0, 1\]\) have fewer than 3 OUT .* at least 6 shadow"):
        check_coverage(membership, least_in=0, least_out=3)


def test_ten_population_points_are_enough():
    x = torch.rand(10, 2)
    assert quantile_regression(torch.rand(3), x[:3], torch.rand(10), x, epochs=1).shape == (3,)
    with pytest.raises(ValueError, match="at least 10 examples, not 9"):
        quantile_regression(torch.rand(3), x[:3], torch.rand(9), x[:9])


@pytest.mark.parametrize("signal", [logit_signal, true_class_probability, example_losses])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_signals_of_low_precision_are_computed_in_float64(signal, dtype):
    logits = (7 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.arange(40) % 5
    torch.testing.assert_close(signal(logits, targets), signal(logits.double(), targets), rtol=1e-14, atol=0)
