"""Attacks that are small networks: on shadow models' outputs, or on what a model says of data it never saw."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cwrf.attacks.signals import check_finite, check_logits, check_membership, check_targets, example_losses
from lightning_cwrf.checks import check_integer
from lightning_cwrf.data import isolated_rng

_BATCH, _STEPS = 256, 64
"""Examples in a batch, and batches in an epoch at most: with more examples the batches are larger."""


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
    """The neural-network attack (Shokri et al. 2017): a classifier trained to tell shadow models' IN from OUT outputs.

    It sees the sorted log-probabilities of an example and the one of its true class; never the audited model's
    membership. What of the audited model's lies outside of what the shadow models have counts as the nearest that they
    have.

    Args:
        logits: of the audited model, ``(n, K)``.
        targets: class indices ``(n,)``.
        shadow_logits: ``(k, n, K)``.
        membership: bool ``(k, n)``.
        hidden: width of the one hidden layer.
        epochs: passes over the outputs, in batches of 256 or, where that makes more than 64 of them, in 64 batches.
        seed: of the network and of the batches; the caller's random state is not touched.
        outputs: how many of the k · n outputs to train on: where there are more, so many are drawn (with replacement).

    Returns:
        float64 scores ``(n,)``, the log odds of membership.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: wrong shapes or settings; NaN or infinite logits; shadow outputs that are all IN or all OUT.

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
    models, examples = _drawn(membership, outputs, seed)
    inside = membership[models, examples].float()
    if inside.all() or not inside.any():
        raise ValueError("the neural attack needs shadow outputs of both kinds, IN and OUT.")
    own = _features(logits, targets)
    known = _features(shadow_logits[models, examples], targets[examples])

    def loss(odds: Tensor, inside: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(odds.squeeze(-1), inside)

    known, own = _scaled(known, own)
    return _learned(known, inside, own, 1, loss, hidden=hidden, epochs=epochs, seed=seed).squeeze(-1)


def quantile_regression(
    signal: Tensor,
    inputs: Tensor,
    population_signal: Tensor,
    population_inputs: Tensor,
    *,
    hidden: int = 64,
    epochs: int = 60,
    seed: int = 0,
) -> Tensor:
    """Quantile regression (Bertran et al. 2023): how unusual a signal is for such an input, without shadow models.

    A network learns the mean and the spread of the signal given the input, on data the audited model never saw, by the
    Gaussian likelihood (the paper's parametric variant). The score is ``(signal − mean) / spread``: thresholding it at
    the normal quantile of 1 − f is the q-quantile test at false positive rate f, for every f at once.

    A feature is standardised by the population, and where an example's lies outside of what the population has, the
    nearest value that it has is taken: beyond, nothing was learned. A feature that is constant in the population so
    says nothing, also of an example that differs there.

    Args:
        signal: φ of the audited examples, ``(n,)`` (:func:`~lightning_cwrf.attacks.logit_signal`).
        inputs: what is known of them, flat: ``(n, d)`` features (pixels, or an embedding, and one-hot labels).
        population_signal: φ of the population, ``(m,)``.
        population_inputs: ``(m, d)``.
        hidden: width of the one hidden layer.
        epochs: passes over the population, in batches of 256 or, where that makes more than 64 of them, in 64 batches.
        seed: of the network and of the batches; the caller's random state is not touched.

    Returns:
        float64 scores ``(n,)``.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: wrong shapes or settings, fewer than 10 population points, NaN or infinite values.

    >>> x = torch.linspace(0, 1, 50)[:, None]
    >>> float(quantile_regression(torch.tensor([5.0]), x[:1], x[:, 0], x, epochs=5)) > 1
    True
    """
    check_network(hidden=hidden, epochs=epochs, seed=seed)
    signal, population_signal = check_finite("signal", signal), check_finite("population_signal", population_signal)
    if signal.ndim != 1 or population_signal.ndim != 1:
        raise ValueError(
            f"signal and population_signal must have shapes (n,) and (m,), not {tuple(signal.shape)} and "
            f"{tuple(population_signal.shape)}."
        )
    if len(population_signal) < 10:
        raise ValueError(
            f"quantile regression needs a population of at least 10 examples, not {len(population_signal)}."
        )
    flat = inputs.ndim == population_inputs.ndim == 2 and inputs.shape[1] == population_inputs.shape[1]
    if not flat or len(inputs) != len(signal) or len(population_inputs) != len(population_signal):
        raise ValueError(
            f"inputs and population_inputs must be flat features ({len(signal)}, d) and ({len(population_signal)}, d), "
            f"not {tuple(inputs.shape)} and {tuple(population_inputs.shape)}."
        )
    x, known = (
        check_finite("inputs", inputs.T).T.float(),
        check_finite("population_inputs", population_inputs.T).T.float(),
    )
    centre, spread = population_signal.mean(), population_signal.std().clamp_min(1e-6)

    def loss(predicted: Tensor, y: Tensor) -> Tensor:
        location, log_scale = predicted.unbind(-1)
        log_scale = log_scale.clamp(-5, 5)
        likelihood: Tensor = ((y - location).square() * torch.exp(-2 * log_scale) / 2 + log_scale).mean()
        return likelihood

    y = ((population_signal - centre) / spread).float()
    known, x = _scaled(known, x)
    predicted = _learned(known, y, x, 2, loss, hidden=hidden, epochs=epochs, seed=seed)
    location, log_scale = predicted.unbind(-1)
    scores: Tensor = ((signal - centre) / spread - location) / log_scale.clamp(-5, 5).exp()
    return scores


def check_network(*, hidden: int = 64, epochs: int = 30, seed: int = 0) -> None:
    """Raise where a setting of a learned attack is wrong."""
    check_integer("hidden", hidden, low=1)
    check_integer("epochs", epochs, low=1, hint="An untrained network says nothing.")
    check_integer("seed", seed, low=-(2**63), high=2**64 - 1)


def check_neural(*, hidden: int = 64, epochs: int = 30, seed: int = 0, outputs: int = 50_000) -> None:
    """Raise where a setting of :func:`neural_attack` is wrong."""
    check_network(hidden=hidden, epochs=epochs, seed=seed)
    check_integer("outputs", outputs, low=2)


def _drawn(membership: Tensor, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Models and examples of the outputs to train on: all of them, or so many, drawn with replacement."""
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


def _scaled(known: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Both standardised by what is known; what is asked is brought into its range first, feature by feature."""
    least, most = known.aminmax(dim=0)
    mean, deviation = known.mean(0), known.std(0).masked_fill(least == most, 1.0)
    return (known - mean) / deviation, (asked.clamp(least, most) - mean) / deviation


def _learned(
    x: Tensor,
    y: Tensor,
    asked: Tensor,
    outputs: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    hidden: int,
    epochs: int,
    seed: int,
) -> Tensor:
    """What a network of one hidden layer, trained on x and y, says of ``asked``: float64 ``(n, outputs)``.

    By Adam with weight decay; in float32 and with gradients, whatever precision and mode surround the call.
    """
    device = x.device
    around = torch.autocast(device.type, enabled=False), torch.inference_mode(False), torch.enable_grad()
    with isolated_rng(), around[0], around[1], around[2]:
        # Tensors made in inference mode cannot be trained on; their copies can.
        x, y, asked = (part.detach().clone() for part in (x, y, asked))
        torch.manual_seed(seed)
        first = nn.Linear(x.shape[1], hidden, device="cpu", dtype=torch.float32)
        last = nn.Linear(hidden, outputs, device="cpu", dtype=torch.float32)
        network = nn.Sequential(first, nn.ReLU(), last).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        size = max(_BATCH, -(-len(x) // _STEPS))
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(x), device="cpu").to(device), size):
                optimizer.zero_grad()
                torch.autograd.backward(loss(network(x[rows]), y[rows]))
                optimizer.step()
            schedule.step()
        found: Tensor = network(asked).detach().double()
    return found
