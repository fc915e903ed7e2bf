"""The inverse Hessian attack and BMIA, against explicit matrices, on models with a signal and without one."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf.attacks import (
    bmia,
    conjugate_gradients,
    inverse_hessian_attack,
    laplace_outputs,
    lira,
    logit_signal,
)
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.outputs import collect_outputs
from tests.attacks.cases import seeds
from tests.helpers import Classifier, loader, part, trainer
from tests.oracles import whitebox as oracle


def problem(seed, n=6, others=4, d=3, classes=2):
    torch.manual_seed(seed)
    x, y = torch.randn(n + others, d), torch.randint(classes, (n + others,))
    return nn.Linear(d, classes), TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])


def as_lists(data):
    return [(x.double().tolist(), int(y)) for x, y in data]


def auc(scores):
    whole = torch.cat([scores.members, scores.nonmembers])
    return float(membership_auroc(whole, torch.arange(len(whole)) < len(scores.members)))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([(0.0, 0.0), (0.9, 0.0), (0.9, 0.05)]), st.sampled_from([2, 3]))
def test_iha_against_explicit_matrices(seed, training, classes):
    model, members, nonmembers = problem(seed, classes=classes)
    momentum, decay = training
    found = inverse_hessian_attack(
        model, members, nonmembers, learning_rate=0.1, momentum=momentum, weight_decay=decay, tolerance=1e-12
    )
    weight, bias = model.weight.double().tolist(), model.bias.double().tolist()
    inside, outside = oracle.iha(weight, bias, as_lists(members), as_lists(nonmembers), 0.1, momentum, decay, 0.2)
    assert found.members.tolist() == pytest.approx(inside, rel=1e-6, abs=1e-9)
    assert found.nonmembers.tolist() == pytest.approx(outside, rel=1e-6, abs=1e-9)


def test_iha_in_blocks_of_a_loader_and_of_a_few():
    model, members, nonmembers = problem(0, n=20, others=18)
    whole = inverse_hessian_attack(model, members, nonmembers, learning_rate=0.1)
    few = inverse_hessian_attack(model, DataLoader(members, batch_size=7), nonmembers, learning_rate=0.1, count=3)
    torch.testing.assert_close(few.members, whole.members[:3], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(few.nonmembers, whole.nonmembers[:3], rtol=1e-4, atol=1e-6)


def fitted(seed, d=40, n=30, steps=3000):
    """A linear model at the minimum of its regularised training loss."""
    model, members, nonmembers = problem(seed, n=n, others=n, d=d)
    x, y = members[:]
    optimizer = torch.optim.SGD(model.parameters(), 0.5, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, members, nonmembers


@pytest.mark.slow
def test_iha_finds_members_of_a_trained_model_and_nothing_in_an_untrained_one():
    trained = [auc(inverse_hessian_attack(*fitted(s, steps=300), learning_rate=0.5, weight_decay=0.01)) for s in (0, 1)]
    assert min(trained) > 0.9
    untrained = [
        auc(inverse_hessian_attack(*problem(seed, n=30, others=30, d=10), learning_rate=0.5)) for seed in range(20)
    ]
    # An AUC of 30 and 30 examples has a standard deviation of 0.075.
    assert sum(untrained) / 20 == pytest.approx(0.5, abs=4 * 0.075 / 20**0.5)


def test_iha_leaves_a_module_with_batchnorm_and_dropout_as_it_is():
    model = Classifier()
    trainer(max_epochs=2).fit(model, loader(0, 40))
    before = copy.deepcopy(model.state_dict())
    model.train()
    found = inverse_hessian_attack(
        model, part(0, 40), part(100, 110), learning_rate=0.1, count=2, damping=5.0, tolerance=1e-3
    )
    assert found.members.shape == (2,)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@given(seeds, st.integers(1, 4), st.integers(1, 5))
def test_conjugate_gradients_against_elimination(seed, rows, size):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = root @ root.T + 0.5 * torch.eye(size)
    right = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    right[0] = 0
    found = conjugate_gradients(lambda v: v @ matrix, right, tolerance=1e-12)
    for mine, wanted in zip(found.tolist(), right.tolist(), strict=True):
        assert mine == pytest.approx(oracle.solve(matrix.tolist(), wanted), rel=1e-6, abs=1e-9)


def test_systems_that_have_no_solution_are_errors():
    eye = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"not positive definite.* Raise damping"):
        conjugate_gradients(lambda v: -v, eye)
    spread = torch.logspace(-6, 6, 40, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"did not reach the tolerance 1e-05 in 5 iterations\. Raise damping"):
        conjugate_gradients(lambda v: v * spread, torch.ones(1, 40, dtype=torch.float64), max_iterations=5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learning_rate": 0}, ValueError, "learning_rate must be a number above 0"),
        ({"momentum": 1.0}, ValueError, r"momentum must be a number in \[0, 1\)"),
        ({"damping": -1}, ValueError, "damping must be a number of at least 0"),
        ({"count": 0}, ValueError, "count must be an integer of at least 1"),
        ({"members": [(torch.zeros(2, 3), torch.tensor([0, 1]))]}, TypeError, "members must be a map-style data set"),
        ({"members": TensorDataset(torch.zeros(1, 3), torch.tensor([0]))}, ValueError, "needs at least 2 members"),
        ({"nonmembers": problem(0)[1]}, ValueError, "are members"),
    ],
)
def test_wrong_uses_of_iha(change, error, message):
    model, members, nonmembers = problem(0)
    given = {"members": members, "nonmembers": nonmembers, "learning_rate": 0.1, **change}
    with pytest.raises(error, match=message):
        inverse_hessian_attack(model, **given)


@given(seeds, st.integers(2, 6), st.integers(1, 4))
def test_bmia_against_loops_and_it_is_offline_lira(seed, samples, n):
    torch.manual_seed(seed)
    signal, sampled = torch.randn(n).double(), torch.randn(samples, n).double()
    found = bmia(signal, sampled)
    for i in range(n):
        column = sampled[:, i].tolist()
        mean = sum(column) / samples
        deviation = (sum((v - mean) ** 2 for v in column) / (samples - 1)) ** 0.5
        assert float(found[i]) == pytest.approx((float(signal[i]) - mean) / deviation, rel=1e-6)
    nobody = torch.zeros(samples, n, dtype=torch.bool)
    offline = lira(signal, sampled, nobody, online=False, variance="per_example")
    torch.testing.assert_close(torch.special.log_ndtr(found), offline)


def test_bmia_of_samples_that_agree_and_wrong_shapes():
    assert bmia(torch.tensor([1.0, -1.0]), torch.zeros(3, 2)).isfinite().all()
    for signal, sampled in ((torch.zeros(2), torch.zeros(3, 1)), (torch.zeros(2), torch.zeros(1, 2))):
        with pytest.raises(ValueError, match=r"signal must have shape \(n,\) and sampled \(S, n\) with S >= 2"):
            bmia(signal, sampled)
    with pytest.raises(ValueError, match="sampled has NaN"):
        bmia(torch.zeros(1), torch.tensor([[0.0], [float("nan")]]))


@pytest.mark.parametrize("bias", [True, False])
def test_sampled_logits_have_the_covariance_of_the_whole_matrix(bias):
    torch.manual_seed(1)
    x, y = torch.randn(14, 2), torch.randint(3, (14,))
    model = nn.Linear(2, 3, bias=bias)
    known, asked = TensorDataset(x[:12], y[:12]), TensorDataset(x[12:], y[12:])
    found = laplace_outputs(model, known, asked, samples=40000, prior_precision=0.7).double()
    with torch.no_grad():
        torch.testing.assert_close(found.mean(0).float(), model(x[12:]), atol=0.03, rtol=0)
        probabilities = model(x[:12]).double().softmax(-1).tolist()
    features = [[*row, 1.0][: 2 + bias] for row in x.double().tolist()]
    for i in range(2):
        wanted = torch.tensor(oracle.laplace_covariance(features[:12], features[12 + i], probabilities, 0.7))
        torch.testing.assert_close(torch.cov(found[:, i].T).float(), wanted, atol=0.02, rtol=0.04)


def test_samples_depend_on_the_seed_alone_and_the_model_stays():
    model = Classifier().train()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    one, two, other = (laplace_outputs(model, part(0, 40), part(100, 110), samples=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert not model.net[5]._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_bmia_finds_members_and_nothing_where_there_is_nothing():
    torch.manual_seed(0)
    audited, reference, stranger = (Classifier() for _ in range(3))
    for model, (begin, end) in ((audited, (0, 200)), (reference, (400, 600)), (stranger, (600, 800))):
        trainer(max_epochs=15).fit(model, loader(begin, end, shuffle=True))
    asked = part(0, 400)
    sampled = laplace_outputs(reference, part(400, 600), asked)
    y = torch.tensor([y for _, y in asked])
    is_member = torch.arange(400) < 200
    found = []
    for model in (audited, stranger):
        signal = logit_signal(collect_outputs(model, asked).logits, y)
        found.append(float(membership_auroc(bmia(signal, logit_signal(sampled, y)), is_member)))
    assert found[0] > 0.55
    assert found[1] == pytest.approx(0.5, abs=4 * 0.029)


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return 2 * self.layer(x)


def test_wrong_uses_of_the_laplace_approximation():
    model, known, asked = problem(0)
    with pytest.raises(ValueError, match="are examples that the reference model was trained on"):
        laplace_outputs(model, known, known)
    with pytest.raises(ValueError, match=r"logits are not the outputs of an nn\.Linear"):
        laplace_outputs(Normalised(), known, asked)
    for change, message in (({"samples": 1}, "samples must be"), ({"prior_precision": 0.0}, "prior_precision must be")):
        with pytest.raises(ValueError, match=message):
            laplace_outputs(model, known, asked, **change)
