"""Label-only attacks against loops in plain Python, on models with a signal and without one, and in wrong use."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf.attacks import boundary_distance, oslo
from lightning_cwrf.metrics.functional import membership_auroc
from tests.attacks.label_only import DATA, INPUTS, LINEAR, TARGETS, problem
from tests.helpers import Classifier, part


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
