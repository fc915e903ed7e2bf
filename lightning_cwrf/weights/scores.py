"""Weight scores: how much each weight matters for privacy (Eq. 4 with Eq. 2) and for accuracy (Eq. 2).

Equations are those of "Learnability and Privacy Vulnerability Are Entangled in a Few Critical Weights" (CWRF, ICLR
2026). Everything here works on copies: the model, its buffers, gradients and mode and the caller's random state are not
changed. Scores are computed in the precision of the weights, also inside ``torch.autocast``, ``no_grad`` or
``inference_mode``.

The equations leave three choices open. Eq. 2 is computed per batch, as in Algorithm 1: from the absolute value of the
batch's mean gradient, not the mean of the examples' absolute gradients. The divergence of Eq. 4 is
KL(vanilla ‖ θ'), with the vanilla model's outputs as the target. Both models run in eval mode, unless
``mode="train"``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cwrf.checks import check_choice, check_integer, check_number
from lightning_cwrf.classification import check_no_probabilities, check_targets, classification_step
from lightning_cwrf.data import Batches, OverlapCheck, as_loader, bring_to, cycle
from lightning_cwrf.weights.copies import copied
from lightning_cwrf.weights.descent import accumulate, in_mode, scoring_context
from lightning_cwrf.weights.joining import TwoBatches
from lightning_cwrf.weights.vanilla import VanillaSource, load_vanilla

Mode = Literal["eval", "train"]


def learnability_scores(
    model: nn.Module,
    members: Batches,
    *,
    steps: int = 30,
    lr: float = 1e-3,
    transfer: Callable[[Any], Any] | None = None,
    on_step: Callable[[int], Any] | None = None,
    batch_size: int = 256,
    mode: Mode = "eval",
) -> dict[str, Tensor]:
    """Score each weight by its importance for the members' loss: Eq. 2, first-order Taylor (Molchanov et al. 2019).

    Args:
        model: a classifier; see :func:`~lightning_cwrf.classification.classification_step` for what it may return.
        members: batches of training examples (an iterable, repeated when it runs out), a loader or a dataset.
        steps: T, the number of batches.
        lr: η_e, the rate of the plain SGD step on the copy after each batch. The paper does not state its value.
        transfer: applied to each batch before its tensors go to the model's device and precision.
        on_step: called with the number of steps done, for a progress bar.
        batch_size: examples in a batch. Published: 256. Batches of an iterable or of your own batch sampler keep their
            size.
        mode: ``"eval"``; ``"train"``: with batch statistics, dropout, and whatever else the model does as it trains,
            but without its Trainer. If the model is in train mode, its layers in eval mode stay so.

    Returns:
        One non-negative float32 tensor per trainable parameter that the loss reaches in any step, by name and of its
        shape. A tied parameter counts once. A warning names those that the loss does not reach, such as an averaged
        copy of the weights inside the module: the model that is attacked does not use them.

    Raises:
        TypeError: settings of the wrong type; not a module, or one that cannot be copied.
        ValueError: bad settings, an empty loader, labels out of range, or logits that are not finite.

    >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    >>> scores = learnability_scores(nn.Linear(4, 3), data, steps=2)
    >>> {name: tuple(score.shape) for name, score in scores.items()}
    {'weight': (3, 4), 'bias': (3,)}
    """
    check_scoring(0.0, steps, lr, mode)
    check_integer("batch_size", batch_size, low=1)
    with scoring_context(model):
        bring = bring_to(model, transfer)

        def make_objective() -> Callable[[nn.Module], Tensor]:
            batches = cycle(as_loader(members, shuffle=True, batch_size=batch_size), "members")

            def objective(work: nn.Module) -> Tensor:
                logits, targets = classification_step(work, bring(next(batches)))
                return F.cross_entropy(logits.float(), targets)

            return objective

        return accumulate(model, make_objective, steps, lr, on_step, mode)


def privacy_vulnerability_scores(
    model: nn.Module,
    vanilla: VanillaSource,
    members: Batches,
    nonmembers: Batches,
    *,
    lam: float = 0.7,
    steps: int = 30,
    lr: float = 1e-3,
    transfer: Callable[[Any], Any] | None = None,
    on_step: Callable[[int], Any] | None = None,
    batch_size: int = 256,
    mode: Mode = "eval",
) -> dict[str, Tensor]:
    """Score each weight by its privacy vulnerability: Eq. 2 accumulated along Eq. 4 (CWRF, Algorithm 1, lines 1-10).

    Each step takes a member batch (x_tr, y_tr) and a reference batch x_re, and on a copy θ' of the model's weights::

        L = (1-λ) · CE(f(x_tr; θ'), y_tr) + λ · KL(softmax f(x_re; θ_vn) ‖ softmax f(x_re; θ'))
        g = ∇L;   φ += |g ⊙ θ'|;   θ' -= η_e · g

    Both models run in eval mode, so that dropout adds no noise and BatchNorm reads its own running statistics; or both
    in train mode, each batch by itself.

    Args:
        model: the finished (unprotected) classifier.
        vanilla: θ_vn in any form :func:`~lightning_cwrf.weights.vanilla.load_vanilla` takes.
        members: batches the model was trained on: an iterable of batches (repeated when it runs out), a loader or a
            dataset.
        nonmembers: batches it never saw (D_re), likewise.
        lam: λ in [0, 1]. Published: 0.7 (CIFAR-10, CINIC-10), 0.9 (CIFAR-100).
        steps: T. Published: 30, with batches of 256.
        lr: η_e. Not stated in the paper.
        transfer: applied to each batch before its tensors go to the model's device and precision.
        on_step: called with the number of steps done, for a progress bar.
        batch_size: examples in a batch. Published: 256. Batches of an iterable or of your own batch sampler keep their
            size.
        mode: as for :func:`learnability_scores`, of both models.

    Returns:
        One non-negative float32 tensor per trainable parameter, as in :func:`learnability_scores`.

    Raises:
        TypeError: settings of the wrong type; not a module, or one that cannot be copied.
        ValueError: bad settings; an empty loader; an example that is in both the members and the reference data (in
            the batches drawn, where they cannot be read whole); vanilla weights that do not fit; labels out of range;
            logits that are not finite, or are probabilities.

    >>> members = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    >>> reference = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    >>> scores = privacy_vulnerability_scores(nn.Linear(4, 3), nn.Linear(4, 3), members, reference, steps=2)
    >>> bool((scores["weight"] >= 0).all())
    True
    """
    check_scoring(lam, steps, lr, mode)
    check_integer("batch_size", batch_size, low=1)
    with scoring_context(model):
        overlap = OverlapCheck(members, nonmembers, "the reference data (nonmembers=)")
        bring = bring_to(model, transfer)

        def make_objective() -> Callable[[nn.Module], Tensor]:
            references = _vanilla_outputs(vanilla, model, nonmembers, bring, steps, batch_size, mode)
            member_batches = cycle(as_loader(members, shuffle=True, batch_size=batch_size), "members")
            run = TwoBatches(join=mode == "eval")
            first = iter([True])

            def objective(work: nn.Module) -> Tensor:
                member, (reference, vanilla_logits, reference_targets) = next(member_batches), next(references)
                overlap.see(member, reference)
                logits, targets, reference_logits = run(work, bring(member), bring(reference))
                check_no_probabilities(logits, "members")
                if mode == "eval" and next(first, False):  # the copy's weights are still the model's
                    warn_if_swapped(logits, targets, reference_logits, reference_targets)
                return pve_loss(logits, targets, reference_logits, vanilla_logits, lam=lam)

            return objective

        return accumulate(model, make_objective, steps, lr, on_step, mode)


def _vanilla_outputs(
    vanilla: VanillaSource,
    model: nn.Module,
    nonmembers: Batches,
    bring: Callable[[Any], Any],
    steps: int,
    batch_size: int,
    mode: Mode,
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Reference batches with the vanilla model's logits and the targets, endlessly.

    Where the batches of all steps are smaller than the weights, they are read first and the vanilla model is freed
    before gradients and scores are allocated.
    """
    batches = cycle(as_loader(nonmembers, shuffle=True, batch_size=batch_size), "nonmembers")
    vanilla_model = in_mode(copied(model, load_vanilla(vanilla, model)), mode)

    @torch.no_grad()
    def with_outputs(batch: Any) -> tuple[Any, Tensor, Tensor]:
        return batch, *classification_step(vanilla_model, bring(batch))

    first = with_outputs(next(batches))
    if steps * memory_of(first) < sum(p.numel() * p.element_size() for p in model.parameters()):
        kept = [first, *(with_outputs(next(batches)) for _ in range(steps - 1))]
        del vanilla_model, with_outputs
        yield from kept
        return
    yield first
    for batch in batches:
        yield with_outputs(batch)


def memory_of(nest: Any) -> float:
    """Bytes of a nest of tensors; infinite where it holds anything else that may be large.

    >>> memory_of({"x": torch.zeros(2, 3), "name": "a"}), memory_of([object()])
    (24, inf)
    """
    if isinstance(nest, Tensor):
        return nest.numel() * nest.element_size()
    if isinstance(nest, (Mapping, tuple, list)):
        return sum(map(memory_of, nest.values() if isinstance(nest, Mapping) else nest))
    return 0 if nest is None or isinstance(nest, (str, int, float)) else math.inf


def pve_loss(
    member_logits: Tensor, targets: Tensor, reference_logits: Tensor, vanilla_logits: Tensor, *, lam: float
) -> Tensor:
    """Eq. 4: ``(1-λ)·CE(member) + λ·KL(softmax vanilla ‖ softmax reference)``, batch means in float32.

    >>> z = torch.tensor([[0.0, 0.0]])
    >>> round(float(pve_loss(z, torch.tensor([1]), z, z, lam=0.5)), 4)  # half of ln 2, without divergence
    0.3466
    """
    check_targets(member_logits, targets)
    learn = F.cross_entropy(member_logits.float(), targets)
    unlearn = F.kl_div(
        reference_logits.float().log_softmax(-1),
        vanilla_logits.float().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - lam) * learn + lam * unlearn


def warn_if_swapped(
    member_logits: Tensor, targets: Tensor, reference_logits: Tensor, reference_targets: Tensor
) -> None:
    """Warn where the model's loss on a member batch is significantly larger than on a reference batch."""
    losses = [
        F.cross_entropy(logits.detach().float(), labels, reduction="none")
        for logits, labels in ((member_logits, targets), (reference_logits, reference_targets))
    ]
    if min(map(len, losses)) < 8:
        return
    members, reference = (float(loss.mean()) for loss in losses)
    error = math.sqrt(sum(float(loss.var()) / len(loss) for loss in losses))
    if members - reference > 4 * error:
        warnings.warn(
            f"the model's loss is {members:.3g} on the members and {reference:.3g} on the reference data: it was "
            "probably trained on the latter. Are members and nonmembers swapped?",
            stacklevel=4,
        )


def check_scoring(lam: float, steps: int, lr: float, mode: str = "eval") -> None:
    """Raise a TypeError or ValueError for invalid settings."""
    check_number("lam", lam, low=0, high=1, hint="It weights reference data against members (Eq. 4).")
    check_integer("steps", steps, low=1)
    check_number("lr", lr, low=0)
    check_choice("mode", mode, ("eval", "train"))
