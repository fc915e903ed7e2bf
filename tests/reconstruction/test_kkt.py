"""The equation of the weights: gaps, residual, multipliers, homogeneity, and examples split in two."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_cwrf.reconstruction import homogeneity, kkt_residual, logit_gaps, nonnegative_least_squares, split
from tests.helpers import same_snapshot, snapshot
from tests.oracles import reconstruction as oracles


def network(classes=3, inputs=4, width=6):
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes, bias=False)).double()


@pytest.mark.parametrize("classes", [2, 5])
def test_gaps_and_residual_are_those_of_a_loop(classes):
    net, x = network(classes), torch.randn(6, 4, dtype=torch.float64)
    y, weights = torch.arange(6) % classes, torch.rand(6, classes - 1, dtype=torch.float64)
    logits = net(x).detach()
    for i, row in enumerate(logit_gaps(logits, y)):
        assert row.tolist() == [float(logits[i, y[i]] - logits[i, c]) for c in range(classes) if c != y[i]]
    found = kkt_residual(net, x, y, weights)
    assert found.residual == pytest.approx(oracles.residual(copy.deepcopy(net), x, y, weights), rel=1e-10)
    assert torch.equal(found.multipliers, weights)


def test_one_output_is_two_classes():
    net, x = network(classes=1), torch.randn(4, 4, dtype=torch.float64)
    y, weights = torch.tensor([0, 1, 1, 0]), torch.rand(4, 1, dtype=torch.float64)
    theta = torch.cat([p.flatten() for p in net.parameters()])
    total = torch.autograd.grad(((2 * y - 1) * weights[:, 0] * net(x)[:, 0]).sum(), list(net.parameters()))
    expected = (theta - torch.cat([g.flatten() for g in total])).square().sum() / theta.square().sum()
    assert kkt_residual(net, x, y, weights).residual == pytest.approx(expected.item(), rel=1e-10)


def cases():
    random = np.random.default_rng(0)
    matrix = random.normal(size=(12, 5))
    yield "inactive", matrix, matrix @ random.uniform(1, 2, 5)
    yield "active", matrix, matrix @ np.array([1.0, -1.0, 2.0, -2.0, 0.0]) + random.normal(size=12)
    yield "all active", matrix, -np.abs(matrix).sum(1) * np.sign(matrix.sum(1))
    yield (
        "of lower rank",
        matrix @ np.array([[1.0, 1, 0, 0, 2], [0, 0, 1, 1, 0], *[[0.0] * 5] * 3]),
        matrix @ np.ones(5),
    )
    yield "wider than high", random.normal(size=(3, 6)), random.normal(size=3)


@pytest.mark.parametrize(("matrix", "target"), [case[1:] for case in cases()], ids=[case[0] for case in cases()])
def test_multipliers_are_the_best_that_are_not_negative(matrix, target):
    found = nonnegative_least_squares(torch.from_numpy(matrix), torch.from_numpy(target)).numpy()
    assert (found >= 0).all()
    gradient = matrix.T @ (matrix @ found - target)  # optimal if and only if it points inwards, and is 0 inside
    assert (gradient >= -1e-9).all()
    assert np.abs(gradient[found > 1e-9]).max(initial=0.0) < 1e-9
    least = oracles.least_nonnegative(matrix, target)
    assert np.square(matrix @ found - target).sum() - least <= 1e-12 * (target @ target)


def by_hand():
    """Each neuron is open on one member alone; w_j = ± v_j x_i / ‖x_i‖ gives λ_i = 1 / ‖x_i‖."""
    x = torch.tensor([[2.0, 0.0], [-1.0, 3.0]], dtype=torch.float64)
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    v = torch.tensor([1.5, -0.7], dtype=torch.float64)
    net[0].weight.data = v.abs()[:, None] * x / x.norm(dim=1, keepdim=True)
    net[2].weight.data = v[None]
    return net, x, torch.tensor([1, 0])


def test_a_point_of_the_equation_made_by_hand():
    net, x, y = by_hand()
    found = kkt_residual(net, x, y)
    assert found.residual < 1e-12
    torch.testing.assert_close(found.multipliers[:, 0], 1 / x.norm(dim=1))
    wrong = kkt_residual(net, x, y.flip(0))
    assert wrong.residual == pytest.approx(1)
    assert wrong.multipliers.tolist() == [[0.0], [0.0]]


def test_frozen_and_unused_parameters_are_no_part_of_the_equation():
    x, y, weights = torch.randn(4, 4), torch.tensor([0, 1, 2, 0]), torch.rand(4, 2)

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.other = nn.Parameter(torch.full((3,), 100.0))

        def forward(self, x):
            return self.net(x)

    model = Unused()
    alone = kkt_residual(model.net, x, y, weights).residual
    assert kkt_residual(model, x, y, weights).residual == pytest.approx(alone, rel=1e-12)
    assert kkt_residual(model, x, y).residual == pytest.approx(kkt_residual(model.net, x, y).residual, rel=1e-9)
    model.net[0].requires_grad_(False)
    head = nn.Sequential(nn.Identity(), nn.Identity(), copy.deepcopy(model.net[2]))
    hidden = model.net[:2](x.double()).detach()
    assert kkt_residual(model, x, y, weights).residual == pytest.approx(
        kkt_residual(head, hidden, y, weights).residual, rel=1e-10
    )
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter of the model requires a gradient.* call model\.requires_grad_"):
        kkt_residual(model, x, y)


def test_the_model_and_the_random_state_are_untouched():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3))
    x = torch.randn(8, 4)
    before, state = snapshot(model), torch.get_rng_state()
    assert kkt_residual(model, x, torch.arange(8) % 3).residual < 1
    assert homogeneity(model, x) is None
    same_snapshot(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_are_all_zero_say_nothing():
    model = network()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="all trained weights of the model are 0"):
        kkt_residual(model, torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))


def test_wrong_multipliers_and_targets():
    with pytest.raises(ValueError, match=r"multipliers must have the shape \(4, 2\), not \(4, 3\)"):
        kkt_residual(network(), torch.randn(4, 4), torch.tensor([0, 1, 2, 0]), torch.rand(4, 3))
    with pytest.raises(ValueError, match="label 7 is out of range"):
        kkt_residual(network(), torch.randn(4, 4), torch.tensor([0, 1, 2, 7]))


def test_inputs_of_another_shape():
    with pytest.raises(ValueError, match=r"cannot take inputs of the shape \(5,\), beside that of the batch"):
        kkt_residual(network(), torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"cannot take inputs of the shape \(5,\)"):
        homogeneity(network(), torch.randn(4, 5))


DEEP = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)]

CONVOLUTION = [nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3, bias=False)]


@pytest.mark.parametrize(
    ("layers", "shape", "degree"),
    [
        (DEEP, (4,), 3),
        ([nn.Linear(4, 3)], (4,), 1),
        ([nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)], (4,), None),
        ([nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3, bias=False)], (4,), None),
        ([nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3, bias=False)], (4,), None),
        (CONVOLUTION, (1, 8, 8), 2),
    ],
    ids=["one bias", "linear", "biases", "gelu", "fresh batchnorm", "conv and maxpool"],
)  # fmt: skip
def test_homogeneity(layers, shape, degree):
    assert homogeneity(nn.Sequential(*layers), torch.zeros(1, *shape)) == degree


def test_biases_that_are_still_zero_and_frozen_layers():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(net[2].bias)
    assert homogeneity(net, torch.zeros(1, 4)) is None
    net[2].bias.requires_grad_(False)  # it stays 0
    assert homogeneity(net, torch.zeros(1, 4)) == 2
    net[0].requires_grad_(False)
    assert homogeneity(net, torch.zeros(1, 4)) == 1


@pytest.mark.parametrize("distance", [1.0, 10.0, 1e3, 1e6])
def test_a_split_that_the_first_layer_does_not_see_changes_nothing_at_any_distance(distance):
    x, y = torch.randn(5, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    net = network(inputs=12, width=30)
    span = torch.linalg.svd(x).Vh
    net[0].weight.data = net[0].weight.data @ span[:5].T @ span[:5]
    found = kkt_residual(net, x, y)
    far = distance * float(x.norm(dim=1).mean())
    halves = split(x, y, found.multipliers, 1, 3 * span[-1], forward=far, backward=2 * far)
    assert abs(kkt_residual(net, *halves).residual - found.residual) <= 1e-12
    with torch.no_grad():
        assert float((net(halves.inputs[[1, 5]]) - net(x[[1, 1]])).abs().max()) <= 1e-6
    assert float((halves.inputs[1] - x[1]).norm()) == pytest.approx(far)
    torch.testing.assert_close(halves.multipliers[[1, 5]].sum(0), found.multipliers[1])
    shares = (halves.multipliers[[1, 5]] / found.multipliers[1].clamp_min(1e-300)).amax(1)
    torch.testing.assert_close(shares @ halves.inputs[[1, 5]], x[1], atol=1e-9 * far, rtol=0)
    assert halves.targets.tolist() == [0, 1, 2, 0, 1, 1]
    rest = [0, 2, 3, 4]
    assert torch.equal(halves.inputs[rest], x[rest])
    assert torch.equal(halves.multipliers[rest], found.multipliers[rest])


def test_a_split_along_a_gate_changes_the_residual_once_the_gate_changes():
    net, x, y = by_hand()
    weights = kkt_residual(net, x, y).multipliers
    for distance, opened in [(1.9, False), (2.5, True)]:  # x - 2.5 ν has a negative first coordinate
        halves = split(x, y, weights, 0, torch.tensor([1.0, 0.0]), forward=1.0, backward=distance)
        assert (kkt_residual(net, *halves).residual > 1e-3) is opened


def test_wrong_splits():
    x, y, weights, direction = torch.zeros(2, 3), torch.tensor([0, 1]), torch.ones(2, 1), torch.ones(3)
    for changed, message in [
        ({"place": 2}, "place must be an integer from 0 to 1, not 2"),
        ({"direction": torch.ones(2)}, r"direction must have the shape \(3,\), not \(2,\)"),
        ({"direction": torch.zeros(3)}, "direction must have a length above 0"),
        ({"forward": 0.0}, "forward must be a number above 0, not 0.0"),
        ({"backward": -1.0}, "backward must be a number above 0, not -1.0"),
    ]:
        given = {"place": 0, "direction": direction, "forward": 1.0, "backward": 1.0, **changed}
        with pytest.raises(ValueError, match=message):
            split(x, y, weights, given.pop("place"), given.pop("direction"), **given)
    with pytest.raises(ValueError, match=r"multipliers \(2, K - 1\), not \(2,\) and \(3, 2\)"):
        split(x, y, torch.ones(3, 2), 0, direction, forward=1.0, backward=1.0)
    with pytest.raises(TypeError, match=r"inputs must be floats, .* not torch.int64"):
        split(x.long(), y, weights, 0, direction, forward=1.0, backward=1.0)
