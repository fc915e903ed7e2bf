"""Label-only attacks against loops in plain Python, on models with a signal and without one, and in wrong use."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf.attacks import boundary, boundary_distance, lira, oslo
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.outputs import collect_outputs
from tests.attacks.cases import seeds
from tests.helpers import Classifier, loader, part, trainer
from tests.oracles import label_only as oracle


def problem(seed, n=8, d=3, classes=3):
    """A linear model in float64, and examples that it labels right but for the first."""
    torch.manual_seed(seed)
    model, x = nn.Linear(d, classes).double(), torch.randn(n, d).double()
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % classes
    return model, x, y


def label_of(model):
    return lambda point: int(model(torch.tensor(point, dtype=torch.float64)[None]).argmax())


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


@pytest.mark.parametrize("d", [3, 40])
def test_a_model_is_never_asked_about_nothing_and_gets_at_most_a_batch(d):
    model, x, y = problem(3, n=12, d=d)
    sizes = []

    def labels(inputs):
        sizes.append(len(inputs))
        with torch.no_grad():
            return model(inputs).argmax(-1).numpy()

    data = DataLoader(TensorDataset(x, y), batch_size=5)
    for budget in (*range(1, 14), 40, 59):
        used = boundary_distance(labels, data, budget=budget).queries
        assert sum(sizes) == int(used.sum())
        assert min(sizes) > 0
        assert max(sizes) == 5
        sizes.clear()
    surrogates = [problem(seed, d=d)[0] for seed in (3, 4, 5, 6)]
    seen = []
    for each in surrogates:
        each.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    oslo(labels, data, surrogates, stages=4, thresholds=(0.1, 0.5, 0.5))
    assert min(sizes + seen) > 0
    assert max(sizes) == max(seen) == 5


class Sharpened(nn.Module):
    """The same labels with other confidences."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model(x))


@pytest.mark.parametrize("change", [lambda z: 50 * z, lambda z: nn.functional.one_hot(z.argmax(-1), 3).double()])
def test_nothing_but_the_label_is_used_and_every_question_is_counted(change):
    model, x, y = problem(2, n=10)
    data, asked = TensorDataset(x, y), []

    def labels(inputs):
        asked.append(len(inputs))
        with torch.no_grad():
            return model(inputs).argmax(-1)

    whole = boundary_distance(model, data, budget=60)
    for other in (Sharpened(model, change), labels):
        assert torch.equal(boundary_distance(other, data, budget=60).distances, whole.distances)
    assert sum(asked) == int(whole.queries.sum())
    asked.clear()
    surrogates = [problem(seed)[0] for seed in (3, 4, 5, 6)]
    levels = {"thresholds": (0.5, 0.1), "clip": (-5, 5)}
    known = oslo(model, data, surrogates, **levels)
    for other in (Sharpened(model, change), labels):
        assert torch.equal(oslo(other, data, surrogates, **levels).survived, known.survived)
    assert sum(asked) == int(known.queries.sum())
    assert int(known.queries.max()) == 2


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


ANSWERS = [
    (lambda z: z.argmax(1).int(), None),
    (lambda z: z.argmax(1).numpy(), None),
    (lambda z: z.argmax(1).numpy().astype(np.uint8), None),
    (lambda z: z.argmax(1).tolist(), None),
    (lambda z: list(z.argmax(1).numpy()), None),
    (lambda z: z.softmax(1)[:, 1], "not torch.float64 of shape"),
    (lambda z: z, "not torch.float64 of shape"),
    (lambda z: z.argmax(1).double().numpy(), "not an array of float64"),
    (lambda z: z.argmax(1, keepdim=True), r"not torch.int64 of shape \(\d+, 1\)"),
    (lambda z: z.argmax(1)[0], r"not torch.int64 of shape \(\)"),
    (lambda z: z.argmax(1)[:1], r"not torch.int64 of shape \(1,\)"),
    (lambda z: z.argmax(1).numpy()[:1], r"not an array of int64 of shape \(1,\)"),
    (lambda z: z.argmax(1).tolist()[1:], "not a list of"),
    (lambda z: z.argmax(1).double().tolist(), "not a list of . with a float"),
    (lambda z: [str(each) for each in z.argmax(1).tolist()], "with a str"),
    (lambda z: None, "not a NoneType"),
]


@pytest.mark.parametrize(("answer", "message"), ANSWERS)
@pytest.mark.parametrize("attack", ["boundary_distance", "oslo"])
def test_what_a_function_may_return(attack, answer, message):
    surrogates = [problem(seed)[0] for seed in (3, 4, 5, 6)]

    def run(model):
        if attack == "oslo":
            return oslo(model, DATA, surrogates, stages=3).survived
        return boundary_distance(model, DATA, budget=20).distances

    given_function = lambda inputs: answer(LINEAR(inputs))  # noqa: E731
    if message is None:
        assert torch.equal(run(given_function), run(LINEAR))
    else:
        with pytest.raises(TypeError, match=f"must be integers .*{message}"):
            run(given_function)


def recoded(model, places):
    return lambda inputs: torch.tensor(places)[model(inputs).argmax(1)]


def test_labels_that_are_coded_otherwise_than_the_targets_are_noticed():
    model, x, y = problem(7, n=60, d=6, classes=4)
    data, surrogates = TensorDataset(x, y), [copy.deepcopy(model) for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        boundary_distance(model, data, budget=5)
        oslo(model, data, surrogates, stages=5)
    order = recoded(model, [1, 2, 3, 0])
    with pytest.warns(UserWarning, match="labels are right for 0 of 60|labels are right for 1 of 60"):
        boundary_distance(order, data, budget=5)
    with pytest.warns(UserWarning, match="on .* of 60 perturbed inputs .* would be so by chance"):
        oslo(order, data, surrogates, stages=5)
    later = recoded(model, [1, 2, 3, 4])
    with pytest.warns(UserWarning, match="coded otherwise than the targets"):
        boundary_distance(later, data, budget=5)
    with pytest.raises(ValueError, match=r"the label 4 is out of range: .* the surrogates' 4 classes, to 3"):
        oslo(later, data, surrogates, stages=5)
    for run in (lambda m, d: boundary_distance(m, d, budget=5), lambda m, d: oslo(m, d, surrogates)):
        with pytest.raises(ValueError, match="the label -1 is out of range: labels must be coded as the targets are"):
            run(recoded(model, [-1, 0, 1, 2]), data)
        with pytest.raises(
            ValueError, match=r"the target 10. is out of range: .* has 4 classes, targets go from 0 to 3"
        ):
            run(model, TensorDataset(x, y + 100))


class Augmented(torch.utils.data.Dataset):
    def __len__(self):
        return len(INPUTS)

    def __getitem__(self, i):
        return INPUTS[i] + 0.1 * torch.randn(INPUTS.shape[1]), TARGETS[i]


def test_data_that_read_differently_each_time_are_refused():
    for run in (boundary_distance, lambda m, d: oslo(m, d, [m] * 4)):
        with pytest.raises(ValueError, match="data read differently each time"):
            run(LINEAR, Augmented())
        with pytest.raises(TypeError, match="data: a generator can be read only once"):
            run(LINEAR, (batch for batch in [(INPUTS, TARGETS)]))


@pytest.mark.filterwarnings("ignore:.*has learned nothing", "ignore:.*would be so by chance")
def test_they_leave_a_module_and_the_callers_random_state_as_they_are():
    model, surrogates = Classifier().train(), [Classifier().train() for _ in range(4)]
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    data = DataLoader(part(0, 40), batch_size=16)
    found = [boundary_distance(model, data, budget=30, seed=s) for s in (0, 0, 1)]
    assert torch.equal(found[0].distances, found[1].distances)
    assert not torch.equal(found[0].distances, found[2].distances)
    oslo(model, data, surrogates, stages=3)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert all(each.training and each.net[0].weight.grad is None for each in surrogates)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def linear_data(seed, n, d=20):
    """Labels are noise: what a model knows of them, it has memorised."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * n, d, generator=generator)
    return TensorDataset(x, torch.randint(2, (2 * n,), generator=generator))


def fitted(x, y, steps):
    model = nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.slow
def test_members_of_a_trained_model_are_found_and_there_is_nothing_without_training():
    n, trained, untrained = 60, [], []
    for seed in range(4):
        torch.manual_seed(seed)
        data = linear_data(seed, n)
        x, y = data[:]
        inside = torch.arange(2 * n) < n
        model = fitted(x[:n], y[:n], 80)
        stranger, *surrogates = (fitted(*linear_data(100 + seed + i, n)[:n], 80) for i in range(5))
        for audited, aucs in ((model, trained), (stranger, untrained)):
            found = boundary_distance(audited, data, budget=60), oslo(audited, data, surrogates, stages=8)
            aucs.append([float(membership_auroc(each.scores, inside)) for each in found])
    by_distance, by_oslo = torch.tensor(trained).mean(0).tolist()
    assert by_distance > 0.7
    assert by_oslo > 0.55  # the labels are noise, so surrogates know little of the direction
    # An AUC of 60 and 60 examples has a standard deviation of 0.053 without ties, and less with them.
    assert torch.tensor(untrained).mean(0).tolist() == pytest.approx([0.5, 0.5], abs=4 * 0.053 / 4**0.5)


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


LINEAR, INPUTS, TARGETS = problem(7)
DATA = TensorDataset(INPUTS, TARGETS)


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
