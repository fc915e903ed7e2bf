"""OSLO (Peng et al. 2024): label-only, one query per example, a perturbation made on models of the attacker's own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_cwrf.attacks.label_only import Labels, bounds_of, check_classes, labels_only, read_inputs
from lightning_cwrf.attacks.signals import check_membership
from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.classification import classification_step
from lightning_cwrf.data import Batches, bring_to
from lightning_cwrf.outputs import evaluating


class OSLOScores(NamedTuple):
    """What :func:`oslo` found.

    Attributes:
        scores: the share of the perturbed inputs that the audited model still labels right, float64 ``(n,)``.
        thresholds: in the order in which they were given.
        survived: bool ``(s, n)``, whether the label is right, for each threshold in this order.
        sizes: Euclidean, of the perturbations, float64 ``(s, n)``, likewise.
        queries: of the audited model for each example, int64 ``(n,)``; at most the number of thresholds.
    """

    scores: Tensor
    thresholds: tuple[float, ...]
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
        data: as for :func:`~lightning_cwrf.attacks.boundary_distance`; examples are perturbed together, and models get
            them, in batches of its size.
        surrogates: k models of the attacker's own, trained as the audited one.
        membership: bool ``(k, n)``, True where the surrogate was trained on the example: it is then not used for it.
            None: no surrogate was trained on any. The examples must be in the order of the data: this cannot be
            checked, and with another order surrogates are used for examples that they were trained on.
        thresholds: of the probability, one query each. With one, a score is 0 or 1.
        validation: number of the surrogates not trained on the example that validate; the rest are sources.
        largest: the largest perturbation, Euclidean. None: a quarter of the range of the inputs in each feature.
        stages: in which the perturbation grows to ``largest``.
        steps: of the gradient in each stage.
        momentum: of the gradient.
        clip: the lowest and the highest value that an input can have. None: those of the data.

    Warns:
        UserWarning: the model's labels agree with the targets, or with the surrogates' labels, no more often than by
            chance. With two classes this is not seen: labels that are coded the other way round turn the AUC round.

    Raises:
        TypeError: data without a float tensor as inputs; surrogates that are no modules; a number of the wrong type;
            labels that are no integers.
        ValueError: a number out of range; a membership of another shape; an example with too few surrogates; targets or
            labels that are no classes of the surrogates; inputs that read differently each time.

    >>> from torch.utils.data import TensorDataset
    >>> ours, theirs = nn.Linear(1, 2), lambda inputs: (inputs[:, 0] > 0.5).long()
    >>> _ = ours.weight.data.copy_(torch.tensor([[-9.0], [9.0]])), ours.bias.data.zero_()
    >>> data = TensorDataset(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0]))
    >>> found = oslo(theirs, data, [ours, ours], validation=1, clip=(-4, 4))
    >>> found.scores, found.queries
    (tensor([0., 1.], dtype=torch.float64), tensor([1, 1]))
    """
    levels, order = _checked(thresholds, validation, stages, steps, momentum)
    with torch.inference_mode(False), ExitStack() as stack:
        examples = read_inputs(data)
        inputs, targets, batch = examples
        low, high = bounds_of(clip, inputs)
        if largest is None:
            largest = 0.25 * (high - low) * inputs[0].numel() ** 0.5
        check_number("largest", largest, low=0, low_open=True)
        source, validate = _roles(surrogates, membership, len(targets), validation)
        settings = _Settings(levels, float(largest), stages, steps, momentum, low, high)
        survived = torch.zeros(len(levels), len(targets), dtype=torch.bool)
        sizes, queries = torch.zeros(survived.shape, dtype=torch.float64), torch.zeros_like(targets)
        first, theirs = torch.zeros_like(targets), torch.zeros_like(targets)
        for each in surrogates:
            stack.enter_context(evaluating(each))
        classes = _classes(surrogates, inputs[:1], targets)
        labels_of = stack.enter_context(labels_only(model, examples, classes))
        for rows in torch.split(torch.arange(len(targets)), batch):
            x, y = inputs[rows], targets[rows]
            points, stage = _perturbed(surrogates, x, y, source[:, rows], validate[:, rows], settings)
            sizes[:, rows] = (points - x).flatten(2).double().norm(dim=-1)
            first[rows] = labels_of(points[0])
            theirs[rows] = _probabilities(surrogates, points[0], y, validate[:, rows]).argmax(1)
            survived[0, rows] = first[rows] == y
            queries[rows] = 1
            for i in range(1, len(levels)):  # where the perturbation is the one before, so is the answer
                new = stage[i] != stage[i - 1]
                survived[i, rows] = survived[i - 1, rows]
                survived[i, rows[new]] = labels_of(points[i][new]) == y[new]
                queries[rows] += new
        _warn_of_coding(first, targets, theirs, classes)
        given = torch.tensor(order).argsort()
        return OSLOScores(
            survived.double().mean(0), tuple(map(float, thresholds)), survived[given], sizes[given], queries
        )


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
            sure = _probabilities(surrogates, now, y[rows], validate[:, rows]).gather(1, y[rows, None])[:, 0]
            first = first & (sure < levels)
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


def _probabilities(surrogates: Sequence[nn.Module], x: Tensor, y: Tensor, validate: Tensor) -> Tensor:
    """The mean probabilities of each example's validation models, ``(b, K)``."""
    found: Tensor | None = None
    for each, used in zip(surrogates, validate, strict=True):
        if used.any():
            z, _ = classification_step(each, bring_to(each)((x[used], y[used])))
            p = z.float().softmax(-1).cpu()
            found = p.new_zeros(len(x), p.shape[1]) if found is None else found
            found[used] += p
    assert found is not None  # every example has validation models
    mean: Tensor = found / validate.sum(0)[:, None]
    return mean


def _classes(surrogates: Sequence[nn.Module], x: Tensor, targets: Tensor) -> int:
    """Number of the surrogates' classes, of which the targets must be."""
    found = set()
    for each in surrogates:
        z, _ = classification_step(each, bring_to(each)((x, torch.zeros(len(x), dtype=torch.long))))
        found.add(z.shape[1])
        check_classes(targets, z.shape[1], "a surrogate")
    if len(found) > 1:
        raise ValueError(
            f"the surrogates have {' and '.join(map(str, sorted(found)))} classes; they must have as many."
        )
    return found.pop()


def _warn_of_coding(labels: Tensor, targets: Tensor, theirs: Tensor, classes: int) -> None:
    """Warn where labels are neither right nor those of the validation models more often than if they were shuffled."""
    share = torch.bincount(labels, minlength=classes).double() / len(labels)
    alike = int(((labels == targets) | (labels == theirs)).sum())
    chance = float((share[targets] + share[theirs] * (theirs != targets)).sum())
    if alike <= chance < len(labels) - 1e-6:
        warnings.warn(
            f"on {alike} of {len(labels)} perturbed inputs the model's label is the target or the surrogates' label, "
            f"and {chance:.0f} would be so by chance: the model or the surrogates have learned nothing, or its labels "
            "are coded otherwise than the targets. The scores mean nothing in the last case: convert the labels.",
            stacklevel=3,
        )


def _roles(surrogates: Any, membership: Tensor | None, n: int, validation: int) -> tuple[Tensor, Tensor]:
    """Which surrogates are the sources and which validate, for each example: bool ``(k, n)`` each."""
    if not isinstance(surrogates, Sequence) or not all(isinstance(each, nn.Module) for each in surrogates):
        raise TypeError("surrogates must be a list of modules: models of the attacker's own.")
    if any(each.is_inference() for model in surrogates for each in chain(model.parameters(), model.buffers())):
        raise ValueError(
            "a surrogate was made under torch.inference_mode, so that it has no gradients; make or load it outside."
        )
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


def _checked(
    thresholds: Any, validation: Any, stages: Any, steps: Any, momentum: Any
) -> tuple[tuple[float, ...], list[int]]:
    """The thresholds, largest first, and their places among the given ones."""
    if isinstance(thresholds, str) or not hasattr(thresholds, "__len__") or len(thresholds) == 0:
        raise TypeError(f"thresholds must be a list of probabilities, at least one, not {thresholds!r}.")
    for each in thresholds:
        check_number("each threshold", each, low=0, high=1, low_open=True, high_open=True)
    for name, value in (("validation", validation), ("stages", stages), ("steps", steps)):
        check_integer(name, value, low=1)
    check_number("momentum", momentum, low=0)
    order = sorted(range(len(thresholds)), key=lambda i: -thresholds[i])
    return tuple(float(thresholds[i]) for i in order), order
