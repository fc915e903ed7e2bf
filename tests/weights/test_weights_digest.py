"""A digest by which an audit knows its weights."""

import copy

import pytest
import torch
from torch import nn

from lightning_cwrf.auditing import audit
from lightning_cwrf.defenses import HAMPOutput, create_defense
from lightning_cwrf.weights import weights_digest
from tests.helpers import part, trained


def test_it_is_of_every_value_and_of_buffers():
    model = trained()[0]
    found = [weights_digest(model), weights_digest(copy.deepcopy(model))]
    assert found[0] == found[1] != ""
    with torch.no_grad():
        model.net[1].running_mean[3] += 1e-6
    found.append(weights_digest(model))
    with torch.no_grad():
        model.net[5].bias[9] = -model.net[5].bias[9]
    found.append(weights_digest(model))
    found.append(weights_digest(model.double()))
    assert len(set(found)) == 4


@pytest.mark.slow
def test_compiling_and_defenses_do_not_change_it_and_a_wrapper_does():
    model = trained()[0]
    before = weights_digest(model)
    assert weights_digest(torch.compile(model)) == before
    assert weights_digest(nn.ModuleDict({"a": torch.compile(model)})) == weights_digest(nn.ModuleDict({"a": model}))
    assert weights_digest(create_defense("relaxloss", alpha=0.5).attach(model)) == before
    assert weights_digest(HAMPOutput(model)) not in ("", before)  # it answers otherwise


def test_it_is_unknown_where_weights_are_no_plain_tensors():
    class Packed(nn.Linear):
        def get_extra_state(self):
            return (torch.zeros(2),)

        def set_extra_state(self, state):
            pass

    assert (
        weights_digest(Packed(2, 2))
        == weights_digest(nn.LazyLinear(2))
        == weights_digest(nn.Linear(2, 2).to("meta"))
        == ""
    )


@pytest.mark.parametrize("wrap", [lambda model: model, pytest.param(torch.compile, marks=pytest.mark.slow)])
def test_an_audit_has_the_digest_of_its_model(wrap):
    model = trained()[0]
    before = weights_digest(model)
    result = audit(wrap(model), members=part(0, 64), nonmembers=part(64, 128))
    assert result.weights == weights_digest(model) == before
