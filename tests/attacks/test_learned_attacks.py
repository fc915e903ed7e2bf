"""The attacks that train a network: against their formulas, on features that a population lacks, and their cost."""

from dataclasses import replace

import pytest
import torch

from lightning_cwrf.attacks import create_attack, learned, neural_attack, quantile_regression
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.shadows import balanced_membership
from tests.attacks.test_more_attacks import evidence
from tests.oracles import learned as oracles


@pytest.mark.parametrize(("n", "outputs"), [(40, 50_000), (300, 700), (300, 1200)])
def test_the_neural_attack_against_its_formulas(n, outputs):
    seen, _ = evidence(n=n, k=4, m=30)
    logits, shadow_logits = seen.logits * 4, seen.shadow_logits * 4
    shadow_logits[:, 0, 0] -= 100  # a log-probability below -50
    if 4 * n <= outputs:
        places = range(4 * n)
    else:
        places = torch.randint(4 * n, (outputs,), generator=torch.Generator().manual_seed(7)).tolist()
    drawn = [divmod(place, n) for place in places]
    settings = {"hidden": 5, "epochs": 3, "seed": 7}
    expected = oracles.neural(
        logits.tolist(), seen.targets.tolist(), shadow_logits.tolist(), seen.membership.tolist(), drawn, **settings
    )
    case = logits, seen.targets, shadow_logits, seen.membership
    torch.testing.assert_close(neural_attack(*case, **settings, outputs=outputs), expected, rtol=1e-3, atol=1e-4)


def test_as_many_outputs_as_there_are_are_taken_once_each():
    membership = balanced_membership(4, 10)
    models, examples = learned._drawn(membership, 40, 0)
    assert list(zip(models.tolist(), examples.tolist(), strict=True)) == [(j, i) for j in range(4) for i in range(10)]
    models, examples = learned._drawn(membership, 39, 0)
    assert len(models) == len(examples) == 39
    assert (models < 4).all()
    assert (examples < 10).all()
    assert not torch.equal(models, learned._drawn(membership, 39, 1)[0])


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


def test_a_spread_that_the_network_cannot_bound_is_bounded():
    """A signal that is constant in the population: the network would make its spread as small as it can."""
    x = torch.rand(50, 2)
    scores = quantile_regression(torch.tensor([2.0, 3.0]), x[:2], torch.full((50,), 2.0), x, epochs=200)
    assert torch.isfinite(scores).all()
    assert float(scores[1] - scores[0]) == pytest.approx(1e6 * torch.tensor(5.0).exp().item(), rel=0.5)


def test_a_pixel_that_is_constant_in_the_population_says_nothing():
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


def test_a_feature_beyond_the_population_counts_as_the_nearest_that_was_seen():
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


def test_what_no_shadow_model_says_counts_as_the_nearest_that_one_says():
    """The shadow models give every class the same; the audited model is sure."""
    shadow_logits, membership = torch.zeros(4, 6, 3), balanced_membership(4, 6)
    targets = torch.arange(6) % 3
    sure = neural_attack(torch.eye(3)[targets] * 9, targets, shadow_logits, membership, epochs=2)
    assert torch.equal(sure, neural_attack(torch.zeros(6, 3), targets, shadow_logits, membership, epochs=2))


def test_a_class_that_the_population_lacks_is_refused_with_counts():
    seen, is_member = evidence(n=400, m=200)
    assert float(membership_auroc(create_attack("quantile_regression")(seen), is_member)) > 0.55
    lost = replace(seen, population_targets=seen.population_targets.clamp(max=2))
    count = int((seen.targets == 3).sum())
    message = rf"no example of the classes \[3\], which {count} of the 400 .* Add examples .* the population of 200"
    with pytest.raises(ValueError, match=message):
        create_attack("quantile_regression")(lost)
    without = replace(lost, targets=seen.targets.clamp(max=2))  # nor is anything of that class audited
    assert torch.isfinite(create_attack("quantile_regression", epochs=1)(without)).all()
    wide = replace(seen, population_logits=torch.randn(200, 5))
    with pytest.raises(ValueError, match="the population's logits are of 5 classes, the examples' of 4"):
        create_attack("quantile_regression")(wide)


def test_what_is_learned_from_is_bounded(monkeypatch):
    """At most 64 steps an epoch and so many outputs, however many there are."""
    sizes = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: sizes.append(1) or step(self, *a))
    seen, _ = evidence(n=3000, k=16, m=30)
    create_attack("neural", epochs=2)(seen)  # 48,000 outputs
    assert len(sizes) == 2 * 64
    sizes.clear()
    create_attack("neural", epochs=2, outputs=600)(seen)
    assert len(sizes) == 2 * 3
    sizes.clear()
    inputs = torch.rand(16_385, 2)
    quantile_regression(inputs[:5, 0], inputs[:5], inputs[:, 0], inputs, epochs=1)
    assert len(sizes) == 64
    sizes.clear()
    quantile_regression(inputs[:5, 0], inputs[:5], inputs[:512, 0], inputs[:512], epochs=1)
    assert len(sizes) == 2


def test_few_outputs_tell_as_much_as_all():
    """10,000 of the 64,000 outputs: the AUC is within noise of that of all of them."""
    seen, is_member = evidence(n=4000, k=16, m=30, classes=10)
    auc = {
        outputs: float(membership_auroc(create_attack("neural", outputs=outputs, epochs=8)(seen), is_member))
        for outputs in (10_000, 64_000)
    }
    assert auc[10_000] > auc[64_000] - 0.01 > 0.8, auc


def test_the_callers_random_state_and_the_seed():
    seen, _ = evidence(n=40, k=4, m=30)
    for name in ("neural", "quantile_regression"):
        state = torch.get_rng_state()
        scores = create_attack(name, epochs=2)(seen)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(create_attack(name, epochs=2)(seen), scores)
        assert not torch.equal(create_attack(name, epochs=2, seed=1)(seen), scores)
