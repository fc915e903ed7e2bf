"""The error of a mean over shadow models and over examples, which are crossed: every model meets every example."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import special
from torch import Tensor

from lightning_cwrf.checks import check_confidence
from lightning_cwrf.metrics.functional.intervals import Interval


@dataclass(frozen=True)
class CrossedJackknife:
    """A mean over models and examples, and what its error is estimated from.

    Two sources of error are jackknifed, and what they share is subtracted once (a two-way random-effects analysis of
    variance): the models, by leaving out one complementary pair at a time, as targets and as shadow models; and the
    examples, by leaving out one group at a time. That the targets attack one another with the same shadow models makes
    their values depend on one another, so the spread over targets is not enough: where every attack is repeated without
    the pair, the jackknife covers that too. ``docs/numbers.md`` has the simulated coverage.

    Attributes:
        value: the mean over all models and examples.
        without_pair: float64 ``(P,)``, the mean without each pair.
        cells: float64 ``(P, G)``, for each pair of targets the pseudo-value G θ − (G − 1) θ₍₋g₎ of each group.

    >>> import torch
    >>> cells = torch.tensor([[0.7, 0.5], [0.6, 0.4]], dtype=torch.float64)
    >>> jackknife = CrossedJackknife(0.55, torch.tensor([0.5, 0.6], dtype=torch.float64), cells)
    >>> [round(bound, 3) for bound in jackknife.interval()]
    [-0.142, 1.242]
    """

    value: float
    without_pair: Tensor
    cells: Tensor

    def __sub__(self, other: CrossedJackknife) -> CrossedJackknife:
        """The difference of two means over the same pairs and groups."""
        return CrossedJackknife(
            self.value - other.value, self.without_pair - other.without_pair, self.cells - other.cells
        )

    @property
    def variances(self) -> tuple[float, float, float]:
        """Of the mean: over pairs of models, over groups of examples, and of both together, which each of them has."""
        pairs, groups = self.cells.shape
        rows, columns, mean = self.cells.mean(1), self.cells.mean(0), self.cells.mean()
        residual = self.cells - rows[:, None] - columns + mean
        over_pairs = (pairs - 1) / pairs * (self.without_pair - self.without_pair.mean()).square().sum()
        over_groups = (columns - mean).square().sum() / (groups * (groups - 1))
        shared = residual.square().sum() / ((pairs - 1) * (groups - 1) * pairs * groups)
        return float(over_pairs), float(over_groups), float(shared)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        over_pairs, over_groups, shared = self.variances
        return math.sqrt(max(over_pairs + over_groups - shared, over_pairs, over_groups))

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the error, by Satterthwaite's approximation."""
        pairs, groups = self.cells.shape
        over_pairs, over_groups, _ = self.variances
        spread = over_pairs**2 / (pairs - 1) + over_groups**2 / (groups - 1)
        return self.error**4 / spread if spread > 0 else float(pairs - 1)

    def interval(self, confidence: float = 0.95) -> Interval:
        """A two-sided interval of the mean over other models and examples of the same kind, by Student's t."""
        check_confidence(confidence)
        reach = float(special.stdtrit(self.freedom, (1 + confidence) / 2)) * self.error
        return Interval(self.value - reach, self.value + reach)

    def p_value(self, null: float = 0.0) -> float:
        """The probability of so high a value if the mean over all models and examples is ``null`` (one-sided)."""
        if self.error == 0:
            return 0.0 if self.value > null else 1.0
        return float(special.stdtr(self.freedom, (null - self.value) / self.error))

    def two_sided_p_value(self) -> float:
        """The probability of a value so far from 0, in either direction, if the mean over all is 0; NaN of NaN."""
        if math.isnan(self.value):
            return self.value
        if self.error == 0:
            return 1.0 if self.value == 0 else 0.0
        p = self.p_value()
        return min(1.0, 2 * min(p, 1 - p))
