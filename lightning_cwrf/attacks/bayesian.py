"""BMIA (Liu et al. 2025): one reference model, whose last layer is given a distribution by Laplace's approximation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.attacks.signals import check_finite
from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.classification import classification_step
from lightning_cwrf.data import Batches, OverlapCheck, as_loader, bring_to
from lightning_cwrf.outputs import evaluating

_FLOOR = 1e-12
"""Added to every variance, so that it is not 0 where all samples agree."""


def bmia(signal: Tensor, sampled: Tensor) -> Tensor:
    """BMIA (Liu et al. 2025, arXiv 2503.07482): how far a signal is above what a reference model would give.

    The score is ``(φ − mean) / deviation``, over samples of the reference model. As a hypothesis test, "not a member"
    is rejected where it is large. It is offline LiRA with a variance per example, up to the monotone Φ, with samples of
    one model in the place of shadow models.

    Args:
        signal: φ of the audited model, ``(n,)`` (:func:`~lightning_cwrf.attacks.logit_signal`).
        sampled: φ of S samples of the reference model (:func:`laplace_outputs`), ``(S, n)``.

    Returns:
        float64 scores ``(n,)``.

    Raises:
        ValueError: wrong shapes, fewer than 2 samples, NaN or infinite values.

    >>> bmia(torch.tensor([3.0, 0.0]), torch.tensor([[1.0, 1.0], [2.0, 3.0], [3.0, 5.0]]))
    tensor([ 1.0000, -1.5000], dtype=torch.float64)
    """
    signal, sampled = check_finite("signal", signal), check_finite("sampled", sampled)
    if signal.ndim != 1 or sampled.ndim != 2 or sampled.shape[1] != len(signal) or len(sampled) < 2:
        raise ValueError(
            f"signal must have shape (n,) and sampled (S, n) with S >= 2, not {tuple(signal.shape)} and "
            f"{tuple(sampled.shape)}."
        )
    scores: Tensor = (signal - sampled.mean(0)) / (sampled.var(0) + _FLOOR).sqrt()
    return scores


def laplace_outputs(
    reference: nn.Module,
    trained_on: Batches,
    data: Batches,
    *,
    samples: int = 50,
    prior_precision: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Logits of samples of a reference model, from a Laplace approximation of its last layer: float32 ``(S, n, K)``.

    The last layer is the ``nn.Linear`` whose outputs are the logits. Its weights and bias W have a normal distribution
    around those that were learned, with precision ``H + δ``: H is the Gauss-Newton matrix of the loss, as a Kronecker
    product of the features' and the outputs' second moments, and δ the precision of the prior. So an example's logits
    are normal too, around the reference model's, and are sampled for each example by itself.

    With :func:`bmia`, the samples take the place of shadow models that were trained without the example: the reference
    model must be trained, as the audited one was, on other data than the audited examples. An error says so where it
    was not. What the paper's abstract and a public port of the attack settle is used: the last layer, the Kronecker
    product, the sampled logits; δ maximises the marginal likelihood over a grid, which is this package's choice.

    Args:
        reference: the reference model; it is not changed.
        trained_on: the examples that it was trained on.
        data: the audited examples, n of them.
        samples: S.
        prior_precision: δ; None: the best of 10^-4, ..., 10^4 by the marginal likelihood.
        seed: of the samples; the caller's random state is not touched.

    Raises:
        TypeError: a number of the wrong type.
        ValueError: audited examples that the reference model was trained on; a model whose logits are not the outputs
            of an ``nn.Linear``; a number out of range.

    >>> from torch.utils.data import TensorDataset
    >>> x, y = torch.randn(40, 4), torch.arange(40) % 3
    >>> known, asked = TensorDataset(x[:20], y[:20]), TensorDataset(x[20:], y[20:])
    >>> laplace_outputs(nn.Linear(4, 3), known, asked, samples=5).shape
    torch.Size([5, 20, 3])
    """
    check_integer("samples", samples, low=2)
    check_integer("seed", seed, low=0)
    if prior_precision is not None:
        check_number("prior_precision", prior_precision, low=0, low_open=True)
    OverlapCheck(trained_on, data, "the audited data", "examples that the reference model was trained on")
    known, asked = _features(reference, trained_on), _features(reference, data)
    size, classes = known[0].shape[0], known[1].shape[1]
    probabilities = known[1].softmax(-1)
    outputs = torch.diag(probabilities.sum(0)) - probabilities.T @ probabilities
    inside, inner = torch.linalg.eigh(known[0].T @ known[0] / size)
    outside, outer = torch.linalg.eigh(outputs / size)
    curvature = size * inside.clamp_min(0)[:, None] * outside.clamp_min(0)[None]
    if prior_precision is None:
        prior_precision = _best_precision(curvature, known[2])
    rotated = (asked[0] @ inner).square()
    deviation = (rotated @ (1 / (curvature + prior_precision))).sqrt()  # (n, K), along the columns of outer
    drawn = torch.randn(
        samples, len(asked[0]), classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    logits: Tensor = asked[1] + (drawn * deviation) @ outer.T
    return logits.float()


def _best_precision(curvature: Tensor, squares: float) -> float:
    """The prior's precision with the largest marginal likelihood: of those parts of it that depend on the precision."""

    def likelihood(precision: float) -> float:
        determinant = float((curvature + precision).log().sum())
        return (curvature.numel() * math.log(precision) - determinant - precision * squares) / 2

    grid = [math.pow(10, power / 10) for power in range(-40, 41)]
    return max(grid, key=likelihood)


def _features(model: nn.Module, data: Batches) -> tuple[Tensor, Tensor, float]:
    """The last layer's inputs with a 1 for its bias, the logits, both float64, and the layer's sum of squares."""
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((layer, inputs[0], output))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    bring = bring_to(model)
    rows, logits, squares = [], [], 0.0
    try:
        with evaluating(model):
            for batch in as_loader(data, shuffle=False):
                calls.clear()
                z, _ = classification_step(model, bring(batch))
                last = next(
                    (call for call in reversed(calls) if call[2].shape == z.shape and bool((call[2] == z).all())), None
                )
                if last is None:
                    raise ValueError(
                        "the reference model's logits are not the outputs of an nn.Linear: the Laplace approximation "
                        "is of such a last layer, with one output for each class."
                    )
                layer, features, _ = last
                one = [] if layer.bias is None else [torch.ones(len(features), 1, device=features.device)]
                rows.append(torch.cat([features, *one], 1).double().cpu())
                logits.append(z.double().cpu())
                squares = sum(float(p.detach().double().square().sum()) for p in layer.parameters())
    finally:
        for hook in hooks:
            hook.remove()
    if not rows:
        raise ValueError("the data hold no batch.")
    return torch.cat(rows), torch.cat(logits), squares
