"""HAMP (Chen & Pattabiraman 2024): high-entropy soft labels and an entropy bonus; and its output modification."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cwrf.classification import check_targets, extract_logits
from lightning_cwrf.defenses.base import DefenseMixin


def hamp_loss(logits: Tensor, targets: Tensor, *, gamma: float = 0.95, alpha: float = 1.0) -> Tensor:
    """HAMP's training loss: ``KL(soft ‖ p) / (N·K) − α · mean entropy(p)``.

    soft puts :func:`hamp_target_probability` on the true class and shares the rest equally among the others, so that
    its entropy is γ·ln K. The divergence is a mean over N·K entries, as in the authors' code; that sets the scale of α.

    Args:
        logits: shape ``(n, K)``.
        targets: class indices ``(n,)``.
        gamma: γ in [0, 1]. Published: 0.95 (default), 0.8 (Purchase), 0.6 (Texas).
        alpha: α ≥ 0. Published: 1 (default), 0.01 (Purchase, Texas).

    Returns:
        A scalar.

    >>> hamp_loss(torch.zeros(2, 4), torch.tensor([0, 1]), gamma=1.0, alpha=0.0)
    tensor(0.)
    """
    check_hamp(gamma, alpha)
    check_targets(logits, targets)
    classes = logits.shape[-1]
    true = hamp_target_probability(classes, gamma)
    soft = torch.full_like(logits, (1 - true) / (classes - 1)).scatter_(-1, targets.unsqueeze(-1), true)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return F.kl_div(log_p, soft, reduction="sum") / log_p.numel() - alpha * entropy


@functools.cache
def hamp_target_probability(classes: int, gamma: float) -> float:
    """The largest probability t of the true class at which the soft label's entropy is still γ·ln K.

    The authors step t down by 0.01 until the entropy is reached; this is the exact point, by bisection.

    >>> round(hamp_target_probability(2, 0.0), 6), round(hamp_target_probability(4, 1.0), 6)
    (1.0, 0.25)
    """
    if classes < 2:
        raise ValueError(f"HAMP needs at least 2 classes, not {classes}.")
    goal, low, high = gamma * math.log(classes), 1 / classes, 1.0
    for _ in range(100):  # the entropy falls from ln K at 1/K to 0 at 1
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy(middle, classes) >= goal else (low, middle)
    return low


def check_hamp(gamma: float, alpha: float) -> None:
    """Raise a ValueError unless γ lies in [0, 1] and α is finite and not negative."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], not {gamma}: it is the soft label's share of the largest entropy.")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and not negative, not {alpha}: it is the weight of the entropy bonus.")


class HAMPMixin(DefenseMixin):
    """Trains a LightningModule with :func:`hamp_loss`; ``gamma`` and ``alpha`` are as there.

    HAMP's second part, which changes the outputs of the finished model, is :class:`HAMPOutput`; it is off unless you
    wrap the model in it.
    """

    def __init__(self, *args: Any, gamma: float = 0.95, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configure_defense(gamma=gamma, alpha=alpha)

    def configure_defense(self, *, gamma: float = 0.95, alpha: float = 1.0) -> None:
        """Check and take the settings."""
        check_hamp(gamma, alpha)
        self._set_defense(gamma=gamma, alpha=alpha)

    def defense_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """HAMP's training loss."""
        return hamp_loss(logits, targets, **self.defense_settings)


class HAMPOutput(nn.Module):
    """HAMP's test-time part: each output is replaced by that of a random input, in the original's order of classes.

    The predicted class and the ranking of all classes stay; the confidences are those the model has on noise. Attacks
    that read confidences see nothing else; label-only attacks are not affected.

    Args:
        model: a finished classifier of float inputs.
        low: lowest value of the uniform random inputs.
        high: highest value.
        seed: of the random inputs; the caller's random state is not touched.

    >>> model = nn.Linear(3, 4)
    >>> x = torch.rand(5, 3)
    >>> bool((HAMPOutput(model)(x).argsort(-1) == model(x).argsort(-1)).all())
    True
    """

    def __init__(self, model: nn.Module, low: float = 0.0, high: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"low must be below high, not {low} and {high}.")
        self.model = model
        self.low, self.high = low, high
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of shape ``(n, K)`` with the values of random inputs' logits and the ranks of ``inputs``' own."""
        if not inputs.is_floating_point():
            raise TypeError(f"HAMPOutput draws random float inputs; {inputs.dtype} inputs have none.")
        noise = torch.rand(inputs.shape, generator=self._generator).mul_(self.high - self.low).add_(self.low)
        logits = extract_logits(self.model(inputs))
        values = extract_logits(self.model(noise.to(inputs))).sort(-1).values
        ranks = logits.argsort(stable=True, dim=-1)
        return torch.empty_like(logits).scatter_(-1, ranks, values.to(logits.dtype))


def _entropy(true: float, classes: int) -> float:
    rest = (1 - true) / (classes - 1)
    return -sum(count * p * math.log(p) for count, p in ((1, true), (classes - 1, rest)) if p > 0)
