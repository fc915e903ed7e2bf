"""HAMP (Chen & Pattabiraman 2024): high-entropy soft labels and an entropy bonus; and its output modification."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.classification import check_targets, extract_logits
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.output import next_above
from lightning_cwrf.defenses.registry import register_defense
from lightning_cwrf.defenses.settings import Defense
from lightning_cwrf.outputs import evaluating
from lightning_cwrf.targets import two_classes


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
    HAMP(gamma=gamma, alpha=alpha)
    targets = check_targets(logits, targets)
    classes = logits.shape[-1]
    true = hamp_target_probability(classes, gamma)
    # Functions of which torch.func.vmap has a vectorised form, which it has not of scatter_ and kl_div.
    is_true = torch.arange(classes, device=logits.device) == targets.unsqueeze(-1)
    log_p = logits.log_softmax(-1)
    soft = torch.where(is_true, true, (1 - true) / (classes - 1)).to(log_p.dtype)
    divergence = (torch.xlogy(soft, soft) - soft * log_p).sum() / log_p.numel()
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return divergence - alpha * entropy


@functools.lru_cache(maxsize=None, typed=True)  # typed: 2.0 is refused, though 2 has been answered
def hamp_target_probability(classes: int, gamma: float) -> float:
    """The largest probability t of the true class at which the soft label's entropy is still γ·ln K.

    The authors step t down by 0.01 until the entropy is reached; this is the exact point, by bisection.

    >>> round(hamp_target_probability(2, 0.0), 6), round(hamp_target_probability(4, 1.0), 6)
    (1.0, 0.25)
    """
    check_integer("classes", classes, low=2)
    check_number("gamma", gamma, low=0, high=1)
    goal, low, high = gamma * math.log(classes), 1 / classes, 1.0
    for _ in range(100):  # the entropy falls from ln K at 1/K to 0 at 1
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy(middle, classes) >= goal else (low, middle)
    return low


@register_defense("hamp")
@dataclass(frozen=True, kw_only=True)
class HAMP(Defense):
    """The settings of :func:`hamp_loss`."""

    per_example = True
    strengths = ({"gamma": 0.6, "alpha": 0.01}, {"gamma": 0.8, "alpha": 0.01}, {"gamma": 0.95, "alpha": 1.0})
    gamma: float = 0.95
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, low=0, high=1, hint="It is the soft label's share of the largest entropy.")
        check_number("alpha", self.alpha, low=0, hint="It is the weight of the entropy bonus.")


class HAMPMixin(DefenseMixin, settings=HAMP):
    """Trains a LightningModule with :func:`hamp_loss`.

    HAMP's second part, which changes the outputs of the finished model, is :class:`HAMPOutput`; it is off unless you
    wrap the model in it.
    """

    def defense_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """HAMP's training loss."""
        return hamp_loss(logits, targets, **self.defense.settings)


class HAMPOutput(nn.Module):
    """HAMP's test-time part: each output is replaced by that of a random input, in the original's order of classes.

    The predicted class and the ranking of all classes stay; the confidences are those the model has on noise. Attacks
    that read confidences see only these; label-only attacks are not affected. The random input is a function of the
    seed and of the example's own content (:func:`example_noise`): the same example is shown the same output in every
    call, batch and order, so repeated queries reveal nothing new. The model runs in eval mode and without gradients.

    Args:
        model: a finished classifier of float inputs.
        low: lowest value of the uniform random inputs.
        high: highest value.
        seed: of the random inputs, an integer; the caller's random state is not touched.

    >>> model = nn.Linear(3, 4)
    >>> x = torch.rand(5, 3)
    >>> shown = HAMPOutput(model)
    >>> bool((shown(x).argsort(-1) == model(x).argsort(-1)).all()), torch.equal(shown(x), shown(x))
    (True, True)
    """

    def __init__(self, model: nn.Module, low: float = 0.0, high: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"HAMPOutput wraps a model, an nn.Module, not {model!r}.")
        check_number("low", low)
        check_number("high", high)
        check_integer("seed", seed)
        if not low < high:
            raise ValueError(f"low must be below high, not {low} and {high}.")
        self.model = model
        self.low, self.high, self.seed = low, high, seed

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of shape ``(n, K)`` with the values of random inputs' logits and the ranks of ``inputs``' own.

        A binary classifier with one logit z for each example is shown as two classes, with logits 0 and z.
        """
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TypeError(
                f"HAMPOutput draws random float inputs, and has none for {kind}; it takes one float tensor."
            )
        noise = example_noise(inputs, self.seed) * (self.high - self.low) + self.low
        with evaluating(self.model):
            logits = two_classes(extract_logits(self.model(inputs)))
            values = two_classes(extract_logits(self.model(noise.to(inputs.dtype))))
        values = values.to(logits.dtype).sort(-1, descending=True).values
        # Stable: among equal logits the first class is the predicted one, as argmax has it.
        order = logits.argsort(dim=-1, descending=True, stable=True)
        # Where the two largest values are equal, argmax would take the class of the lower number.
        first, second = values[..., :1], values[..., 1:2]
        values = torch.cat([torch.where(first == second, next_above(first), first), values[..., 1:]], dim=-1)
        return torch.empty_like(logits).scatter_(-1, order, values)


def example_noise(inputs: Tensor, seed: int) -> Tensor:
    """Uniform noise in [0, 1), float32 of the inputs' shape; each example's is a function of its content and the seed.

    The bits of an example's values are hashed to a 64-bit key, and its numbers are SplitMix64 of key and position
    (Steele, Lea & Flood 2014). All of it is integer arithmetic modulo 2^64, so it is the same on every device, and in
    every batch and order.

    >>> x = torch.rand(4, 3)
    >>> bool((example_noise(x, 0)[2:] == example_noise(x[2:], 0)).all())
    True
    """
    flat = inputs.detach().reshape(len(inputs), math.prod(inputs.shape[1:])).float() + 0.0  # -0.0 is 0.0
    place = torch.arange(flat.shape[1], device=flat.device) * _GOLDEN
    key = _mix(flat.contiguous().view(torch.int32) ^ _mix(place)).sum(-1, keepdim=True)
    key = _mix(key ^ _mix(torch.tensor(_signed(seed), device=flat.device)))
    return ((_mix(key + place) >> 40) & 0xFFFFFF).float().div(1 << 24).view(inputs.shape)


def _signed(number: int) -> int:
    """``number`` modulo 2^64, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, on int64 as if it were unsigned."""
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (1 << 33) - 1)


def _entropy(true: float, classes: int) -> float:
    rest = (1 - true) / (classes - 1)
    return -sum(count * p * math.log(p) for count, p in ((1, true), (classes - 1, rest)) if p > 0)
