"""Finished weights: their values, in a file and in a model."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_cwrf.weights.reading import check_values

FILE = Path("finished.pt")


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("unset", torch.tensor(torch.nan))


def with_value(name, value):
    state = Masked().state_dict()
    state[name] = torch.full_like(state[name], value)
    return state


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["layer.weight", "layer.bias", "norm.weight", "norm.running_mean", "norm.running_var"])
def test_what_was_trained_must_be_finite(name, value):
    with pytest.raises(
        ValueError, match=rf"finished\.pt has NaN or infinite values in '{name}': the training diverged"
    ):
        check_values(Masked(), with_value(name, value), FILE)


def test_other_buffers_may_hold_anything():
    check_values(Masked(), Masked().state_dict(), FILE)
    check_values(Masked(), {**with_value("mask", torch.nan), "unknown": torch.tensor(torch.nan)}, FILE)


def test_whole_numbers_are_no_weights():
    state = {**Masked().state_dict(), "layer.bias": torch.zeros(2, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"'layer\.bias' as torch\.int8, and the model has torch\.float32"):
        check_values(Masked(), state, FILE)


def test_a_parameter_with_two_names_is_looked_at_under_each():
    model = Masked()
    model.twin = model.layer
    state = {**model.state_dict(), "twin.weight": torch.full((2, 2), torch.nan)}
    with pytest.raises(ValueError, match=r"in 'twin\.weight'"):
        check_values(model, state, FILE)
