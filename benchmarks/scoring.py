"""Scoring: ``privacy_vulnerability_scores`` against a bare loop of CWRF's Algorithm 1, lines 1-10.

The bare loop is the floor: only the forward passes, gradients and two updates of the algorithm. The library adds checks
(labels, finite losses, no example in both data sets), a copy of θ_vn, and the restored random state.

    python benchmarks/scoring.py
"""

from __future__ import annotations

import copy

import torch
from common import Row, best_of, cifar_resnet18, image_batches, overhead, run
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cwrf.weights.scores import privacy_vulnerability_scores

STEPS, BATCH, LAM, LR = 3, 64, 0.7, 1e-3  # few steps, so that the cost per call has more weight, not less
ROUNDS = 4

Batches = list[tuple[Tensor, Tensor]]


def bare_loop(model: nn.Module, vanilla: nn.Module, members: Batches, reference: Batches) -> list[Tensor]:
    """Algorithm 1 written out by hand, with no check at all."""
    model = copy.deepcopy(model).eval()
    vanilla = vanilla.eval()
    weights = list(model.parameters())
    scores = [torch.zeros_like(weight) for weight in weights]
    for (x, y), (x_re, _) in zip(members, reference, strict=True):
        with torch.no_grad():
            start = vanilla(x_re).log_softmax(-1)
        unlearn = F.kl_div(model(x_re).log_softmax(-1), start, reduction="batchmean", log_target=True)
        loss = (1 - LAM) * F.cross_entropy(model(x), y) + LAM * unlearn
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for score, weight, gradient in zip(scores, weights, gradients, strict=True):
                score += (gradient * weight).abs_()
                weight.sub_(gradient, alpha=LR)
    return scores


def benchmark() -> list[Row]:
    model, vanilla = cifar_resnet18(seed=0), cifar_resnet18(seed=1)
    members, reference = image_batches(STEPS, BATCH, seed=2), image_batches(STEPS, BATCH, seed=3)
    results: dict[str, list[Tensor]] = {}

    def ours() -> None:
        scores = privacy_vulnerability_scores(model, vanilla, members, reference, lam=LAM, steps=STEPS, lr=LR)
        results["ours"] = list(scores.values())

    def floor() -> None:
        results["floor"] = bare_loop(model, vanilla, members, reference)

    mine, theirs = best_of(ROUNDS, ours, floor)
    # One pass of both batches rounds otherwise than two; in float32 either is 8e-4 of the largest score from float64.
    for own, bare in zip(results["ours"], results["floor"], strict=True):
        torch.testing.assert_close(own, bare, rtol=0, atol=2e-3 * float(bare.max()))
    name = f"weight scores: ResNet-18, {STEPS} steps of batch {BATCH}"
    return [overhead(name, mine, "bare loop of Algorithm 1", theirs, at_most=1.10)]


if __name__ == "__main__":
    run(benchmark, __doc__)
