"""The augmentation attack (Choquette-Choo et al. 2021): label-only, how robust a correct prediction is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_cwrf.attacks.base import Evidence, register_attack
from lightning_cwrf.attacks.metric_based import correctness
from lightning_cwrf.attacks.signals import check_membership


def augmentation_attack(
    correct: Tensor, shadow_correct: Tensor | None = None, membership: Tensor | None = None
) -> Tensor:
    """Score examples by how many of their augmented views the model predicts correctly.

    Without shadow models the score is the share of correct views. With them it is the log odds of membership given
    the number of correct views, estimated on the shadow models (with one half added to every count) and made monotone.

    Args:
        correct: bool ``(q, n)``, whether the audited model is correct on view q of each example.
        shadow_correct: bool ``(q, k, n)``, the same for k shadow models.
        membership: bool ``(k, n)``.

    Returns:
        float64 scores ``(n,)``.

    Raises:
        ValueError: wrong shapes or types.

    >>> augmentation_attack(torch.tensor([[True, True], [True, False]]))
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if correct.dtype != torch.bool or correct.ndim != 2 or len(correct) == 0:
        raise ValueError(f"correct must be bool of shape (q, n), not {correct.dtype} of shape {tuple(correct.shape)}.")
    if shadow_correct is not None and shadow_correct.dtype != torch.bool:
        raise ValueError(f"shadow_correct must be bool, as correct is, not {shadow_correct.dtype}.")
    views = len(correct)
    right = correct.sum(0)
    if shadow_correct is None:
        return right.double() / views
    if membership is None or shadow_correct.shape != (views, *membership.shape) or membership.shape[1] != len(right):
        raise ValueError(
            f"shadow_correct must have shape ({views}, k, {len(right)}), and membership (k, {len(right)})."
        )
    check_membership(membership, tuple(membership.shape))
    counted = shadow_correct.sum(0)
    inside, outside = (
        torch.bincount(counted[chosen], minlength=views + 1).double() + 0.5 for chosen in (membership, ~membership)
    )
    odds = (inside / inside.sum()).log() - (outside / outside.sum()).log()
    return odds.cummax(0).values[right] + right.double() / (views + 1) * 1e-6


def default_views(degrees: tuple[float, ...] = (-8, -4, 4, 8), pixels: int = 1) -> list[Callable[[Tensor], Tensor]]:
    """For images ``(n, C, H, W)``: the image, rotated by each angle, and moved by ``pixels`` in each direction.

    >>> [view(torch.ones(1, 1, 4, 4)).shape for view in default_views()][0]
    torch.Size([1, 1, 4, 4])
    """
    from torchvision.transforms import functional as image

    moves = [[pixels, 0], [-pixels, 0], [0, pixels], [0, -pixels]]
    turned = [partial(image.rotate, angle=angle, interpolation=image.InterpolationMode.BILINEAR) for angle in degrees]
    moved = [partial(image.affine, angle=0.0, translate=move, scale=1.0, shear=[0.0]) for move in moves]
    return [_unchanged, *turned, *moved]


def _unchanged(inputs: Tensor) -> Tensor:
    if inputs.ndim < 3 or not inputs.is_floating_point():
        raise ValueError(
            f"the default views rotate and move images (n, C, H, W) of floats, not {inputs.dtype} of shape "
            f"{tuple(inputs.shape)}; pass views=[...], functions of a batch of inputs."
        )
    return inputs


@register_attack("augmentation", "views")
def _attack(evidence: Evidence) -> Tensor:
    correct = evidence.signal(correctness, "views") > 0
    if not evidence.has("shadow_view_logits", "membership"):
        return augmentation_attack(correct)
    shadow_correct = evidence.shadow_signals(correctness, "views").transpose(0, 1) > 0
    return augmentation_attack(correct, shadow_correct, evidence.membership)
