"""The loss attack (Yeom et al. 2018): a threshold on the loss, without shadow models."""

from __future__ import annotations

from torch import Tensor

from lightning_cwrf.attacks.base import Evidence, register_attack
from lightning_cwrf.attacks.signals import check_finite, example_losses


def loss_threshold(losses: Tensor) -> Tensor:
    """The loss attack (Yeom et al. 2018): an example's score is minus its loss.

    Args:
        losses: per-example losses of the audited model, shape ``(n,)``.

    Returns:
        float64 scores of shape ``(n,)``; thresholding them at −τ calls every example with a loss of at most τ a member.

    >>> from torch import tensor
    >>> loss_threshold(tensor([0.5, 2.0]))
    tensor([-0.5000, -2.0000], dtype=torch.float64)
    """
    return -check_finite("losses", losses)


@register_attack("loss")
def _attack(evidence: Evidence) -> Tensor:
    return loss_threshold(evidence.signal(example_losses))
