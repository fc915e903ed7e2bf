"""Gradients of single examples, and which parameters they are of."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_cwrf.mechanism import Subspace, example_gradients
from lightning_cwrf.mechanism.gradients import label_gradients
from lightning_cwrf.mechanism.parameters import flat, parameter_names, write
from tests.helpers import Classifier, loader
from tests.mechanism.cases import data, network
from tests.oracles import mechanism as oracle


def test_gradients_are_those_of_a_backward_pass_for_each_example():
    model, (inputs, targets) = network(), data(9, 1).tensors
    for names in (["2.weight", "2.bias"], [name for name, _ in model.named_parameters()]):
        found = example_gradients(model, (inputs, targets), names)
        assert torch.allclose(found, oracle.gradients(model, inputs, targets, names), atol=1e-12)


def test_gradients_of_a_lightning_module_in_single_precision_and_elsewhere():
    model = Classifier().eval()
    batch = next(iter(loader(0, 20, batch_size=20)))
    names = [name for name, _ in model.named_parameters()]
    found = example_gradients(model, batch, names)
    assert torch.allclose(found, oracle.gradients(model, *batch, names), atol=1e-6)
    moved = flat(model, names) + 0.1
    there = example_gradients(model, batch, names, moved)
    assert torch.equal(example_gradients(model, batch, names), found)  # the model has not moved
    write(model, names, moved)
    assert torch.allclose(there, example_gradients(model, batch, names), atol=1e-6)


def test_label_gradients_are_those_under_each_label_and_read_no_label():
    model, (inputs, _) = network(), data(6, 2).tensors
    names = ["2.weight", "2.bias"]
    found, p = label_gradients(model, (inputs, torch.full((6,), 99)), names)
    assert torch.allclose(p, model(inputs).softmax(1))
    for label in range(3):
        expected = oracle.gradients(model, inputs, torch.full((6,), label), names)
        assert torch.allclose(found[:, label], expected, atol=1e-12)
    for batch in (inputs, [inputs], {"input": inputs}):
        assert torch.equal(label_gradients(model, batch, names)[0], found)


def test_dicts_without_labels_are_taken_as_those_with_labels():
    class Named(nn.Linear):
        def forward(self, features):
            return super().forward(features)

    torch.manual_seed(0)
    model, inputs = Named(4, 3).double(), data(6, 2).tensors[0]
    labels = torch.zeros(6, dtype=torch.long)
    expected = label_gradients(model, {"x": inputs, "label": labels}, ["weight"])[0]
    assert torch.equal(label_gradients(model, {"x": inputs}, ["weight"])[0], expected)


class ReadsValues(nn.Module):
    """Control flow by a value, which has no vectorised form."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, input):
        return self.layer(input) * (2.0 if input[0, 0] > 0 else 1.0)


def test_a_model_that_cannot_be_vectorised_is_taken_example_by_example():
    model, (inputs, targets) = ReadsValues(), data(7, 3).tensors
    names = ["layer.weight", "layer.bias"]
    assert torch.allclose(
        example_gradients(model, (inputs, targets), names), oracle.gradients(model, inputs, targets, names)
    )


def test_one_logit_and_arrays_and_dicts():
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 1).double(), data(5, 4).tensors[0]
    targets = torch.tensor([0, 1, 1, 0, 1])
    found = example_gradients(model, {"input": inputs, "label": targets.numpy()}, ["weight", "bias"])
    z = model(inputs)[:, 0]
    expected = (torch.sigmoid(z) - targets)[:, None] * F.pad(inputs, (0, 1), value=1.0)
    assert torch.allclose(found, expected, atol=1e-12)


def test_parameters_are_chosen_by_kind_or_name():
    model = network()
    assert parameter_names(model, "head") == ["2.weight", "2.bias"]
    assert parameter_names(model, ["2.bias", "0.weight"]) == ["0.weight", "2.bias"]  # the model's order
    model[0].weight.requires_grad_(False)
    assert parameter_names(model, "all") == ["0.bias", "2.weight", "2.bias"]


def test_a_tied_head_is_found_under_its_first_name():
    model = nn.ModuleDict({"embed": nn.Embedding(3, 5), "head": nn.Linear(5, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    assert parameter_names(model, "head") == parameter_names(model, ["head.weight"]) == ["embed.weight"]


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ("tail", ValueError, 'must be "head", "all" or a list of names, not \'tail\''),
        ([1], TypeError, "or a list of names"),
        (["3.weight"], ValueError, r"no parameter '3.weight'; its parameters are 0.weight, 0.bias, 2.weight, 2.bias"),
        (["0.bias"], ValueError, r"0.bias is frozen \(requires_grad is False\)"),
        ([], ValueError, "there is no parameter to train"),
    ],
)
def test_wrong_parameters_raise(parameters, error, message):
    model = network()
    model[0].bias.requires_grad_(False)
    with pytest.raises(error, match=message):
        parameter_names(model, parameters)


def test_models_without_a_head_or_without_parameters_raise():
    with pytest.raises(ValueError, match=r"no nn\.Linear that could be its head"):
        parameter_names(nn.Conv2d(1, 1, 1), "head")
    with pytest.raises(ValueError, match="there is no parameter to train"):
        parameter_names(network().requires_grad_(False), "all")


def test_batches_that_examples_could_share_are_refused():
    model, (inputs, targets) = network(), data(4, 1).tensors
    with pytest.raises(TypeError, match="batches of tensors, and this one holds a str"):
        example_gradients(model, {"x": inputs, "label": targets, "name": ["a", "b", "c", "d"]}, ["2.bias"])
    with pytest.raises(ValueError, match=r"one row for each example, these have the shapes .*could hold any of them"):
        example_gradients(model, {"x": inputs, "label": targets, "edges": torch.zeros(2, 9)}, ["2.bias"])
    with pytest.raises(ValueError, match="one row for each example"):
        example_gradients(model, {"x": inputs, "label": targets, "longest": torch.tensor(3)}, ["2.bias"])
    with pytest.raises(ValueError, match="label 7 is out of range"):
        example_gradients(model, (inputs, torch.tensor([0, 1, 2, 7])), ["2.bias"])


def test_a_subspace_is_a_function_of_its_seed_and_moves_in_its_range():
    first, again, other = (Subspace.draw(50, 4, seed) for seed in (3, 3, 4))
    assert torch.equal(first.basis, again.basis)
    assert not torch.equal(first.basis, other.basis)
    g, z = torch.randn(7, 50), torch.randn(4, dtype=torch.float64)
    assert torch.allclose(first.project(g), g @ first.basis)
    assert torch.allclose(first.lift(z), first.basis.double() @ z, atol=1e-6)
