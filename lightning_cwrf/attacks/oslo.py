"""OSLO (Peng et al. 2024): label-only, one query per example, a perturbation made on models of the attacker's own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_cwrf.attacks.label_only import Labels, bounds_of, labels_only, read_inputs
from lightning_cwrf.attacks.signals import check_membership
from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.classification import classification_step
from lightning_cwrf.data import Batches, bring_to
from lightning_cwrf.outputs import evaluating

_BLOCK = 512
"""Examples that are perturbed together."""


class OSLOScores(NamedTuple):
    """What :func:`oslo` found.

    Attributes:
        scores: the share of the perturbed inputs that the audited model still labels right, float64 ``(n,)``.
        survived: bool ``(s, n)``, for each threshold.
        sizes: Euclidean, of the perturbations, float64 ``(s, n)``.
        queries: of the audited model for each example, int64 ``(n,)``; at most the number of thresholds.
    """

    scores: Tensor
    survived: Tensor
    sizes: Tensor
    queries: Tensor


def oslo(
    model: nn.Module | Labels,
    data: Batches,
    surrogates: Sequence[nn.Module],
    membership: Tensor | None = None,
    *,
    thresholds: Sequence[float] = (0.1,),
    validation: int = 3,
    largest: float | None = None,
    stages: int = 40,
    steps: int = 3,
    momentum: float = 1.0,
    clip: tuple[float, float] | None = None,
) -> OSLOScores:
    """OSLO (Peng et al. 2024, arXiv 2405.16978): does the model still label an input right that misleads other models?

    For each example a perturbation is made that misleads models which were not trained on it; of members the audited
    model is more robust than these. It is asked once, for the label of the perturbed example: a right one is evidence
    for membership. Source models give the perturbation's direction, validation models its size: it grows in stages
    until their mean probability of the true class is below a threshold. A perturbation that reaches ``largest`` before
    is used as it is.

    The idea, the sources, the validation models and the threshold are the paper's. What could be read of it, and a
    public port, do not settle the rest, which is this package's choice: iterative gradients with momentum (MI-FGSM)
    under a Euclidean norm; the loss is minus LiRA's signal, whose gradient does not vanish for confident models.

    Args:
        model: as for :func:`~lightning_cwrf.attacks.boundary_distance`; nothing of it is seen but labels.
        data: the audited examples, members and non-members together; batches of one float tensor and its targets.
        surrogates: k models of the attacker's own, trained as the audited one.
        membership: bool ``(k, n)``, True where the surrogate was trained on the example: it is then not used for it.
            None: no surrogate was trained on any.
        thresholds: of the probability, one query each. With one, a score is 0 or 1.
        validation: number of the surrogates not trained on the example that validate; the rest are sources.
        largest: the largest perturbation, Euclidean. None: a quarter of the range of the inputs in each feature.
        stages: in which the perturbation grows to ``largest``.
        steps: of the gradient in each stage.
        momentum: of the gradient.
        clip: the lowest and the highest value that an input can have. None: those of the data.

    Raises:
        TypeError: data without a float tensor as inputs; surrogates that are no modules; a number of the wrong type.
        ValueError: a number out of range; a membership of another shape; an example with too few surrogates.

    >>> from torch.utils.data import TensorDataset
    >>> ours, theirs = nn.Linear(1, 2), lambda inputs: (inputs[:, 0] > 0.5).long()
    >>> _ = ours.weight.data.copy_(torch.tensor([[-9.0], [9.0]])), ours.bias.data.zero_()
    >>> data = TensorDataset(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0]))
    >>> found = oslo(theirs, data, [ours, ours], validation=1, clip=(-4, 4))
    >>> found.scores, found.queries
    (tensor([0., 1.], dtype=torch.float64), tensor([1, 1]))
    """
    inputs, targets = read_inputs(data)
    low, high = bounds_of(clip, inputs)
    levels = _checked(thresholds, validation, stages, steps, momentum)
    if largest is None:
        largest = 0.25 * (high - low) * inputs[0].numel() ** 0.5
    check_number("largest", largest, low=0, low_open=True)
    source, validate = _roles(surrogates, membership, len(targets), validation)
    settings = _Settings(levels, float(largest), stages, steps, momentum, low, high)
    survived = torch.zeros(len(levels), len(targets), dtype=torch.bool)
    sizes, queries = torch.zeros(len(levels), len(targets), dtype=torch.float64), torch.zeros_like(targets)
    with labels_only(model) as labels_of, ExitStack() as stack:
        for each in surrogates:
            stack.enter_context(evaluating(each))
        for rows in torch.split(torch.arange(len(targets)), _BLOCK):
            x, y = inputs[rows], targets[rows]
            points, stage = _perturbed(surrogates, x, y, source[:, rows], validate[:, rows], settings)
            sizes[:, rows] = (points - x).flatten(2).double().norm(dim=-1)
            for i in range(len(levels)):
                new = stage[i] != stage[i - 1] if i else torch.ones_like(y, dtype=torch.bool)
                survived[i, rows] = survived[i - 1, rows] if i else False
                if new.any():  # where the perturbation is the one before, so is the answer
                    survived[i, rows[new]] = labels_of(points[i][new]).cpu() == y[new]
                queries[rows] += new
    return OSLOScores(survived.double().mean(0), survived, sizes, queries)


class _Settings(NamedTuple):
    levels: tuple[float, ...]
    largest: float
    stages: int
    steps: int
    momentum: float
    low: float
    high: float


def _perturbed(
    surrogates: Sequence[nn.Module], x: Tensor, y: Tensor, source: Tensor, validate: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor]:
    """For each level the inputs at the first stage where the validation models are below it, and that stage."""
    levels = torch.tensor(settings.levels)[:, None]
    shape = (-1, *[1] * (x.ndim - 1))
    now, push, rows = x.clone(), torch.zeros_like(x), torch.arange(len(x))
    points = x.expand(len(levels), *x.shape).clone()
    stage = torch.full((len(levels), len(x)), settings.stages)
    waiting = torch.ones_like(stage, dtype=torch.bool)
    for at in range(settings.stages + 1):
        if at:
            step = settings.largest / settings.stages
            for _ in range(settings.steps):
                gradient = _gradient(surrogates, now, y[rows], source[:, rows])
                push = settings.momentum * push + gradient / _norm(gradient).view(shape)
                moved = now + step * push / _norm(push).view(shape) - x[rows]
                moved = moved * (step * at / _norm(moved)).clamp_max(1.0).view(shape)
                now = (x[rows] + moved).clamp(settings.low, settings.high)
        first = waiting[:, rows]
        if at < settings.stages:  # at the end, the perturbation is used as it is
            first = first & (_confidence(surrogates, now, y[rows], validate[:, rows]) < levels)
        place = first.nonzero()
        points[place[:, 0], rows[place[:, 1]]] = now[place[:, 1]]
        stage[place[:, 0], rows[place[:, 1]]] = at
        waiting[place[:, 0], rows[place[:, 1]]] = False
        left = waiting[:, rows].any(0)
        now, push, rows = now[left], push[left], rows[left]
        if len(rows) == 0:
            break
    return points, stage


def _norm(values: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return found.clamp_min(torch.finfo(values.dtype).tiny)


def _gradient(surrogates: Sequence[nn.Module], x: Tensor, y: Tensor, source: Tensor) -> Tensor:
    """Of minus the mean signal of each example's sources."""
    found = torch.zeros_like(x)
    for each, used in zip(surrogates, source, strict=True):
        if used.any():
            with torch.enable_grad():
                given = x[used].requires_grad_()
                z, t = classification_step(each, bring_to(each)((given, y[used])))
                true = t[:, None]
                signal = z.gather(1, true)[:, 0] - z.scatter(1, true, -torch.inf).logsumexp(1)
                found[used] -= torch.autograd.grad(signal.sum(), given)[0]
    return found


def _confidence(surrogates: Sequence[nn.Module], x: Tensor, y: Tensor, validate: Tensor) -> Tensor:
    """The mean probability that each example's validation models give to its class."""
    found = torch.zeros(len(x))
    for each, used in zip(surrogates, validate, strict=True):
        if used.any():
            z, t = classification_step(each, bring_to(each)((x[used], y[used])))
            found[used] += z.float().softmax(-1).gather(1, t[:, None])[:, 0].cpu()
    mean: Tensor = found / validate.sum(0)
    return mean


def _roles(surrogates: Any, membership: Tensor | None, n: int, validation: int) -> tuple[Tensor, Tensor]:
    """Which surrogates are the sources and which validate, for each example: bool ``(k, n)`` each."""
    if isinstance(surrogates, nn.Module) or not all(isinstance(each, nn.Module) for each in surrogates):
        raise TypeError("surrogates must be a list of modules: models of the attacker's own.")
    if membership is None:
        membership = torch.zeros(len(surrogates), n, dtype=torch.bool)
    check_membership(membership, (len(surrogates), n))
    outside = ~membership.cpu()
    count = outside.sum(0)
    if len(surrogates) == 0 or int(count.min()) <= validation:
        few = 0 if len(surrogates) == 0 else int(count.min())
        raise ValueError(
            f"an example has {few} surrogates that were not trained on it; with validation = {validation} each needs "
            f"{validation + 1} at least."
        )
    source = outside & (outside.cumsum(0) <= count - validation)
    return source, outside & ~source


def _checked(thresholds: Any, validation: Any, stages: Any, steps: Any, momentum: Any) -> tuple[float, ...]:
    """The thresholds, largest first."""
    if isinstance(thresholds, (int, float, str)) or len(thresholds) == 0:
        raise TypeError(f"thresholds must be a list of probabilities, at least one, not {thresholds!r}.")
    for each in thresholds:
        check_number("each threshold", each, low=0, high=1, low_open=True, high_open=True)
    for name, value in (("validation", validation), ("stages", stages), ("steps", steps)):
        check_integer(name, value, low=1)
    check_number("momentum", momentum, low=0)
    return tuple(sorted(map(float, thresholds), reverse=True))
