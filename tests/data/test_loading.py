from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lightning_cwrf.data import bring_to, move


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Words(OrderedDict):
    """As tokenizers give them: a mapping of their own class, with attributes."""


@dataclass
class Batch:
    x: torch.Tensor
    text: str


@pytest.mark.parametrize("make", [lambda x: (x, ["a"]), lambda x: [x], lambda x: Pair(x, x.long()),
                                  lambda x: Words(x=x, text="a"), lambda x: Batch(x, "a")])  # fmt: skip
def test_a_moved_batch_keeps_its_form(make):
    batch = make(torch.zeros(2))
    moved = move(batch, torch.device("cpu"), torch.bfloat16)
    assert type(moved) is type(batch)
    assert str(moved).replace(", dtype=torch.bfloat16", "") == str(batch)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64)],
)
def test_inputs_have_the_precision_of_a_model_that_is_not_of_single_precision(dtype, expected):
    x, y = bring_to(nn.Linear(2, 2).to(dtype))((torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1])))
    assert x.dtype == expected
    assert y.dtype == torch.int64


def test_a_transfer_of_the_users_comes_before_the_precision_of_the_model():
    seen = []

    def transfer(batch):
        seen.append(batch.dtype)
        return batch + 1

    found = bring_to(nn.Linear(2, 2).bfloat16(), transfer)(torch.zeros(1))
    assert seen == [torch.float32]
    assert found.dtype == torch.bfloat16
    assert found.item() == 1
