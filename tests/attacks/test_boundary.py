"""The boundary distance, against loops over one example at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf.attacks import boundary, boundary_distance, lira
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.outputs import collect_outputs
from tests.attacks.cases import seeds
from tests.attacks.label_only import DATA, INPUTS, LINEAR, TARGETS, label_of, problem
from tests.helpers import Classifier, loader, part, trainer
from tests.oracles import label_only as oracle


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model's labels are right for")  # of 8 examples
@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(2, 4), st.integers(1, 120))
def test_hop_skip_jump_against_loops(seed, d, budget):
    model, x, y = problem(seed, d=d)
    with torch.no_grad():
        own = model(x).argmax(1)
    if len(own.unique()) == 1:
        return
    found = boundary_distance(model, TensorDataset(x, y), budget=budget, evaluations=5, clip=(-5, 5), seed=seed)
    for i in range(1, len(x)):
        mixed = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
        own_noise = torch.Generator().manual_seed(mixed)

        def noise(t, generator=own_noise):  # asked for once in each iteration
            return torch.randn(int(5 * math.sqrt(t)), d, generator=generator, dtype=torch.float64).tolist()

        away = [float((x[i] - x[j]).norm()) if own[j] != own[i] else math.inf for j in range(len(x))]
        start = x[away.index(min(away))].tolist()
        distance, asked = oracle.hop_skip_jump(
            label_of(model), x[i].tolist(), start, noise,
            low=-5.0, high=5.0, budget=budget, searches=7,
        )  # fmt: skip
        assert float(found.scores[i]) == pytest.approx(distance, rel=1e-6)
        assert int(found.queries[i]) == asked
    assert found.scores[0] == 0
    assert found.queries[0] == 1


def test_it_comes_to_the_exact_distance_of_a_linear_model():
    torch.manual_seed(0)
    model, x = nn.Linear(10, 2), torch.randn(30, 10)
    with torch.no_grad():
        y = model(x).argmax(1)
        normal = model.weight[0] - model.weight[1]
        exact = (x @ normal + model.bias[0] - model.bias[1]).abs().double() / normal.norm()
    found = boundary_distance(model, TensorDataset(x, y), budget=4000, clip=(-20, 20))
    assert (found.scores >= exact - 1e-5).all()  # every distance is of a point that was found
    assert float((found.scores / exact).median()) < 1.01
    assert float((found.scores / exact).max()) < 1.1


def test_the_curve_is_what_smaller_budgets_give_and_never_rises():
    model, x, y = problem(1, n=12, d=6)
    data = TensorDataset(x, y)
    whole = boundary_distance(model, data, budget=300, curve=(1, 7, 40, 170), evaluations=10)
    assert whole.budgets == (1, 7, 40, 170, 300)
    for budget, row in zip(whole.budgets, whole.distances, strict=True):
        alone = boundary_distance(model, data, budget=budget, evaluations=10)
        assert torch.equal(alone.scores, row)
        assert int(alone.queries.max()) == min(budget, 300)
    assert (whole.distances.diff(dim=0) <= 0).all()
    inside = torch.arange(12) < 6
    curve = {b: float(membership_auroc(r, inside)) for b, r in zip(whole.budgets, whole.distances, strict=True)}
    assert whole.aucs(inside) == curve
    assert boundary_distance(model, data, budget=50).budgets == (1, 3, 10, 30, 50)


@pytest.mark.slow
def test_neither_blocks_nor_batches_nor_other_examples_nor_the_budget_change_a_distance(monkeypatch):
    model, x, y = problem(1, n=30, d=6)
    data, settings = TensorDataset(x, y), {"evaluations": 10, "clip": (-4, 4)}
    whole = boundary_distance(model, data, budget=120, curve=(8, 40), **settings)
    monkeypatch.setattr(boundary, "_POINTS", 1000)  # 5 to 30 examples in a block, by the budget
    for budget, row in zip(whole.budgets, whole.distances, strict=True):
        for batch in (1, 7):
            loader = DataLoader(data, batch_size=batch)
            assert torch.allclose(boundary_distance(model, loader, budget=budget, **settings).scores, row, rtol=1e-9)
    first = DataLoader(torch.utils.data.Subset(data, range(20)), batch_size=20)
    alone = boundary_distance(model, first, budget=120, **settings).scores
    # Another start is nearer for some, so only those are compared that start from one of the first 20.
    same = (
        torch.cdist(x, x).masked_fill(model(x).argmax(1)[:, None] == model(x).argmax(1), math.inf).argmin(1)[:20] < 20
    )
    assert int(same.sum()) > 10
    assert torch.allclose(alone[same], whole.scores[:20][same], rtol=1e-9)


@pytest.mark.slow
def test_distances_are_a_signal_for_lira():
    model, *others = (Classifier() for _ in range(5))
    membership = torch.stack([torch.arange(200) < 100, torch.arange(200) >= 100] * 2)
    for each, inside in zip(others, membership, strict=True):
        begin = 0 if inside[0] else 100
        trainer(max_epochs=12).fit(each, loader(begin, begin + 100, shuffle=True))
    trainer(max_epochs=12).fit(model, loader(0, 100, shuffle=True))
    distances = [boundary_distance(each, part(0, 200), budget=100).scores for each in (model, *others)]
    scores = lira(distances[0], torch.stack(distances[1:]), membership, variance="pooled")
    plain = float(membership_auroc(distances[0], membership[0]))
    assert float(membership_auroc(scores, membership[0])) > max(0.5, plain)
    assert collect_outputs(model, part(0, 200)).correct.float().mean() > 0.5


def test_degenerate_data():
    model, x, _ = problem(2)
    x[:, 0] = 1.0  # a constant feature
    with torch.no_grad():
        y = model(x).argmax(1)
    assert len(y.unique()) > 1
    found = boundary_distance(model, TensorDataset(x, y), budget=40).scores
    assert found.isfinite().all()
    assert (found > 0).all()
    same = TensorDataset(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    labels = iter([torch.tensor([0, 1, 0, 1])])
    coin = lambda inputs: next(labels, torch.arange(len(inputs)) % 2)  # noqa: E731
    assert boundary_distance(coin, same, budget=20).scores.tolist() == [0, 0, 0, 0]  # not NaN
    wrong = TensorDataset(x, (y + 1) % 3)
    assert boundary_distance(model, wrong, budget=20).scores.tolist() == [0.0] * len(x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget must be an integer of at least 1"),
        ({"curve": (2000,)}, ValueError, "each budget of the curve must be an integer from 1 to 1000"),
        ({"evaluations": 1}, ValueError, "evaluations must be an integer of at least 2"),
        ({"clip": 1.0}, TypeError, r"clip must be a pair \(lowest, highest\)"),
        ({"clip": (1, 0)}, ValueError, "the highest value of clip must be a number above 1"),
        ({"clip": (0, 0.1)}, ValueError, r"outside of clip = \(0, 0.1\)"),
        ({"model": 3}, TypeError, "model must be a module or a function that gives labels, not a int"),
        ({"model": lambda x: x[:, 0]}, TypeError, r"must be integers \(8,\), not torch.float64"),
        ({"curve": 5}, TypeError, "curve must be a list of budgets, not 5"),
        ({"curve": "12"}, TypeError, "curve must be a list of budgets, not '12'"),
        ({"seed": 2**70}, ValueError, "seed must be an integer from 0 to 9223372036854775807"),
        ({"model": lambda x: torch.zeros(len(x)).long()}, ValueError, "gives the label 0 to all 8 examples"),
        ({"data": TensorDataset(INPUTS.long(), TARGETS)}, TypeError, "the inputs must be a float tensor"),
        ({"data": TensorDataset(INPUTS / 0, TARGETS)}, ValueError, "inputs has NaN or infinite values"),
        ({"data": [(INPUTS, TARGETS[:, None])]}, ValueError, r"8 inputs need targets of shape \(8,\)"),
        ({"data": [(INPUTS, TARGETS - 1)]}, ValueError, "the targets must be class indices"),
        ({"data": [(INPUTS, TARGETS + 0.5)]}, ValueError, "the targets must be class indices"),
        ({"data": []}, ValueError, "the data hold no batch"),
    ],
)
def test_wrong_uses_of_the_boundary_distance(change, error, message):
    given_arguments = {"model": LINEAR, "data": DATA, **change}
    with pytest.raises(error, match=message):
        boundary_distance(given_arguments.pop("model"), given_arguments.pop("data"), **given_arguments)
