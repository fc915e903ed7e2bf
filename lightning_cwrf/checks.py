"""Checks of arguments, with one wording for the wrong type, a value out of range, and an unknown choice."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    hint: str = "",
) -> None:
    """Raise unless ``value`` is a finite number from ``low`` to ``high``; ``low_open``: ``low`` itself is excluded.

    Strings, bools, None and tensors are not numbers; NumPy scalars are. The message ends with the sentence ``hint``.

    >>> check_number("rate", 0.03, low=0, high=1)
    >>> check_number("rate", "0.03", low=0, high=1)
    Traceback (most recent call last):
    TypeError: rate must be a number, not the str '0.03'.
    >>> check_number("rate", 1.5, low=0, high=1, hint="It is the fraction of weights to rewind.")
    Traceback (most recent call last):
    ValueError: rate must be a number in [0, 1], not 1.5. It is the fraction of weights to rewind.
    """
    _check_type(name, value, Real, "a number", hint)
    # Written so that NaN fails.
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below and math.isfinite(value)):
        bounds = f"a number {_range(low, high, low_open, high_open)}" if (low, high) != (-math.inf, math.inf) else ""
        raise ValueError(_sentence(f"{name} must be {bounds or 'a finite number'}, not {value}.", hint))


def check_integer(name: str, value: Any, *, low: int | None = None, high: int | None = None, hint: str = "") -> None:
    """Raise unless ``value`` is an integer from ``low`` to ``high``; 3.0 is not one, nor is True.

    >>> check_integer("steps", 0, low=1)
    Traceback (most recent call last):
    ValueError: steps must be an integer of at least 1, not 0.
    >>> check_integer("steps", 30.0, low=1)
    Traceback (most recent call last):
    TypeError: steps must be an integer, not the float 30.0.
    """
    _check_type(name, value, Integral, "an integer", hint)
    if (low is not None and value < low) or (high is not None and value > high):
        if low is None or high is None:
            bounds = f"of at least {low}" if high is None else f"of at most {high}"
        else:
            bounds = f"from {low} to {high}"
        raise ValueError(_sentence(f"{name} must be an integer {bounds}, not {value}.", hint))


def check_flag(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value`` is True or False (a string such as "no" is not).

    >>> check_flag("per_layer", "no")
    Traceback (most recent call last):
    TypeError: per_layer must be True or False, not the str 'no'.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {_shown(value)}.")


def check_choice(name: str, value: Any, choices: Collection[str], *, hint: str = "") -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``.

    >>> check_choice("values", "zeros", ["initial", "zero"])
    Traceback (most recent call last):
    ValueError: values must be 'initial' or 'zero', not 'zeros'.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(_sentence(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}.", hint))


def check_confidence(confidence: Any) -> None:
    """Raise unless ``confidence`` is a number strictly between 0 and 1."""
    check_number("confidence", confidence, low=0, high=1, low_open=True, high_open=True)


def _check_type(name: str, value: Any, kind: type, wanted: str, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(_sentence(f"{name} must be {wanted}, not {_shown(value)}.", hint))


def _shown(value: Any) -> str:
    return "None" if value is None else f"the {type(value).__name__} {value!r}"


def _range(low: float, high: float, low_open: bool, high_open: bool) -> str:
    if high == math.inf:
        return f"above {low:g}" if low_open else f"of at least {low:g}"
    if low == -math.inf:
        return f"below {high:g}" if high_open else f"of at most {high:g}"
    return f"in {'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"


def _sentence(message: str, hint: str) -> str:
    return f"{message} {hint}" if hint else message
