"""Defenses that change what a finished model shows: their base, and rounding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.checks import check_integer
from lightning_cwrf.classification import check_targets, classification_step, extract_logits
from lightning_cwrf.data import example_digests, fingerprints
from lightning_cwrf.outputs import evaluating
from lightning_cwrf.targets import two_classes


class OutputDefense(nn.Module):
    """Base of the wrappers that show other outputs than the model's own. Subclasses define :meth:`shown`.

    The wrapper takes what the model takes, and audits see it as they see the model: with the model's own
    ``classification_step``, where it has one. The model runs in eval mode and without gradients.

    Args:
        model: a finished classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(self).__name__} wraps a model, an nn.Module, not {model!r}.")
        self.model = model

    def shown(self, logits: Tensor, digests: Callable[[], list[bytes]]) -> Tensor:
        """What is shown instead of logits ``(n, K)``; ``digests()`` has one of the content of each example."""
        raise NotImplementedError

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The logits that are shown, ``(n, K)``; those of a binary classifier with one logit z are of 0 and z."""
        with evaluating(self.model):
            logits = two_classes(extract_logits(self.model(*inputs, **named)))
            return self.shown(logits, lambda: fingerprints(named or (inputs[0] if len(inputs) == 1 else inputs)))

    def classification_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The logits that are shown for a batch, and its targets."""
        with evaluating(self.model):
            logits, targets = classification_step(self.model, batch)
            return self.shown(logits, lambda: example_digests(batch)), targets


class RoundedOutput(OutputDefense):
    """Shows probabilities rounded to a few decimals (a defense of Shokri et al. 2017).

    The predicted class stays; where its rounded probability is not the largest alone, it is larger by the least
    difference of the number's type. A probability that rounds to 0 has no finite logit, so it is shown as a quarter of
    a step, ``10^-digits / 4``: the logits tell no more than the rounded probabilities do. Label-only attacks are not
    affected, and nor are others that need no finer values: measure it.

    Args:
        model: a finished classifier.
        digits: decimals that are kept, from 0 to 6.

    >>> model = RoundedOutput(nn.Identity(), digits=1)
    >>> model(torch.tensor([[2.0, 0.0, 0.0]])).softmax(-1)
    tensor([[0.8000, 0.1000, 0.1000]])
    """

    def __init__(self, model: nn.Module, digits: int = 1) -> None:
        super().__init__(model)
        check_integer("digits", digits, low=0, high=6)
        self.digits = digits

    def shown(self, logits: Tensor, digests: Callable[[], list[bytes]]) -> Tensor:
        """The logarithms of the rounded probabilities."""
        return rounded(logits, self.digits)


def rounded(logits: Tensor, digits: int) -> Tensor:
    """Logits of the probabilities rounded to ``digits`` decimals; see :class:`RoundedOutput`.

    >>> rounded(torch.tensor([[2.0, 0.0, -9.0]]), 1).exp()
    tensor([[0.9000, 0.1000, 0.0250]])
    """
    check_integer("digits", digits, low=0, high=6)
    check_targets(logits, logits.argmax(-1))  # NaN and infinity are errors
    probabilities = logits.float().softmax(-1).mul(10**digits).round().div(10**digits)
    values = probabilities.clamp_min(10**-digits / 4).log().to(logits.dtype)
    return keep_class(values, logits.argmax(-1, keepdim=True))


def keep_class(values: Tensor, predicted: Tensor) -> Tensor:
    """The values with ``argmax`` at the predicted class ``(n, 1)``: raised to just above the largest where it is not.

    >>> keep_class(torch.tensor([[0.5, 0.5]]), torch.tensor([[1]])).argmax(-1)
    tensor([1])
    """
    largest = values.max(-1, keepdim=True)  # of float64: above by the least step of float32, which audits read
    raised = torch.where(largest.indices == predicted, values.gather(-1, predicted), _above(largest.values))
    return values.scatter(-1, predicted, raised)


def _above(x: Tensor) -> Tensor:
    return next_above(x.float()).to(x.dtype) if x.dtype == torch.float64 else next_above(x)


def next_above(x: Tensor) -> Tensor:
    """The next larger number of the dtype (torch.nextafter does not know float16 on every device)."""
    bits = (x + 0.0).contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return torch.where(x < 0, bits - 1, bits + 1).view(x.dtype)


def uniform_of(digest: bytes, seed: int) -> float:
    """A number in [0, 1) that is a function of an example's digest and the seed alone.

    >>> uniform_of(b"example", 0) == uniform_of(b"example", 0) != uniform_of(b"example", 1)
    True
    """
    drawn = hashlib.blake2b(digest, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(drawn, "little") / math.ldexp(1, 64)
