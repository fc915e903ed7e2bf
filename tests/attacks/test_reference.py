"""Attack P, Attack R and the loss attack."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cwrf.attacks import (
    attack_p,
    attack_r,
    loss_threshold,
)
from tests.attacks.cases import close, seeds, shadowed, tensor
from tests.oracles import attacks as oracle


@given(seeds, st.booleans())
def test_attacks_p_and_r_against_loops(seed, coarse):
    target, shadows, membership = shadowed(seed)
    losses, shadow_losses, population = target.abs(), shadows.abs(), torch.rand(12, dtype=torch.float64)
    if coarse:
        losses, shadow_losses, population = ((t * 2).round() / 2 for t in (losses, shadow_losses, population))
    close(attack_p(losses, population), oracle.attack_p(losses.tolist(), population.tolist()))
    lists = losses.tolist(), shadow_losses.tolist(), membership.tolist()
    close(attack_r(losses, shadow_losses, membership), oracle.attack_r(*lists))


def test_attacks_p_and_r_by_hand():
    assert attack_p(tensor(1, 0, -0.5), tensor(1, 2, 0)).tolist() == pytest.approx([2.5 / 4, 4 / 4, 4 / 4])
    membership = torch.tensor([[False, True], [False, False], [True, False]])
    shadow_losses = tensor([1, 5], [3, 2], [9, 4])
    # OUT losses 1, 3 of the first and 2, 4 of the second.
    scores = attack_r(tensor(3, 1), shadow_losses, membership)
    expected = [(1 + 1 / (1 + math.exp(1))) / 3, (2 + 1 / (1 + math.exp(-2))) / 3]
    assert scores.tolist() == pytest.approx(expected)
    out_alone = torch.zeros(3, 2, dtype=torch.bool)
    assert attack_r(tensor(3, 1), shadow_losses, out_alone).shape == (2,)


def test_the_loss_attack_is_minus_the_loss():
    losses = torch.tensor([0.1, 3.0, 0.5])
    assert loss_threshold(losses).argsort(descending=True).tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match=r"losses has NaN or infinite values at examples \[0\]"):
        loss_threshold(torch.tensor([float("nan"), 1.0]))
