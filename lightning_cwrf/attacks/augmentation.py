"""The augmentation attack (Choquette-Choo et al. 2021): label-only, by how robustly an example is predicted right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_cwrf.attacks.signals import check_membership


def augmentation_attack(
    correct: Tensor, shadow_correct: Tensor | None = None, membership: Tensor | None = None
) -> Tensor:
    """Score examples by the augmented views of them that the model predicts right.

    Without shadow models the score is the share of right views. With them it is the log odds of membership given the
    number of right views, counted on the shadow models (with one half added to every count) and made to rise with it.

    Args:
        correct: bool ``(q, n)``, whether the audited model is right on view q of each example.
        shadow_correct: bool ``(q, k, n)``, the same for k shadow models.
        membership: bool ``(k, n)``.

    Returns:
        float64 scores ``(n,)``.

    Raises:
        ValueError: wrong shapes, or ``correct`` that is not bool.

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
    """The image itself, rotated by each angle, and moved by that many pixels to each side; for ``(n, C, H, W)``.

    >>> [view(torch.ones(1, 1, 4, 4)).shape for view in default_views()][0]
    torch.Size([1, 1, 4, 4])
    """
    from torchvision.transforms import functional as image

    moves = [[pixels, 0], [-pixels, 0], [0, pixels], [0, -pixels]]
    turned = [partial(image.rotate, angle=angle, interpolation=image.InterpolationMode.BILINEAR) for angle in degrees]
    moved = [partial(image.affine, angle=0.0, translate=move, scale=1.0, shear=[0.0]) for move in moves]
    return [_same, *turned, *moved]


def _same(inputs: Tensor) -> Tensor:
    if inputs.ndim < 3 or not inputs.is_floating_point():
        raise ValueError(
            f"the default views rotate and move images (n, C, H, W) of floats, not {inputs.dtype} of shape "
            f"{tuple(inputs.shape)}; pass views=[...], functions of a batch of inputs."
        )
    return inputs
