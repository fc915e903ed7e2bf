"""Auditing what the weights of a network give back of its training data."""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.auditing.audited import AuditedData
from lightning_cwrf.auditing.estimates import estimate
from lightning_cwrf.auditing.values import Estimate
from lightning_cwrf.checks import check_confidence, check_number
from lightning_cwrf.data import Batches, isolated_rng
from lightning_cwrf.metrics import AuditContext, MembershipAUROC, TPRAtFPR
from lightning_cwrf.metrics.functional import clopper_pearson
from lightning_cwrf.reconstruction.attack import check_settings, check_size, reconstruct
from lightning_cwrf.reconstruction.gates import FirstReLU
from lightning_cwrf.reconstruction.homogeneity import Degree
from lightning_cwrf.reconstruction.kkt import Equation
from lightning_cwrf.reconstruction.measures import claims, hits_p_value, reconstruction_scores, relative_distances
from lightning_cwrf.reconstruction.pool import ReconstructionData, reconstruction_data
from lightning_cwrf.reconstruction.prior import ReconstructionPrior
from lightning_cwrf.reconstruction.remarks import of_attack
from lightning_cwrf.reconstruction.result import ReconstructionResult


@dataclass(frozen=True)
class ReconstructionSettings:
    """The settings of :func:`audit_reconstruction`, checked."""

    prior: ReconstructionPrior
    _: KW_ONLY
    candidates: float = 2.0
    steps: int = 2000
    lr: float = 0.02
    sharpness: float = 30.0
    margin: float = 5.0
    ratio: float = 0.5
    restarts: int = 1
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self.prior, **self.of_attack)
        check_number("candidates", self.candidates, low=0, low_open=True, hint="It is their number per member.")
        check_number("ratio", self.ratio, low=0, high=1, low_open=True, high_open=True)
        check_confidence(self.confidence)

    @property
    def of_attack(self) -> dict[str, Any]:
        """The keyword arguments of :func:`check_settings` and :func:`reconstruct`."""
        names = ("steps", "lr", "sharpness", "margin", "restarts", "seed")
        return {name: getattr(self, name) for name in names}

    def count(self, data: ReconstructionData) -> int:
        """The candidates in all; a ValueError for more than an attack can hold."""
        count = max(1, round(self.candidates * data.sizes[0]))
        check_size(count, tuple(data.inputs.shape[1:]), data.classes)
        return count


def audit_reconstruction(
    model: nn.Module,
    *,
    members: Batches,
    nonmembers: Batches,
    prior: ReconstructionPrior | None = None,
    weight_decay: float = 0.0,
    candidates: float = 2.0,
    steps: int = 2000,
    lr: float = 0.02,
    sharpness: float = 30.0,
    margin: float = 5.0,
    ratio: float = 0.5,
    restarts: int = 1,
    confidence: float = 0.95,
    seed: int = 0,
) -> ReconstructionResult:
    """Reconstruct training examples of a small ReLU network from its weights, and count them against chance.

    The attack is that of Haim et al. (2022) and Buzaglo et al. (2023), with all multipliers of each candidate
    (:func:`reconstruct`). It sees the weights, the number of members, and the prior. Members and non-members, which
    must be exchangeable before the training (drawn from one pool at random), are then treated alike: the p-value of the
    hits is exact. **A failed attack shows nothing about another prior**, and no audit bounds a leak from above.

    Args:
        model: a finished classifier with ReLUs, with one float tensor as input; it is not changed.
        members: its training examples, all of them, without augmentation: a loader, a data set or a list of batches.
        nonmembers: at least as many that it never saw, likewise.
        prior: what the attacker knows of the inputs. None: the default of :class:`ReconstructionPrior`.
        weight_decay: of the training, coupled as in SGD. Without any, the network must be homogeneous in its weights.
        candidates: for each member.
        steps: of the attack's Adam.
        lr: of the attack, in units of the input.
        sharpness: of the attack's gates, per unit of distance in the input.
        margin: a guess of the members' logit gaps.
        ratio: a reconstruction claims its nearest example if that is nearer than this share of the distance to the
            second nearest.
        restarts: runs of the attack, of which the one with the smallest residual counts.
        confidence: of the intervals and the finding.
        seed: of the attack.

    Raises:
        TypeError: inputs that are not one float tensor, settings of the wrong type.
        ValueError: fewer non-members than members, examples on both sides, a network that is not homogeneous without
            weight decay, settings out of range, data that read differently each time.

    Warns:
        UserWarning: more members than such an attack was ever seen to succeed with; a network without ReLUs, or with
            layers that are others in training (BatchNorm, dropout); copies and near copies; other proportions of labels
            among members than among non-members.

    >>> from torch.utils.data import TensorDataset
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
    >>> members, nonmembers = TensorDataset(x[:4], y[:4]), TensorDataset(x[4:], y[4:])
    >>> result = audit_reconstruction(net, members=members, nonmembers=nonmembers, steps=5)
    >>> result.examples, "another prior" in result.finding
    ((4, 4), True)
    """
    settings = ReconstructionSettings(
        ReconstructionPrior() if prior is None else prior,
        candidates=candidates,
        steps=steps,
        lr=lr,
        sharpness=sharpness,
        margin=margin,
        ratio=ratio,
        restarts=restarts,
        confidence=confidence,
        seed=seed,
    )
    check_number("weight_decay", weight_decay, low=0)
    data = reconstruction_data(model, AuditedData(members, nonmembers), settings.prior)
    if weight_decay == 0 and data.degree.degree is None:
        raise ValueError(why_inhomogeneous(data.degree))
    for remark in data.remarks:
        warnings.warn(remark, stacklevel=2)
    return attacked(model, data, settings)


def why_inhomogeneous(degree: Degree) -> str:
    """The error about a network to which the equation does not apply."""
    return (
        f"the network is not homogeneous in its trained weights: {degree.layer} is the first layer whose outputs do "
        "not scale with a power of them. Without weight decay the attack's equation holds for homogeneous networks "
        "alone (ReLU or max pooling; biases in the first layer alone; no BatchNorm, LayerNorm or GELU). If the "
        "training had a coupled weight decay, pass weight_decay=."
    )


def attacked(model: nn.Module, data: ReconstructionData, settings: ReconstructionSettings) -> ReconstructionResult:
    """Run the attack and measure it; of the members it gets the number alone."""
    n, k = data.sizes
    shape = tuple(data.inputs.shape[1:])
    candidates = settings.count(data)
    with isolated_rng():
        found = reconstruct(
            model, shape, data.classes, candidates=candidates, prior=settings.prior, **settings.of_attack
        )
    scores = reconstruction_scores(found.inputs, data.inputs)
    is_member = torch.arange(n + k) < n
    claimed = claims(found.inputs, data.inputs, settings.ratio)
    a, b = int((claimed < n).sum()), int((claimed >= n).sum())
    context = AuditContext(accuracy=1.0, confidence=settings.confidence, seed=settings.seed)
    metrics = MembershipAUROC.for_audit(context) | TPRAtFPR.for_audit(context)
    estimates = {
        "hit_rate": Estimate(a / n, clopper_pearson(a, n, settings.confidence)),
        "chance_hit_rate": Estimate(b / k, clopper_pearson(b, k, settings.confidence)),
        **{name: estimate(metric, scores, is_member, settings.confidence) for name, metric in metrics.items()},
    }
    relative = relative_distances(scores, data.inputs)
    truth, margins, patterns = _of_members(model, data.inputs[:n], data.targets)
    return ReconstructionResult(
        estimates=estimates,
        hits=(a, b),
        examples=(n, k),
        hits_p_value=hits_p_value(a, b, n, k),
        truth_residual=truth,
        margins=margins,
        gate_patterns=patterns,
        relative_distances=(float(relative[is_member].median()), float(relative[~is_member].median())),
        degree=data.degree.degree,
        scores=scores,
        is_member=is_member,
        claimed=claimed,
        pool=data.inputs,
        reconstruction=found,
        confidence=settings.confidence,
        remarks=[*data.remarks, *of_attack(found.residual, truth, margins[0])],
    )


def _of_members(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, tuple[float, float], int | None]:
    """The residual of the members themselves, their margins, and their gate patterns."""
    equation = Equation(model)
    inputs, targets = inputs.to(equation.device), targets.to(equation.device)
    with torch.enable_grad():
        residual = equation.fitted(inputs, targets).residual
    with torch.no_grad(), FirstReLU() as relu:
        margins = equation.gaps(inputs, targets).amin(1)
    patterns = None if relu.gates is None else len(relu.gates.flatten(1).unique(dim=1).T)
    return residual, (float(margins.min()), float(margins.median())), patterns
