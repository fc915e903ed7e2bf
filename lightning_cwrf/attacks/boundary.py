"""The boundary distance attack (Choquette-Choo et al. 2021): label-only, by HopSkipJump with a budget of queries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_cwrf.attacks.label_only import Labels, bounds_of, labels_only, read_inputs, warn_of_coding
from lightning_cwrf.checks import check_integer
from lightning_cwrf.data import Batches
from lightning_cwrf.metrics.functional import membership_auroc

_POINTS = 1 << 23
"""Numbers in the points or in the distances of one block of examples: its size follows from it."""
_SEARCHES = 7
"""Steps of a binary search, at least; d^-3/2 of the distance is reached in many dimensions d."""
_HALVINGS = 30


@dataclass(frozen=True)
class BoundaryDistances:
    """How far each example is from the nearest point found with another label, by the number of queries.

    Attributes:
        budgets: numbers of queries for each example, increasing.
        distances: Euclidean, float64 ``(len(budgets), n)``; 0 where the model's label is not the true one. A row is
            what the attack gives with that budget, but for rounding. More queries never make a distance larger.
        queries: those that were really used, int64 ``(n,)``; at most the largest budget.
    """

    budgets: tuple[int, ...]
    distances: Tensor = field(repr=False)
    queries: Tensor = field(repr=False)

    @property
    def scores(self) -> Tensor:
        """The attack's scores at the largest budget, ``(n,)``: higher = more likely a member."""
        return self.distances[-1]

    def aucs(self, is_member: Tensor) -> dict[int, float]:
        """The budget's curve: the attack's AUC by the number of queries for each example.

        Args:
            is_member: bool ``(n,)``.

        >>> found = BoundaryDistances((1, 10), torch.tensor([[2.0, 2.0], [1.5, 1.0]]), torch.tensor([10, 10]))
        >>> found.aucs(torch.tensor([True, False]))
        {1: 0.5, 10: 1.0}
        """
        pairs = zip(self.budgets, self.distances, strict=True)
        return {budget: float(membership_auroc(row, is_member)) for budget, row in pairs}


def boundary_distance(
    model: nn.Module | Labels,
    data: Batches,
    *,
    budget: int = 1000,
    curve: Sequence[int] = (),
    evaluations: int = 25,
    clip: tuple[float, float] | None = None,
    seed: int = 0,
) -> BoundaryDistances:
    """Score examples by their distance to the decision boundary, seeing nothing of the model but labels.

    Members tend to be further from the boundary (Choquette-Choo et al. 2021, arXiv 2007.14321). The boundary is
    approached by HopSkipJump for the Euclidean norm (Chen, Jordan & Wainwright 2020, arXiv 1904.02144): a binary search
    towards the example, an estimate of the boundary's normal from the labels of random points around, and a step along
    it. An example's distance is that of the nearest point that got another label than the example itself did, 0 where
    the model is wrong about the example.

    Each example has ``budget`` queries; the query for its own label is the first, and every later question about a
    point is one. Where HopSkipJump starts from noise, this attack starts from the nearest of the other examples that
    got another label, which costs no further query, and always exists.

    Args:
        model: a classifier, of whose output only the largest logit's place is read; or a function that gives the labels
            ``(b,)`` of inputs ``(b, ...)``, of any engine or a remote API: integers coded as the targets are, as a
            tensor, a NumPy array or a list.
        data: the audited examples, members and non-members together, without random augmentation; batches of one float
            tensor and its targets. The model gets as many inputs at once as the largest of these batches may have
            (256 for a data set), so a loader's ``batch_size`` bounds the memory. All inputs are held on the CPU.
        budget: queries for each example.
        curve: further, smaller budgets to report distances of; they cost nothing. Empty: 1, 3, 10, 30, ...
        evaluations: points of the first estimate of the normal; the t-th has sqrt(t) times as many. HopSkipJump's
            authors have 100, which leaves a budget of 100 without a single step.
        clip: the lowest and the highest value that an input can have. None: those of the data.
        seed: of the random points, which also depend on an example's place in the data, and on nothing else; the
            caller's random state is not touched.

    Warns:
        UserWarning: the labels are right no more often than the most frequent class would be.

    Raises:
        TypeError: data without a float tensor as inputs; a number of the wrong type; labels that are no integers.
        ValueError: a budget out of range; inputs outside of ``clip`` or not finite, or that read differently each time;
            one label for all examples; targets or labels out of range.

    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.tensor([[2.0, 0.0], [0.5, 0.0], [-1.0, 0.0]]), torch.tensor([1, 1, 0]))
    >>> found = boundary_distance(lambda inputs: (inputs[:, 0] > 0).long(), data, budget=300, clip=(-3, 3))
    >>> found.scores.round(decimals=1), found.queries
    (tensor([2.0000, 0.5000, 1.0000], dtype=torch.float64), tensor([300, 300, 300]))
    """
    check_integer("budget", budget, low=1)
    check_integer("evaluations", evaluations, low=2)
    check_integer("seed", seed, low=0, high=2**63 - 1)
    budgets = _budgets(budget, curve)
    examples = read_inputs(data)
    low, high = bounds_of(clip, examples.inputs)
    with labels_only(model, examples) as labels_of:
        asked = _Questions(labels_of, examples.inputs, budgets)
        right = asked.own == examples.targets
        warn_of_coding(right, examples.targets)
        asked.nearest[:, ~right] = 0.0
        rows = right.nonzero().flatten()
        settings = _Settings(low, high, evaluations)
        block = max(1, _POINTS // (settings.most(budget) * asked.points.shape[1]))
        for some in torch.split(rows, block) if len(rows) else ():
            _hop_skip_jump(asked, some, _starts(asked, some), settings, _generators(some, seed))
    return BoundaryDistances(budgets, asked.nearest, asked.used)


class _Settings(NamedTuple):
    low: float
    high: float
    evaluations: int

    def points(self, t: int) -> int:
        """Random points of the t-th iteration."""
        return int(self.evaluations * math.sqrt(t))

    def most(self, budget: int) -> int:
        """At least the random points of the last iteration within a budget."""
        t = 1
        while budget > 0:
            budget -= self.points(t)
            t += 1
        return self.points(t - 1)


class _Questions:
    """Asks for labels, counts the questions of each example, and keeps the nearest point with another label."""

    def __init__(self, labels_of: Callable[[Tensor], Tensor], inputs: Tensor, budgets: tuple[int, ...]) -> None:
        self.labels_of, self.shape, self.budgets = labels_of, inputs.shape[1:], budgets
        self.points = inputs.flatten(1)
        self.own = self._ask(self.points)
        self.used = torch.ones(len(inputs), dtype=torch.long)
        self.nearest = torch.full((len(budgets), len(inputs)), torch.inf, dtype=torch.float64)

    def left(self, rows: Tensor) -> Tensor:
        """Whether these examples have a question left."""
        return self.used[rows] < self.budgets[-1]

    def others(self, rows: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Whether points ``(m, a, d)`` of ``a`` examples have other labels than these, and whether they were asked.

        Points beyond an example's budget are not asked; the first come first.
        """
        number = self.used[rows] + torch.arange(1, len(points) + 1)[:, None]
        asked = number <= self.budgets[-1]
        other = torch.zeros_like(asked)
        other[asked] = self._ask(points[asked]) != self.own[rows].expand_as(asked)[asked]
        self.used[rows] += asked.sum(0)
        self.note(rows, points, other, number)
        return other, asked

    def note(self, rows: Tensor, points: Tensor, other: Tensor, number: Tensor | int) -> None:
        """Keep the distances of points with other labels, by the number of the question."""
        distance = (points.double() - self.points[rows].double()).norm(dim=-1)
        for i, budget in enumerate(self.budgets):
            found = torch.where(other & torch.as_tensor(number <= budget), distance, torch.inf).amin(0)
            self.nearest[i, rows] = torch.minimum(self.nearest[i, rows], found)

    def _ask(self, points: Tensor) -> Tensor:
        return self.labels_of(points.view(-1, *self.shape))


def _generators(rows: Tensor, seed: int) -> list[torch.Generator]:
    """One for each example, so that its random points depend neither on the other examples nor on the budget."""
    seeds = [int(np.random.SeedSequence([seed, row]).generate_state(1)[0]) for row in rows.tolist()]
    return [torch.Generator().manual_seed(each) for each in seeds]


def _starts(asked: _Questions, rows: Tensor) -> Tensor:
    """For each of these examples the nearest one with another label, of which the labels are known already."""
    if bool((asked.own == asked.own[0]).all()):
        raise ValueError(
            f"the model gives the label {int(asked.own[0])} to all {len(asked.own)} examples, so there is none to "
            "start from. Audit examples of several classes together."
        )
    points = asked.points.to(torch.promote_types(asked.points.dtype, torch.float32))
    nearest = []
    for some in torch.split(rows, max(1, _POINTS // len(points))):
        # By matrix products, which are less exact, the result would depend on the number of rows.
        distance = torch.cdist(points[some], points, compute_mode="donot_use_mm_for_euclid_dist")
        nearest.append(distance.masked_fill_(asked.own[some, None] == asked.own, torch.inf).argmin(1))
    starts = asked.points[torch.cat(nearest)]
    asked.note(rows, starts[None], torch.ones(1, len(rows), dtype=torch.bool), 1)
    return starts


def _hop_skip_jump(
    asked: _Questions, rows: Tensor, current: Tensor, settings: _Settings, generators: list[torch.Generator]
) -> None:
    """HopSkipJump from ``current`` ``(a, d)``, points with other labels, until the budget is spent.

    All random points of an iteration are drawn, also those beyond the budget, so that a larger one goes on from there.
    """
    size, d = current.shape
    place = torch.arange(size)
    searches = max(_SEARCHES, math.ceil(1.5 * math.log2(d)))
    for t in itertools.count(1):
        live = asked.left(rows[place])
        place, current = place[live], current[live]
        if len(place) == 0:
            return
        mine = rows[place]
        x = asked.points[mine]
        high, low = torch.ones(len(mine), 1, dtype=x.dtype), torch.zeros(len(mine), 1, dtype=x.dtype)
        for _ in range(searches):
            if not asked.left(mine).any():
                return
            middle = (low + high) / 2
            other, known = asked.others(mine, torch.lerp(x, current, middle)[None])
            high = torch.where(other[0, :, None], middle, high)
            low = torch.where((known & ~other)[0, :, None], middle, low)
        current = torch.lerp(x, current, high)
        distance = (current - x).norm(dim=1, keepdim=True)
        delta = 0.1 * (settings.high - settings.low) * torch.ones_like(distance) if t == 1 else distance / d
        if not asked.left(mine).any():
            return
        drawn = [torch.randn(settings.points(t), d, generator=generators[i], dtype=x.dtype) for i in place.tolist()]
        noise = torch.stack(drawn, 1)
        normal = _normal(asked, mine, current, noise, delta, settings)
        current = _stepped(asked, mine, current, normal, distance / math.sqrt(t), settings)


def _normal(
    asked: _Questions, rows: Tensor, current: Tensor, noise: Tensor, delta: Tensor, settings: _Settings
) -> Tensor:
    """The unit normal of the boundary at ``current``, estimated from the labels of random points around (Eq. 14)."""
    delta = delta.clamp_min(torch.finfo(delta.dtype).tiny)
    points = (current + delta * noise / noise.norm(dim=-1, keepdim=True)).clamp(settings.low, settings.high)
    other, known = asked.others(rows, points)
    sign = torch.where(other, 1.0, -1.0).to(points.dtype) * known
    mean = sign.sum(0) / known.sum(0).clamp_min(1)
    weight = torch.where(mean.abs() == 1, sign, (sign - mean) * known)
    direction = (weight[..., None] * (points - current) / delta).sum(0)
    unit: Tensor = direction / direction.norm(dim=1, keepdim=True).clamp_min(torch.finfo(direction.dtype).tiny)
    return unit


def _stepped(
    asked: _Questions, rows: Tensor, current: Tensor, normal: Tensor, step: Tensor, settings: _Settings
) -> Tensor:
    """The points after the largest step of step, step / 2, ... that keeps another label; or where they were."""
    current, waiting = current.clone(), torch.arange(len(rows))
    for _ in range(_HALVINGS):
        waiting = waiting[asked.left(rows[waiting])]
        if len(waiting) == 0:
            break
        tried = (current + step * normal)[waiting].clamp(settings.low, settings.high)
        other = asked.others(rows[waiting], tried[None])[0][0]
        current[waiting[other]] = tried[other]
        waiting, step = waiting[~other], step / 2
    return current


def _budgets(budget: int, curve: Sequence[int]) -> tuple[int, ...]:
    if isinstance(curve, (str, bytes)) or not isinstance(curve, Sequence):
        raise TypeError(f"curve must be a list of budgets, not {curve!r}.")
    for each in curve:
        check_integer("each budget of the curve", each, low=1, high=budget)
    if not curve:
        curve = [each for k in range(len(str(budget))) for each in (10**k, 3 * 10**k) if each < budget]
    return tuple(sorted({*curve, budget}))
