"""Metric-based attacks (Yeom et al. 2018; Salem et al. 2019; Song & Mittal 2021): one number per prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cwrf.attacks.base import Evidence, register_attack
from lightning_cwrf.attacks.per_model import Signal
from lightning_cwrf.attacks.signals import check_logits, check_shadows, example_losses, per_example
from lightning_cwrf.checks import check_flag

BLOCKS = 1 << 16
"""Of the members' signals, in the search for the best threshold."""


def correctness(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the prediction is correct, else 0 (Yeom et al. 2018, the gap attack).

    Args:
        logits: shape ``(..., n, K)``.
        targets: class indices ``(n,)``.

    Returns:
        float64 scores ``(..., n)``.
    """
    check_logits("logits", logits, targets)
    return per_example(lambda z, y: (z.argmax(-1) == y.squeeze(-1)).double(), logits, targets)


def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """The confidence p_y in the true class, as log p_y = ``−ℓ``: probabilities near 1 would tie.

    Shapes as in :func:`correctness`.

    >>> confidence(torch.zeros(1, 2), torch.tensor([0]))
    tensor([-0.6931], dtype=torch.float64)
    """
    check_logits("logits", logits, targets)
    return example_losses(logits, targets).neg_()


def entropy(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """Minus the entropy of the prediction (Salem et al. 2019); the label is not used.

    >>> entropy(torch.zeros(1, 2))
    tensor([-0.6931], dtype=torch.float64)
    """
    if targets is None:
        targets = torch.zeros(logits.shape[-2], dtype=torch.int64)
    check_logits("logits", logits, targets)
    return per_example(lambda z, y: (z.softmax(-1) * z.log_softmax(-1)).sum(-1), logits, targets)


def modified_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Minus ``−(1 − p_y) log p_y − Σ_{c≠y} p_c log(1 − p_c)`` (Song & Mittal 2021, Eq. 8).

    >>> modified_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor([-0.6931], dtype=torch.float64)
    """
    check_logits("logits", logits, targets)
    return per_example(_modified_entropy, logits, targets)


def _modified_entropy(logits: Tensor, index: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    # log(1 - p_c). Only the largest p can be so near 1 that 1 - p is lost to rounding: for it, sum the others.
    top = log_p.argmax(-1, keepdim=True)
    rest = log_p.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    others = torch.log1p(-log_p.exp().scatter(-1, top, 0.0)).scatter(-1, top, rest)
    own, own_others = log_p.gather(-1, index).squeeze(-1), others.gather(-1, index).squeeze(-1)
    every = -(log_p.exp() * others).sum(-1)
    value = -own_others.exp() * own + every + own.exp() * own_others
    return -value


def calibrated(
    signal: Tensor, targets: Tensor, shadow_signals: Tensor, membership: Tensor, *, per_class: bool = True
) -> Tensor:
    """A signal minus the threshold that separates best on the shadow models, per class or one for all.

    The threshold of a class maximises TPR − FPR over all shadow models' outputs on that class; the audited model's
    membership is not used. A score above 0 means member. One threshold for all leaves the signal's ROC as it is;
    thresholds per class make classes of different confidence comparable (Song & Mittal 2021).

    Args:
        signal: of the audited model, ``(n,)``, higher = more likely a member.
        targets: class indices ``(n,)``.
        shadow_signals: ``(k, n)``.
        membership: bool ``(k, n)``.
        per_class: one threshold per class. A class with only IN or only OUT outputs uses that of all classes.

    Returns:
        float64 scores ``(n,)``.

    >>> shadows, membership = torch.tensor([[2.0, 9.0], [1.0, 8.0]]), torch.tensor([[True, True], [False, False]])
    >>> calibrated(torch.tensor([2.0, 8.0]), torch.tensor([0, 1]), shadows, membership)
    tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    check_flag("per_class", per_class)
    signal, shadow_signals, membership = check_shadows(signal, shadow_signals, membership)
    if targets.shape != signal.shape:
        raise ValueError(f"targets must have shape {tuple(signal.shape)}, not {tuple(targets.shape)}.")
    thresholds = torch.full_like(signal, torch.nan)
    for c in set(targets.tolist()) if per_class else ():
        chosen = targets == c
        inside = membership[:, chosen].flatten()
        if inside.any() and not inside.all():
            thresholds[chosen] = _best_threshold(shadow_signals[:, chosen].flatten(), inside)
    without = thresholds.isnan()
    if without.any():
        thresholds[without] = _best_threshold(shadow_signals.flatten(), membership.flatten())
    return signal - thresholds


def _best_threshold(signals: Tensor, inside: Tensor) -> float:
    """Half-way between the lowest signal that counts as a member and the next one below.

    In NumPy, whose masks and sorts take a fraction of the time of torch's.
    """
    values, mask = signals.cpu().numpy(), inside.cpu().numpy()
    members, others = np.sort(values[mask]), np.sort(values[~mask])
    if not len(members) or not len(others):
        raise ValueError(f"both groups are needed: there are {len(members)} members, {len(others)} non-members.")
    # Only a member's signal can be best. Both rates fall with it, so those at the ends of a block of signals bound
    # TPR - FPR in between, and most blocks need not be looked into.
    starts = np.arange(0, len(members), -(-len(members) // BLOCKS))
    at_starts, _ = _gains(starts, members, others)
    fpr = 1 - np.append(np.searchsorted(others, members[starts[1:]]) / len(others), 1.0)
    within = (1 - starts / len(members)) - fpr >= at_starts.max() - 1e-12
    ends = np.append(starts[1:], len(members))
    places = np.concatenate([np.arange(a, b) for a, b in zip(starts[within], ends[within], strict=True)])
    gains, below = _gains(places, members, others)
    if not gains.max() > 1e-12:  # best is to call nothing a member
        return float(max(members[-1], others[-1])) + 1.0
    best = int(np.flatnonzero(gains >= gains.max() - 1e-12)[-1])  # of equals, the one with the fewest positives
    threshold, next_ones = members[places[best]], [members[: places[best]][-1:], others[: below[best]][-1:]]
    return float(threshold + max(np.concatenate(next_ones), default=threshold - 1.0)) / 2


def _gains(places: Any, members: Any, others: Any) -> tuple[Any, Any]:
    """TPR - FPR where a member's signal is the threshold, and how many others are below it; both groups are sorted.

    Of equal signals the first one's is right, and the others' are too low.
    """
    below = np.searchsorted(others, members[places])
    return below / len(others) - places / len(members), below


def _check(per_class: bool = True) -> None:
    check_flag("per_class", per_class)


def _register(name: str, signal: Signal) -> None:
    @register_attack(name, check=_check)
    def attack(evidence: Evidence, per_class: bool = True) -> Tensor:
        own = evidence.signal(signal)
        if not evidence.has("shadow_logits"):
            return own
        shadows, membership = evidence.shadow_signals(signal), evidence.require("membership")
        return calibrated(own, evidence.targets, shadows, membership, per_class=per_class)


for _signal in (correctness, confidence, entropy, modified_entropy):
    _register(_signal.__name__, _signal)
