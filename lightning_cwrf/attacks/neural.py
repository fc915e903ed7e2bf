"""The neural-network attack (Shokri et al. 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_cwrf.attacks.base import Evidence, register_attack
from lightning_cwrf.attacks.network import check_network, fit_predict, standardize
from lightning_cwrf.attacks.signals import check_finite, check_logits, check_membership, check_targets, example_losses
from lightning_cwrf.checks import check_integer


def neural_attack(
    logits: Tensor,
    targets: Tensor,
    shadow_logits: Tensor,
    membership: Tensor,
    *,
    hidden: int = 64,
    epochs: int = 30,
    seed: int = 0,
    outputs: int = 50_000,
) -> Tensor:
    """The neural-network attack (Shokri et al. 2017): a classifier trained on shadow models' IN and OUT outputs.

    Its features are the sorted log-probabilities of an example and that of its true class; the audited model's
    membership is not used. Features of the audited model are clamped to the range of the shadow models'.

    Args:
        logits: of the audited model, ``(n, K)``.
        targets: class indices ``(n,)``.
        shadow_logits: ``(k, n, K)``.
        membership: bool ``(k, n)``.
        hidden: width of the one hidden layer.
        epochs: passes over the outputs, in batches of 256, or in 64 batches where that is fewer.
        seed: of the network and of the batches; the caller's random state is not touched.
        outputs: the maximum number of outputs to train on; if k · n is larger, this many are drawn with replacement.

    Returns:
        float64 scores ``(n,)``, the log odds of membership.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: wrong shapes or settings; NaN or infinite logits; only IN or only OUT outputs.

    >>> shadow_logits = torch.tensor([[[4.0, 0.0], [0.1, 0.0]], [[0.1, 0.0], [4.0, 0.0]]])
    >>> membership = torch.tensor([[True, False], [False, True]])
    >>> odds = neural_attack(torch.tensor([[4.0, 0.0], [0.1, 0.0]]), torch.tensor([0, 0]), shadow_logits, membership)
    >>> bool(odds[0] > odds[1])
    True
    """
    check_neural(hidden=hidden, epochs=epochs, seed=seed, outputs=outputs)
    targets = check_targets(logits, targets)
    if logits.ndim != 2 or shadow_logits.ndim != 3 or shadow_logits.shape[1:] != logits.shape:
        raise ValueError(
            f"for logits of shape {tuple(logits.shape)}, shadow_logits must have shape (k, n, K), not "
            f"{tuple(shadow_logits.shape)}."
        )
    check_membership(membership, tuple(shadow_logits.shape[:2]))
    check_logits("shadow_logits", shadow_logits, targets)
    membership = membership.to(shadow_logits.device)
    models, examples = draw_outputs(membership, outputs, seed)
    inside = membership[models, examples].float()
    if inside.all() or not inside.any():
        raise ValueError("the neural attack needs shadow outputs of both kinds, IN and OUT.")
    own = _features(logits, targets)
    known = _features(shadow_logits[models, examples], targets[examples])

    def loss(odds: Tensor, inside: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(odds.squeeze(-1), inside)

    known, own = standardize(known, own)
    return fit_predict(known, inside, own, 1, loss, hidden=hidden, epochs=epochs, seed=seed).squeeze(-1)


def check_neural(*, hidden: int = 64, epochs: int = 30, seed: int = 0, outputs: int = 50_000) -> None:
    """Raise if a setting of :func:`neural_attack` is invalid."""
    check_network(hidden=hidden, epochs=epochs, seed=seed)
    check_integer("outputs", outputs, low=2)


def draw_outputs(membership: Tensor, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Models and examples of the outputs to train on: all, or ``outputs`` of them drawn with replacement."""
    every = membership.numel()
    if every <= outputs:
        places = torch.arange(every)
    else:
        places = torch.randint(every, (outputs,), generator=torch.Generator().manual_seed(seed))
    places = places.to(membership.device)
    return places // membership.shape[1], places % membership.shape[1]


def _features(logits: Tensor, targets: Tensor) -> Tensor:
    log_p = F.log_softmax(check_finite("logits", logits), -1)
    own = -example_losses(logits, targets)
    return torch.cat([log_p.sort(-1, descending=True).values, own.unsqueeze(-1)], -1).clamp_min(-50).float()


@register_attack("neural", "shadows", settings_of=neural_attack, check=check_neural)
def _attack(evidence: Evidence, **settings: Any) -> Tensor:
    shadow_logits, membership = evidence.require("shadow_logits"), evidence.require("membership")
    return neural_attack(evidence.logits, evidence.targets, shadow_logits, membership, **settings)
