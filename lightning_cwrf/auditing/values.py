"""The values of an audit: each with its interval, and the members that an attack finds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_cwrf.metrics import Interval

FPR = 1e-3
"""The false positive rate that tables show."""


@dataclass(frozen=True)
class Estimate:
    """A value, its confidence interval, its p-value against chance, and a note on the limits of the sample size.

    ``interval`` is for these very shadow models; ``shadow_interval``, if requested, also covers the choice of shadow
    models.
    """

    value: float
    interval: Interval
    note: str | None = None
    p_value: float | None = None
    shadow_interval: Interval | None = None

    def __str__(self) -> str:
        if self.is_lower_bound:
            return f"≥ {self.value:.3f}"
        return f"{self.value:.3f} [{self.interval.low:.3f}, {self.interval.high:.3f}]"

    @property
    def is_lower_bound(self) -> bool:
        """Whether the value is a bound from below, which is an interval of its own."""
        return math.isinf(self.interval.high) and math.isfinite(self.interval.low)


class Exposed(NamedTuple):
    """A member that an attack finds: its index among the members, its class and its score.

    ``false_positive_rate`` is the share of non-members with at least this score.
    """

    member: int
    target: int
    score: float
    false_positive_rate: float


def estimate_of(content: dict[str, Any]) -> Estimate:
    """An estimate from its saved form."""
    interval, over_shadows = (
        None if bounds is None else Interval(*map(float, bounds))
        for bounds in (content["interval"], content["shadow_interval"])
    )
    assert interval is not None
    p_value = content["p_value"]
    return Estimate(
        float(content["value"]),
        interval,
        content["note"],
        None if p_value is None else float(p_value),
        over_shadows,
    )
