"""Draws: against explicit inverses, their sensitivity between neighbours, and a mechanism that keeps its word."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset, TensorDataset

from lightning_cwrf.mechanism import (
    PublicCurvature,
    clipped_sum,
    draw,
    exponential_mechanism,
    noise,
    public_curvature,
    quadratic_draw,
)
from lightning_cwrf.mechanism.parameters import flat
from lightning_cwrf.mechanism.spent import draws_of, ledger_of
from tests.helpers import same_snapshot, snapshot
from tests.mechanism.cases import curvature_of, data, metric, network
from tests.oracles import mechanism as oracle

SHIFT = {"add_remove": 1, "replace_one": 2}


@pytest.mark.parametrize("adjacency", SHIFT)
def test_a_draw_has_the_mean_and_the_covariance_of_the_formula(adjacency):
    matrix, clip, eta, mu, n = metric(4, 1), 0.8, 0.3, 0.7, 12
    curvature = curvature_of(matrix, clip)
    gradients, theta = torch.randn(n, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    total = clipped_sum(gradients, curvature)
    settings = {"eta": eta, "mu": mu, "examples": n, "adjacency": adjacency}
    mean, covariance = oracle.draw_moments(theta, gradients, matrix, clip, eta, mu, n, SHIFT[adjacency])
    still = quadratic_draw(theta, total, curvature, **settings, noise=torch.zeros(4, dtype=torch.float64))
    assert torch.allclose(still, mean, atol=1e-12)
    # e_j as the noise gives the j-th column of a square root of the covariance.
    columns = quadratic_draw(theta, total, curvature, **settings, noise=torch.eye(4, dtype=torch.float64)) - still
    expected = -eta * SHIFT[adjacency] * clip / (n * mu) * torch.linalg.inv(torch.linalg.cholesky(matrix)).T
    assert torch.allclose(columns.T, expected, atol=1e-10)
    assert torch.allclose(columns.T @ columns, covariance, atol=1e-10)


def test_the_expected_cost_is_half_of_dimensions_times_tau():
    matrix, n = metric(6, 2), 10
    noise = torch.randn(20_000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros(6, dtype=torch.float64)
    moved = quadratic_draw(zero, zero, curvature_of(matrix, 2.0), eta=0.4, mu=0.5, examples=n, noise=noise)
    cost = ((moved @ matrix) * moved).sum(1).mean() / 2
    tau = (0.4 * 2.0 / (n * 0.5)) ** 2
    assert float(cost) == pytest.approx(6 * tau / 2, rel=0.03)


def test_clipping_is_in_the_norm_of_the_inverse_metric():
    matrix = metric(5, 3)
    gradients = 3 * torch.randn(40, 5, dtype=torch.float64)
    curvature = curvature_of(matrix, 1.3)
    root = torch.linalg.inv(torch.linalg.cholesky(matrix))
    expected = root @ oracle.clipped(gradients, matrix, 1.3).sum(0)
    assert torch.allclose(clipped_sum(gradients, curvature), expected, atol=1e-12)
    assert torch.equal(clipped_sum(torch.zeros(3, 5), curvature), torch.zeros(5, dtype=torch.float64))
    for bad in (float("nan"), float("inf"), -float("inf")):
        wrong = gradients.clone()
        wrong[7, 2] = bad
        with pytest.raises(ValueError, match="gradient is NaN or infinite, so it cannot be clipped"):
            clipped_sum(wrong, curvature)


@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(1, 8),
    st.sampled_from(["add_remove", "replace_one"]),
    st.floats(0.01, 5),
    st.floats(0.01, 3),
    st.floats(0.01, 4),
    st.floats(-3, 4),
)
@settings(max_examples=60, deadline=None)
def test_neighbours_are_no_further_apart_than_mu(seed, k, n, adjacency, eta, mu, clip, size):
    """In standard deviations of the noise, which is what μ-GDP of a Gaussian means."""
    generator = torch.Generator().manual_seed(seed)
    curvature = curvature_of(metric(k, seed), clip)
    gradients = 10**size * torch.randn(n + 1, k, generator=generator, dtype=torch.float64)
    neighbours = (
        (gradients[:n], gradients) if adjacency == "add_remove" else (gradients[:n], gradients[[*range(1, n), n]])
    )
    assert distance(neighbours, curvature, eta, mu, adjacency) <= mu + 1e-9


@pytest.mark.parametrize("adjacency", SHIFT)
@pytest.mark.parametrize("size", [1.0, 50.0])
def test_the_worst_neighbours_are_exactly_mu_apart(adjacency, size):
    """u and nothing; u and −u: at the clipping norm or beyond it."""
    curvature = curvature_of(metric(3, 5), 1.5)
    u = torch.randn(3, dtype=torch.float64)
    gradient = size * 1.5 * curvature.cholesky @ (u / u.norm())
    others = torch.randn(9, 3, dtype=torch.float64)
    first = torch.cat([others, gradient[None]])
    second = others if adjacency == "add_remove" else torch.cat([others, -gradient[None]])
    assert distance((first, second), curvature, 0.5, 0.8, adjacency) == pytest.approx(0.8, abs=1e-9)


def distance(neighbours, curvature, eta, mu, adjacency, examples=10):
    zero = torch.zeros(curvature.dimensions, dtype=torch.float64)
    given = {"eta": eta, "mu": mu, "examples": examples, "adjacency": adjacency}
    a, b = (quadratic_draw(zero, clipped_sum(g, curvature), curvature, **given, noise=zero) for g in neighbours)
    # The noise's own standard deviation along the difference, from one unit of noise.
    unit = torch.zeros_like(zero)
    unit[0] = 1.0
    still = quadratic_draw(zero, zero, curvature, **given, noise=zero)
    tau = float((curvature.cholesky.mT @ (quadratic_draw(zero, zero, curvature, **given, noise=unit) - still)).norm())
    return float((curvature.cholesky.mT @ (a - b)).norm()) / tau


class Silent:
    """In the place of the noise's generator: no noise, and what was asked for."""

    asked = 0

    def standard_normal(self, size):
        Silent.asked += 1
        return np.zeros(size)


@pytest.mark.parametrize("adjacency", SHIFT)
@pytest.mark.parametrize(("parameters", "subspace"), [("head", None), ("all", 4)])
def test_the_whole_mechanism_moves_by_mu_at_most_between_neighbours(monkeypatch, adjacency, parameters, subspace):
    """One draw of a network without its noise, on data sets that differ in one example with a large gradient."""
    monkeypatch.setattr(draw, "noise_source", lambda *_: Silent())
    settings = {"mu": 0.6, "draws": 1, "eta": 0.7, "adjacency": adjacency, "target_delta": 1e-3}
    inputs, targets = data(12, 6).tensors
    inputs[-1] *= 1e4
    public = data(40, 7)
    curvature = public_curvature(network(), public, parameters=parameters, subspace=subspace, clip=0.05)
    ends = []
    # n is the same for both, as it counts as public: the example that is not there has no gradient.
    kept = TensorDataset(inputs, targets)
    others = [inputs.clone(), targets.clone()]
    if adjacency == "replace_one":
        others[1][-1] = (targets[-1] + 1) % 3
    real = draw.clipped_sum
    for without in (False, True):
        model = network()
        if without and adjacency == "add_remove":
            monkeypatch.setattr(draw, "clipped_sum", lambda g, c: real(g[:-1], c))
        private = TensorDataset(*others) if without else kept
        exponential_mechanism(model, DataLoader(private, batch_size=12), curvature, **settings)
        ends.append(flat(model, curvature.names))
    moved = ends[1] - ends[0]
    if subspace is not None:
        basis = curvature.subspace.basis.double()
        moved = torch.linalg.lstsq(basis, moved[:, None]).solution[:, 0]
    tau = 0.7 * SHIFT[adjacency] * 0.05 / (12 * 0.6)
    shift = float((curvature.cholesky.mT @ moved).norm()) / tau
    assert 0 < shift <= 0.6 + 1e-4  # the subspace is in single precision
    if adjacency == "add_remove":
        assert shift == pytest.approx(0.6, abs=1e-4)  # clipped


def test_draws_are_passes_at_the_moving_weights_with_the_composed_noise(monkeypatch):
    """The same by the oracle: explicit inverses, backward passes, one noise for each draw."""
    noises = iter(torch.randn(3, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy())
    seen = []

    class Known:
        def standard_normal(self, size):
            seen.append(next(noises))
            return seen[-1]

    monkeypatch.setattr(draw, "noise_source", lambda *_: Known())
    private, public, model = data(25, 8), data(40, 9), network()
    curvature = public_curvature(model, public)
    matrix = curvature.cholesky @ curvature.cholesky.mT
    spent = exponential_mechanism(model, DataLoader(private, batch_size=7), curvature, mu=0.9, draws=3, eta=0.4)
    other = network()
    for drawn in seen:
        gradients = oracle.gradients(other, *private.tensors, curvature.names)
        start = flat(other, curvature.names)
        mean, covariance = oracle.draw_moments(
            start, gradients, matrix, curvature.clip, 0.4, 0.9 / math.sqrt(3), 25, shift=1
        )
        # L⁻ᵀ is one square root of the inverse; scaled as the covariance says.
        tau = float((covariance @ matrix).trace() / 18)
        moved = mean - math.sqrt(tau) * torch.linalg.inv(curvature.cholesky).T @ torch.from_numpy(drawn)
        draw.write(other, curvature.names, moved)
    assert torch.allclose(flat(model, curvature.names), flat(other, curvature.names), atol=1e-9)
    assert (spent.steps, spent.mu, spent.mechanism, spent.from_scratch) == (
        3, pytest.approx(0.9), "exponential mechanism", False
    )  # fmt: skip


def fitted(seed=0, private=None, model=None, curvature=None, **settings):
    model = network() if model is None else model
    curvature = curvature or public_curvature(model, data(40, 7), parameters="head")
    settings = {"target_epsilon": 1.0, "target_delta": 1e-3, "draws": 2, "noise_seed": seed} | settings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "noise_seed makes the noise")
        exponential_mechanism(model, private or data(30, 8), curvature, **settings)
    return flat(model, curvature.names)


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    assert torch.equal(fitted(3), fitted(3))
    assert not torch.equal(fitted(3), fitted(4))


def test_without_a_seed_the_noise_is_of_the_operating_system_and_of_no_seed_of_torch():
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        ends.append(fitted(noise_seed=None))
    assert not torch.equal(*ends)
    with pytest.warns(UserWarning, match="noise_seed makes the noise of the draws reproducible.*never for a release"):
        exponential_mechanism(
            network(), data(30, 8), public_curvature(network(), data(40, 7)), mu=0.1, target_delta=1e-3, noise_seed=1
        )
    with pytest.raises(ValueError, match="noise_seed must be an integer of at least 0"):
        fitted(noise_seed=-1)


def test_the_secret_has_256_bits(monkeypatch):
    """Each bit of it changes the noise."""
    asked = []
    monkeypatch.setattr(noise.secrets, "token_bytes", lambda count: asked.append(count) or bytes(count))
    first = fitted(noise_seed=None)
    assert asked == [32]
    assert torch.equal(first, fitted(noise_seed=None))
    noises = {noise.generator_of((1 << bit).to_bytes(32, "little")).standard_normal(3).tobytes() for bit in range(256)}
    assert len(noises) == 256


class Picks(nn.Module):
    """A class from a second column, and a table: what ids of examples do not see."""

    def __init__(self, table=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.body = network()
        self.register_buffer("table", torch.full((4,), table, dtype=torch.float64))

    def forward(self, input):
        return self.body(input + self.table)

    def classification_step(self, batch):
        return self(batch[0]), batch[2]


def unseen(label):
    inputs, targets = data(30, 8).tensors
    targets = targets.clone()
    targets[3] = label
    return TensorDataset(inputs, torch.arange(30), targets)


@pytest.mark.slow
def test_no_two_different_runs_share_their_noise(monkeypatch):
    """With one seed: other data, ε, η, adjacency, weights, buffers or curvature. Shared noise would cancel."""
    noises = []
    real = draw.noise_source

    class Recorded:
        def __init__(self, source):
            self.source = source

        def standard_normal(self, size):
            noises.append(self.source.standard_normal(size))
            return noises[-1]

    monkeypatch.setattr(draw, "noise_source", lambda *parts: Recorded(real(*parts)))
    neighbour = Subset(data(30, 8), range(29))
    twice = network()
    fitted(model=twice)
    fitted(model=twice, target_epsilon=3.0)
    public = TensorDataset(data(40, 7).tensors[0], torch.arange(40), torch.zeros(40, dtype=torch.long))
    picks = public_curvature(Picks(), public)
    for change in (
        {"private": neighbour}, {"target_epsilon": 2.0}, {"eta": 0.4}, {"adjacency": "replace_one"}, {"draws": 3},
        {"model": network(1)}, {"curvature": public_curvature(network(), data(41, 7))},
        {"transfer": lambda batch: [batch[0].clamp(-1, 1), batch[1]]},
        {"model": Picks(), "curvature": picks, "private": unseen(0)},
        {"model": Picks(), "curvature": picks, "private": unseen(1)},
        {"model": Picks(0.1), "curvature": picks, "private": unseen(1)},
    ):  # fmt: skip
        fitted(**change)
    assert len({noise.tobytes() for noise in noises}) == len(noises) == 4 + 2 * 10 + 3
    mixed = [abs(np.corrcoef(a, b)[0, 1]) for i, a in enumerate(noises) for b in noises[:i]]
    assert max(mixed) < 0.95


def test_nothing_but_the_named_parameters_changes_and_the_whole_is_in_the_subspace():
    model = nn.Sequential(network(), nn.BatchNorm1d(3).double()).train()
    before, start = snapshot(model), flat(model, ["0.2.weight", "0.2.bias"])
    curvature = public_curvature(model, data(40, 7), parameters=["0.2.weight", "0.2.bias"], subspace=3)
    fitted(model=model, curvature=curvature)
    after = snapshot(model)
    moved = flat(model, curvature.names) - start
    basis = curvature.subspace.basis.double()
    rest = moved - basis @ torch.linalg.lstsq(basis, moved[:, None]).solution[:, 0]
    assert float(moved.norm()) > 0
    assert float(rest.norm()) <= 1e-5 * float(moved.norm())
    for kept in (before, after):
        for name in curvature.names:
            kept["state"].pop(name)
    same_snapshot(before, after)


def test_a_budget_is_for_all_draws_together():
    model = network()
    fitted(model=model, target_epsilon=1.0)
    with pytest.raises(ValueError, match=r"the 2 draws so far have spent ε = 1 at δ = 0.001.*for all draws"):
        fitted(model=model, target_epsilon=1.0)
    fitted(model=model, target_epsilon=2.0, draws=5)
    assert ledger_of(model).spent(1e-3).epsilon == pytest.approx(2.0)
    assert draws_of(model) == 7
    fitted(model=model, target_epsilon=None, mu=0.5)
    spent = ledger_of(model).spent(1e-3)
    assert spent.epsilon > 2.5
    assert draws_of(model) == 9


def test_draws_that_are_interrupted_count_and_write_nothing():
    """The third pass fails: two draws were taken, and nothing of them is in the weights."""

    class Breaks(Dataset):
        reads = 0

        def __len__(self):
            return 30

        def __getitem__(self, i):
            Breaks.reads += self.armed
            if Breaks.reads > 90:  # 30 in a pass, and 4 of them before and after it
                raise KeyboardInterrupt
            return data(30, 8)[i]

        armed = False

    model, private = network(), Breaks()
    curvature = public_curvature(model, data(40, 7))
    start = flat(model, curvature.names)
    real = ledger_of(model).new_run
    ledger_of(model).new_run = lambda: setattr(private, "armed", True) or real()
    with pytest.raises(KeyboardInterrupt):
        exponential_mechanism(model, private, curvature, mu=1.0, draws=4, target_delta=1e-3)
    assert torch.equal(flat(model, curvature.names), start)
    assert (ledger_of(model).draws, ledger_of(model).mu()) == (2, pytest.approx(math.sqrt(0.5)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": 1.0}, "needs one of target_epsilon and mu, and not both"),
        ({"target_epsilon": None}, "needs one of target_epsilon and mu, and not both"),
        ({"target_epsilon": 101}, r"target_epsilon must be a number in \(0, 100\], not 101"),
        ({"target_epsilon": float("inf")}, "target_epsilon must be a number in"),
        ({"target_epsilon": None, "mu": 0}, r"mu must be a number in \(0, 1e\+07\], not 0"),
        ({"target_delta": 1}, r"target_delta must be a number in \(0, 1\), not 1"),
        ({"draws": 0}, "draws must be an integer of at least 1, not 0"),
        ({"eta": 0}, "eta must be a number above 0, not 0"),
        ({"eta": float("inf")}, "eta must be a number above 0, not inf"),
        ({"adjacency": "swap"}, "adjacency must be 'add_remove' or 'replace_one', not 'swap'"),
        ({"eta": 1e308}, "the weights are not finite after the draws and were not written|the model has diverged"),
    ],
)
def test_wrong_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        fitted(**settings)


def test_a_large_delta_is_warned_about():
    with pytest.warns(UserWarning, match=r"target_delta=0.1 is not below 1/n = 0.033 for 30 training examples"):
        fitted(target_delta=0.1)


class Changing(Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, i):
        x, y = data(30, 8)[i]
        return x + torch.rand(4, dtype=torch.float64), y


@pytest.mark.parametrize(
    ("private", "message"),
    [
        (DataLoader(data(30, 8), batch_size=8, drop_last=True), "drop_last=True, so that one example could decide"),
        (
            DataLoader(data(30, 8), sampler=torch.utils.data.WeightedRandomSampler([1.0] * 30, 30)),
            "sampler chooses examples, so that one example could decide about others",
        ),
        (Changing(), "read differently each time"),
        (
            DataLoader(data(30, 8), batch_sampler=BatchSampler(SequentialSampler(data(30, 8)), 8, drop_last=True)),
            "drop_last=True",
        ),
        (TensorDataset(torch.zeros(0, 4), torch.zeros(0)), "the private data hold no example"),
    ],
)
def test_private_data_whose_examples_are_not_their_own_raise(private, message):
    with pytest.raises(ValueError, match=message):
        exponential_mechanism(network(), private, public_curvature(network(), data(40, 7)), mu=1.0)


@pytest.mark.parametrize(
    ("private", "message"),
    [
        (iter([data(9, 1).tensors]), "the private data are read once for each draw"),
        ([data(9, 1).tensors], "the private data are batches, and what is in one example may have been made of others"),
        (DataLoader(data(9, 1), batch_size=None), "batch_size=None, so its data set makes the batches"),
    ],
)
def test_private_data_without_single_examples_raise(private, message):
    with pytest.raises(TypeError, match=message):
        exponential_mechanism(network(), private, public_curvature(network(), data(40, 7)), mu=1.0)


def test_a_curvature_of_another_model_or_a_model_of_dpsgd_raises():
    curvature = public_curvature(network(), data(40, 7))
    wider = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    with pytest.raises(ValueError, match="the curvature is of 18 parameters, and the model has 30 under its names"):
        exponential_mechanism(wider, data(30, 8), curvature, mu=1.0)
    swapped = PublicCurvature(curvature.cholesky, 1.0, curvature.names[::-1])
    with pytest.raises(ValueError, match="not in the model's order"):
        exponential_mechanism(network(), data(30, 8), swapped, mu=1.0)
    model = network()
    model._dpsgd_ledger = type("Ledger", (), {"steps": 40})()
    with pytest.raises(ValueError, match="this model has taken 40 steps of DP-SGD"):
        exponential_mechanism(model, data(30, 8), curvature, mu=1.0)
