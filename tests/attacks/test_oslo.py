"""OSLO, against loops over one example at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from lightning_cwrf.attacks import oslo
from tests.attacks.cases import seeds
from tests.attacks.label_only import DATA, LINEAR, label_of, problem
from tests.oracles import label_only as oracle


@pytest.mark.filterwarnings("ignore:.*would be so by chance")  # models that have learned different things
@settings(max_examples=10, deadline=None)
@given(seeds, st.sampled_from([0.0, 1.0]), st.sampled_from([1, 2]))
def test_oslo_against_loops(seed, momentum, validation):
    model, x, y = problem(seed, n=5)
    surrogates = [problem(seed + 1 + i)[0] for i in range(5)]
    membership = torch.zeros(5, 5, dtype=torch.bool)
    membership[0, 1] = membership[4, 2] = True
    given_settings = {"largest": 2.0, "stages": 6, "steps": 2, "momentum": momentum}
    thresholds = (0.05, 0.4)
    found = oslo(
        model, TensorDataset(x, y), surrogates, membership,
        thresholds=thresholds, validation=validation, clip=(-3.5, 3.5), **given_settings,
    )  # fmt: skip
    for i in range(5):
        models = [
            (each.weight.tolist(), each.bias.tolist())
            for each, inside in zip(surrogates, membership[:, i].tolist(), strict=True)
            if not inside
        ]
        wanted = oracle.oslo(
            label_of(model), x[i].tolist(), int(y[i]), models[:-validation], models[-validation:],
            thresholds=thresholds, low=-3.5, high=3.5, **given_settings,
        )  # fmt: skip
        assert found.survived[:, i].tolist() == [survived for survived, _ in wanted]
        assert found.sizes[:, i].tolist() == pytest.approx([size for _, size in wanted], rel=1e-5, abs=1e-9)
    assert torch.equal(found.scores, found.survived.double().mean(0))


def test_a_perturbation_that_reaches_the_largest_size_is_used_as_it_is():
    model, x, y = problem(0)
    found = oslo(model, TensorDataset(x, y), [model] * 4, largest=1e-3, clip=(-5, 5))
    assert found.sizes[0].tolist() == pytest.approx([1e-3] * len(x), rel=1e-6)


def test_what_oslo_found_is_in_the_order_of_the_thresholds():
    model, x, y = problem(2, n=30)
    data, surrogates = TensorDataset(x, y), [problem(2)[0] for _ in range(4)]
    thresholds = (0.05, 0.6, 0.2)
    found = oslo(model, data, surrogates, thresholds=thresholds, clip=(-5, 5))
    assert found.thresholds == thresholds
    for threshold, survived, sizes in zip(thresholds, found.survived, found.sizes, strict=True):
        alone = oslo(model, data, surrogates, thresholds=[threshold], clip=(-5, 5))
        assert torch.equal(alone.survived[0], survived)
        assert torch.equal(alone.sizes[0], sizes)
    assert (found.sizes[0] >= found.sizes[2]).all()
    assert float(found.sizes[2].mean()) > float(found.sizes[1].mean())


def test_oslo_runs_in_inference_mode():
    model, x, y = problem(2)
    data, surrogates = TensorDataset(x, y), [problem(seed)[0] for seed in (3, 4, 5, 6)]
    outside = oslo(model, data, surrogates)
    with torch.inference_mode():
        inside = oslo(model, data, surrogates)
        made_inside = [problem(seed)[0] for seed in (3, 4, 5, 6)]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(outside, inside, strict=True))
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode, so that it has no gradients"):
        oslo(model, data, made_inside)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"surrogates": LINEAR}, TypeError, "surrogates must be a list of modules"),
        ({"surrogates": (each for each in [LINEAR] * 4)}, TypeError, "surrogates must be a list of modules"),
        ({"surrogates": [*[LINEAR] * 3, problem(7, classes=4)[0]]}, ValueError, "the surrogates have 3 and 4 classes"),
        ({"surrogates": [problem(7, classes=4)[0]] * 4}, ValueError, "model has 3 classes and the surrogates have 4"),
        ({"thresholds": (each for each in [0.5])}, TypeError, "thresholds must be a list of probabilities"),
        ({"surrogates": []}, ValueError, "has 0 surrogates that were not trained on it"),
        ({"surrogates": [LINEAR] * 3}, ValueError, "has 3 surrogates .* needs 4 at least"),
        ({"membership": torch.ones(4, 7).bool()}, ValueError, r"membership must be bool of shape \(4, 8\)"),
        ({"membership": torch.eye(4, 8).bool()}, ValueError, "has 3 surrogates"),
        ({"thresholds": 0.5}, TypeError, "thresholds must be a list of probabilities"),
        ({"thresholds": (1.0,)}, ValueError, "each threshold must be a number in"),
        ({"validation": 0}, ValueError, "validation must be an integer of at least 1"),
        ({"stages": 0}, ValueError, "stages must be an integer of at least 1"),
        ({"momentum": -1}, ValueError, "momentum must be a number of at least 0"),
        ({"largest": 0}, ValueError, "largest must be a number above 0"),
    ],
)
def test_wrong_uses_of_oslo(change, error, message):
    given_arguments = {"surrogates": [LINEAR] * 4, **change}
    with pytest.raises(error, match=message):
        oslo(LINEAR, DATA, given_arguments.pop("surrogates"), **given_arguments)
