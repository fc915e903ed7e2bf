"""Quantile regression: against its formulas, and on features and classes that the population lacks."""

from dataclasses import replace

import pytest
import torch

from lightning_cwrf.attacks import (
    create_attack,
    quantile_regression,
)
from lightning_cwrf.metrics.functional import membership_auroc
from tests.attacks.cases import evidence
from tests.oracles import learned as oracles


@pytest.mark.parametrize("m", [30, 600])
def test_quantile_regression_against_its_formulas(m):
    torch.manual_seed(0)
    population, signal = torch.rand(m, 3), torch.randn(m, dtype=torch.float64) * 3 + 1
    inputs = population[:20] * 0.5 + population[1:21] * 0.5
    asked = torch.randn(20, dtype=torch.float64)
    settings = {"hidden": 4, "epochs": 3, "seed": 5}
    expected = oracles.quantile_regression(asked, inputs, signal, population, **settings)
    scores = quantile_regression(asked, inputs, signal, population, **settings)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-4)


def test_the_spread_is_bounded_for_a_constant_signal():
    """A signal that is constant in the population: the network would make its spread as small as it can."""
    x = torch.rand(50, 2)
    scores = quantile_regression(torch.tensor([2.0, 3.0]), x[:2], torch.full((50,), 2.0), x, epochs=200)
    assert torch.isfinite(scores).all()
    assert float(scores[1] - scores[0]) == pytest.approx(1e6 * torch.tensor(5.0).exp().item(), rel=0.5)


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
        assert float(scores.abs().max()) < 1e3
        assert float(membership_auroc(scores, is_member)) > 0.55


def test_features_are_clamped_to_the_range_of_the_population():
    torch.manual_seed(0)
    population, signal = torch.rand(40, 2), torch.randn(40)
    least, most = population.amin(0), population.amax(0)
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
