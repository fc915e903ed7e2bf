"""Balanced halves of a pool."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cwrf.shadows import balanced_membership


@given(st.integers(1, 8), st.integers(2, 50), st.integers(0, 99))
def test_membership_is_balanced(pairs, examples, seed):
    membership = balanced_membership(2 * pairs, examples, seed)
    assert (membership.sum(0) == pairs).all()
    assert ((membership.sum(1) - examples / 2).abs() <= 0.5).all()
    assert torch.equal(membership, balanced_membership(2 * pairs, examples, seed))
    more = balanced_membership(2 * pairs + 2, examples, seed)
    assert torch.equal(more[: 2 * pairs], membership)


def test_pairs_differ():
    membership = balanced_membership(6, 40)
    assert len({tuple(row.tolist()) for row in membership}) == 6


@pytest.mark.parametrize(("k", "n", "message"), [(3, 10, "even"), (0, 10, "even"), (2, 1, "at least 2 examples")])
def test_invalid_sizes_raise(k, n, message):
    with pytest.raises(ValueError, match=message):
        balanced_membership(k, n)


@pytest.mark.parametrize("arguments", [(2.0, 4), (2, 4.0), ("2", 4), (2, 4, -1), (2, 4, 1.5)])
def test_invalid_numbers_raise(arguments):
    with pytest.raises((TypeError, ValueError), match="must be an integer"):
        balanced_membership(*arguments)
