"""Quantile regression: against its formulas, and on features and classes that the population lacks."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_cwrf.attacks import (
    create_attack,
    quantile_regression,
)
from lightning_cwrf.attacks.network import fit_predict
from lightning_cwrf.attacks.quantile_regression import conformal_score
from lightning_cwrf.metrics.functional import membership_auroc
from tests.attacks.cases import evidence
from tests.oracles import learned as oracles


@pytest.mark.parametrize("m", [30, 600])
def test_quantile_regression_against_its_formulas(m):
    torch.manual_seed(0)
    population, signal = torch.rand(m, 3), torch.randn(m, dtype=torch.float64) * 3 + 1
    inputs = torch.rand(20, 3) * 3 - 1  # also beyond what was learned from
    asked = torch.randn(20, dtype=torch.float64)
    settings = {"hidden": 4, "epochs": 3, "seed": 5}
    expected = oracles.quantile_regression(asked, inputs, signal, population, **settings)
    scores = quantile_regression(asked, inputs, signal, population, **settings)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("value", [2.0, 0.0, 1e12])
def test_scores_lie_between_0_and_1_and_tell_examples_apart_where_the_signal_is_constant(value):
    """In the population, that is: the network would make its spread as small as it can."""
    x = torch.rand(50, 2)
    asked = torch.tensor([value - 1, value + 1, value + 5], dtype=torch.float64)
    scores = quantile_regression(asked, x[:3], torch.full((50,), value, dtype=torch.float64), x, epochs=200)
    assert 0 < float(scores[0]) < float(scores[1]) < float(scores[2]) < 1


def world(seed, m, n, d=20):
    """Signals whose spread depends on the first feature; the other d − 1 mean nothing and can be learned by heart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(m + n, d, generator=generator)
    y = x[:, 0] * 3 + (0.2 + 2 * x[:, 0]) * torch.randn(m + n, generator=generator) ** 3
    return y[m:].double(), x[m:], y[:m].double(), x[:m]


@pytest.mark.slow
def test_the_actual_false_positive_rate_is_the_nominal_one():
    """Over 60 populations, from each of which 99 examples calibrate, with 1,000 fresh non-members each.

    In one population the rate is Beta(j, 100 − j) distributed at the nominal rate f = j / 100, so the band of the mean
    over 60 follows. The residuals are far from normal: by the normal distribution's quantiles, rates would be others.
    """
    worlds, fresh, c = 60, 1000, 99
    scores = torch.stack(
        [quantile_regression(*world(seed, 396, fresh), epochs=30, seed=seed) for seed in range(worlds)]
    )
    for f in (0.01, 0.05, 0.2, 0.5):
        rates = (scores >= 1 - f).double().mean(1)
        j = f * (c + 1)
        spread = math.sqrt(f * (1 - f) / (c + 2) + f * (1 - f) / fresh)  # of Beta(j, c + 1 - j), and of the count
        assert abs(float(rates.mean()) - f) < 3 * spread / math.sqrt(worlds), (f, float(rates.mean()))
        held = [stats.betabinom.cdf(round(fresh * r), fresh, j, c + 1 - j) for r in rates.tolist()]
        assert stats.kstest(held, "uniform").pvalue > 1e-3


@given(st.integers(0, 9999), st.integers(1, 30), st.booleans())
def test_conformal_scores_are_p_values_turned_around(seed, c, ties):
    torch.manual_seed(seed)
    calibration, residuals = torch.randn(c).double(), torch.randn(20).double() * 3
    if ties:
        calibration, residuals = calibration.round(), residuals.round()
    scores = conformal_score(residuals, calibration)
    for score, r in zip(scores.tolist(), residuals.tolist(), strict=True):
        p = (1 + sum(other >= r for other in calibration.tolist())) / (c + 1)
        for j in range(1, c + 1):
            assert (score >= 1 - j / (c + 1) + 1e-12) == (p <= j / (c + 1))
    assert torch.equal(scores.argsort(stable=True), residuals.argsort(stable=True))


@pytest.mark.slow
def test_the_network_is_that_of_the_best_epoch_on_held_out_data():
    """Far more epochs than are good change nothing: the likelihood of fresh data stays that of the best epoch."""

    def loss(predicted, y):
        location, log_scale = predicted.unbind(-1)
        return ((y - location).square() * torch.exp(-2 * log_scale) / 2 + log_scale).mean()

    _, _, y, x = world(0, 400, 1)
    y = y.float()
    asked, settings = x[200:], {"hidden": 64, "epochs": 200, "seed": 0}
    stopped = fit_predict(x[:100], y[:100], asked, 2, loss, **settings, held_out=(x[100:200], y[100:200]))
    last = fit_predict(x[:100], y[:100], asked, 2, loss, **settings)
    assert float(loss(stopped, y[200:])) < float(loss(last, y[200:])) - 0.5


@pytest.mark.slow
def test_a_feature_that_is_constant_in_the_population_has_no_effect():
    seen, is_member = evidence(n=400, m=300)
    for value in (0.0, 0.7):  # whose mean is not exact in float32
        edge, population_edge = torch.full((400, 3), value), torch.full((300, 3), value)
        plain = replace(
            seen,
            inputs=torch.cat([seen.inputs, edge], 1),
            population_inputs=torch.cat([seen.population_inputs, population_edge], 1),
        )
        edge = edge.clone()
        edge[::3] = torch.rand(134, 3) * 5
        differing = replace(plain, inputs=torch.cat([seen.inputs, edge], 1))
        scores = create_attack("quantile_regression")(differing)
        assert torch.equal(scores, create_attack("quantile_regression")(plain))
        assert 0 < float(scores.min()) < float(scores.max()) < 1
        assert float(membership_auroc(scores, is_member)) > 0.55


def test_features_are_clamped_to_the_range_of_the_population():
    torch.manual_seed(0)
    population, signal = torch.rand(40, 2), torch.randn(40)
    learned = population[torch.randperm(40, generator=torch.Generator().manual_seed(0))[:24]]
    least, most = learned.amin(0), learned.amax(0)
    beyond = torch.stack([least - 5, most + 5, torch.stack([least[0], most[1]]), most * 1e6])
    nearest = torch.stack([least, most, torch.stack([least[0], most[1]]), most])
    asked = torch.randn(4)
    case = asked, beyond, signal, population
    assert torch.equal(
        quantile_regression(*case, epochs=3), quantile_regression(asked, nearest, signal, population, epochs=3)
    )


def test_a_class_missing_from_the_population_raises_with_counts():
    seen, is_member = evidence(n=400, m=200)
    assert float(membership_auroc(create_attack("quantile_regression")(seen), is_member)) > 0.55
    lacking = replace(seen, population_targets=seen.population_targets.clamp(max=2))
    count = int((seen.targets == 3).sum())
    message = rf"no example of the classes \[3\], to which {count} of the 400 .* Add some to the population of 200"
    with pytest.raises(ValueError, match=message):
        create_attack("quantile_regression")(lacking)
    without = replace(lacking, targets=seen.targets.clamp(max=2))  # nor is anything of that class audited
    assert torch.isfinite(create_attack("quantile_regression", epochs=1)(without)).all()
    wide = replace(seen, population_logits=torch.randn(200, 5))
    with pytest.raises(ValueError, match="the population's logits have 5 classes, those of the examples 4"):
        create_attack("quantile_regression")(wide)


def test_ten_population_points_are_enough():
    x = torch.rand(10, 2)
    assert quantile_regression(torch.rand(3), x[:3], torch.rand(10), x, epochs=1).shape == (3,)
    with pytest.raises(ValueError, match="at least 10 examples, not 9"):
        quantile_regression(torch.rand(3), x[:3], torch.rand(9), x[:9])
