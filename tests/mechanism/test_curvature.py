"""The curvature of public data: against loops and the Hessian, and that nothing private is in it."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_cwrf.mechanism import PublicCurvature, exponential_mechanism, public_curvature
from tests.helpers import Classifier, loader, same_snapshot, snapshot
from tests.mechanism.cases import data, network
from tests.oracles import mechanism as oracle


def undamped(curvature, damping):
    """H from H + damping · tr(H)/k · I."""
    found = curvature.cholesky @ curvature.cholesky.mT
    mean = float(found.trace()) / len(found) / (1 + damping)
    return found - damping * mean * torch.eye(len(found), dtype=torch.float64)


def test_it_is_the_hessian_of_a_linear_softmax_model():
    torch.manual_seed(0)
    model, public = nn.Linear(4, 3).double(), data(30, 1)
    inputs, targets = public.tensors

    def loss(theta):
        return nn.functional.cross_entropy(inputs @ theta[:12].view(3, 4).T + theta[12:], targets)

    theta = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    expected = torch.autograd.functional.hessian(loss, theta)
    for batch in (7, 30):  # labels do not matter: the Hessian of a linear model has none
        found = public_curvature(model, DataLoader(public, batch_size=batch), damping=0.1)
        assert torch.allclose(undamped(found, 0.1), expected, atol=1e-10)


@pytest.mark.parametrize("parameters", ["head", "all", ["0.weight"]])
def test_it_is_the_gauss_newton_matrix_of_a_network(parameters):
    model, public = network(), data(20, 2)
    found = public_curvature(model, public, parameters=parameters)
    expected = oracle.gauss_newton(model, public.tensors[0], found.names)
    assert torch.allclose(undamped(found, 3e-3), expected, atol=1e-10)


def test_whitening_is_that_of_the_inverse():
    found = public_curvature(network(), data(20, 2), damping=0.1)
    inverse = torch.linalg.inv(found.cholesky @ found.cholesky.mT)
    gradients = torch.randn(6, found.dimensions, dtype=torch.float64)
    norms = torch.stack([(g @ inverse @ g).sqrt() for g in gradients])
    assert torch.allclose(found.whiten(gradients).norm(dim=1), norms)
    assert torch.allclose(found.unwhiten(found.whiten(gradients)), gradients @ inverse)
    assert torch.allclose(found.unwhiten(found.whiten(gradients)[0]), inverse @ gradients[0])


def test_the_clipping_norm_is_half_the_median_over_public_examples():
    """With labels of the softmax: under one that is almost sure of a class, they are this class."""
    model, public = network(), data(51, 3)
    model[2].weight.data.zero_()
    model[2].bias.data.copy_(torch.tensor([0.0, 30.0, 0.0]))
    found = public_curvature(model, public, damping=1.0)
    gradients = oracle.gradients(model, public.tensors[0], torch.full((51,), 1), found.names)
    assert found.clip == pytest.approx(float(found.whiten(gradients).norm(dim=1).median()) / 2)
    assert public_curvature(model, public, clip=0.7).clip == 0.7


def test_the_clipping_norm_of_a_subspace_is_of_projected_gradients():
    model, public = network(), data(40, 3)
    found = public_curvature(model, public, parameters="all", subspace=5, seed=3)
    assert found.cholesky.shape == (5, 5)
    whole = public_curvature(model, public, parameters="all")
    basis = found.subspace.basis.double()
    expected = basis.T @ undamped(whole, 3e-3) @ basis
    assert torch.allclose(undamped(found, 3e-3), expected, rtol=1e-5, atol=1e-7)


def test_labels_and_a_second_reading_change_nothing():
    model, public = network(), data(30, 4)
    first = public_curvature(model, public)
    wrong = DataLoader(torch.utils.data.TensorDataset(public.tensors[0], torch.full((30,), 77)), batch_size=30)
    again = public_curvature(model, wrong)
    assert torch.equal(first.cholesky, again.cholesky)
    assert first.clip == again.clip


def test_the_model_and_the_random_state_stay_as_they_are():
    model = Classifier().train()
    before, state = snapshot(model), torch.get_rng_state()
    public_curvature(model, loader(0, 40))
    same_snapshot(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())


def test_private_examples_are_recognised_by_the_curvature():
    private = data(40, 7)
    model = network()
    curvature = public_curvature(model, TensorDataset(private.tensors[0][30:].clone(), private.tensors[1][30:]))
    with pytest.raises(ValueError, match=r"10 of the 40 examples of the private data are public .*at positions 30"):
        exponential_mechanism(model, private, curvature, mu=1.0)


def test_public_data_of_which_the_model_is_sure_give_no_clipping_norm():
    model, (inputs, labels) = nn.Linear(4, 3).double(), data(30, 7).tensors
    inputs[:20] *= 1e6
    with pytest.raises(ValueError, match="which cannot be a clipping norm: the model is sure of most public examples"):
        public_curvature(model, TensorDataset(inputs, labels))
    assert public_curvature(model, TensorDataset(inputs, labels), clip=1.0).clip == 1.0


class TwoHeads(nn.Module):
    """The last linear layer gives no logits."""

    def __init__(self):
        super().__init__()
        self.head, self.aside = nn.Linear(4, 3).double(), nn.Linear(4, 7).double()

    def forward(self, input):
        return self.head(input)


class Stream(IterableDataset):
    def __iter__(self):
        yield from data(4, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0}, "damping must be a number above 0, not 0"),
        ({"clip": 0.0}, "clip must be a number above 0, not 0.0"),
        ({"clip": float("inf")}, "clip must be a number above 0, not inf"),
        ({"subspace": 49, "parameters": "all"}, "subspace must be an integer from 1 to 43, not 49"),
        ({"max_dimensions": 17}, r"18 dimensions are more than max_dimensions=17.*pass subspace=k or fewer parameters"),
        ({"subspace": 12, "max_dimensions": 11}, "12 dimensions are more than max_dimensions=11"),
        ({"parameters": "tail"}, "parameters must be"),
    ],
)
def test_wrong_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        public_curvature(network(), data(10, 0), **settings)


def test_wrong_data_and_models_raise():
    with pytest.raises(ValueError, match="public holds no batch"):
        public_curvature(network(), [])
    with pytest.raises(TypeError, match="public must be data that can be read twice"):
        public_curvature(network(), Stream())
    with pytest.raises(TypeError, match="public: expected a DataLoader"):
        public_curvature(network(), 3)
    with pytest.raises(ValueError, match=r"the last nn\.Linear, aside, has 7 outputs and the model 3 classes"):
        public_curvature(TwoHeads(), data(10, 0))
    sure = network()
    sure[2].weight.data.zero_()
    sure[2].bias.data.copy_(torch.tensor([0.0, 1e4, 0.0]))
    with pytest.raises(ValueError, match="the curvature on the public data is 0"):
        public_curvature(sure, data(10, 0))
    broken = network()
    broken[2].bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits on the public data are NaN"):
        public_curvature(broken, data(10, 0))
    with pytest.raises(ValueError, match="cholesky must be float64 of shape"):
        PublicCurvature(torch.eye(2), 1.0, ["weight"])
