import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cwrf.checks import check_choice, check_confidence, check_flag, check_integer, check_number


@pytest.mark.parametrize("value", ["0.5", True, None, [0.5], torch.tensor(0.5), 1j, Decimal("0.5"), np.bool_(True)])
def test_no_number(value):
    with pytest.raises(TypeError, match="rate must be a number, not"):
        check_number("rate", value, low=0, high=1)


@pytest.mark.parametrize("value", [1, 0.25, np.float32(0.5), np.int64(1)])
def test_numbers(value):
    check_number("rate", value, low=0, high=1)


@given(st.floats(), st.floats(-5, 5), st.floats(-5, 5), st.booleans(), st.booleans())
def test_range(value, low, high, low_open, high_open):
    inside = (low < value if low_open else low <= value) and (value < high if high_open else value <= high)
    if inside:
        check_number("x", value, low=low, high=high, low_open=low_open, high_open=high_open)
    else:
        with pytest.raises(ValueError, match="x must be a number in"):
            check_number("x", value, low=low, high=high, low_open=low_open, high_open=high_open)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_only_finite_numbers(value):
    with pytest.raises(ValueError, match="x must be a finite number, not"):
        check_number("x", value)
    with pytest.raises(ValueError, match="x must be a number of at least 0, not"):
        check_number("x", value, low=0)
    with pytest.raises(ValueError, match="x must be a number below 3, not"):
        check_number("x", value, high=3, high_open=True)


@pytest.mark.parametrize("value", [2.0, "2", True, None, np.float64(2)])
def test_no_integer(value):
    with pytest.raises(TypeError, match="n must be an integer, not"):
        check_integer("n", value)


def test_integers():
    check_integer("n", np.int32(4), low=4, high=4)
    with pytest.raises(ValueError, match="n must be an integer from 1 to 3, not 4"):
        check_integer("n", 4, low=1, high=3)
    with pytest.raises(ValueError, match=r"n must be an integer of at most 3, not 4\. Fewer\."):
        check_integer("n", 4, high=3, hint="Fewer.")


def test_others():
    check_flag("f", False)
    with pytest.raises(TypeError, match="f must be True or False, not the int 1"):
        check_flag("f", 1)
    check_choice("c", "a", ("a", "b"))
    with pytest.raises(ValueError, match="c must be 'a' or 'b', not None"):
        check_choice("c", None, ("a", "b"))
    check_confidence(0.9)
    for value in (0, 1, math.nan):
        with pytest.raises(ValueError, match="confidence must be a number in"):
            check_confidence(value)
