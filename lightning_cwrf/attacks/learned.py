"""Attacks that are small networks: on shadow models' outputs, or on what a model says of data it never saw."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cwrf.attacks.signals import check_finite, example_losses
from lightning_cwrf.data import isolated_rng


def neural_attack(
    logits: Tensor,
    targets: Tensor,
    shadow_logits: Tensor,
    membership: Tensor,
    *,
    hidden: int = 64,
    epochs: int = 30,
    seed: int = 0,
) -> Tensor:
    """The neural-network attack (Shokri et al. 2017): a classifier trained to tell shadow models' IN from OUT outputs.

    It sees the sorted log-probabilities of an example and the one of its true class; never the audited model's
    membership.

    Args:
        logits: of the audited model, ``(n, K)``.
        targets: class indices ``(n,)``.
        shadow_logits: ``(k, n, K)``.
        membership: bool ``(k, n)``.
        hidden: width of the one hidden layer.
        epochs: passes over the k · n outputs.
        seed: of the network and of the batches; the caller's random state is not touched.

    Returns:
        float64 scores ``(n,)``, the log odds of membership.

    Raises:
        ValueError: wrong shapes; NaN or infinite logits; shadow outputs that are all IN or all OUT.

    >>> shadow_logits = torch.tensor([[[4.0, 0.0], [0.1, 0.0]], [[0.1, 0.0], [4.0, 0.0]]])
    >>> membership = torch.tensor([[True, False], [False, True]])
    >>> odds = neural_attack(torch.tensor([[4.0, 0.0], [0.1, 0.0]]), torch.tensor([0, 0]), shadow_logits, membership)
    >>> bool(odds[0] > odds[1])
    True
    """
    fits = shadow_logits.ndim == 3 and shadow_logits.shape[1:] == logits.shape
    if not fits or membership.shape != shadow_logits.shape[:2]:
        raise ValueError(
            f"for logits of shape {tuple(logits.shape)}, shadow_logits must have shape (k, n, K) and membership "
            f"(k, n), not {tuple(shadow_logits.shape)} and {tuple(membership.shape)}."
        )
    if membership.all() or not membership.any():
        raise ValueError("the neural attack needs shadow outputs of both kinds, IN and OUT.")
    own = _features(logits, targets)
    known = _features(shadow_logits, targets).flatten(0, 1)
    mean, deviation = known.mean(0), known.std(0).clamp_min(1e-6)
    inside = membership.flatten().float()

    def loss(network: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(network(x).squeeze(-1), inside[rows])

    network = _trained((known - mean) / deviation, 1, loss, hidden=hidden, epochs=epochs, seed=seed)
    with torch.no_grad():
        odds: Tensor = network((own - mean) / deviation)
    return odds.squeeze(-1).double()


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

    Args:
        signal: φ of the audited examples, ``(n,)`` (:func:`~lightning_cwrf.attacks.logit_signal`).
        inputs: what is known of them, flat: ``(n, d)`` features (pixels, or an embedding, and one-hot labels).
        population_signal: φ of the population, ``(m,)``.
        population_inputs: ``(m, d)``.
        hidden: width of the one hidden layer.
        epochs: passes over the population.
        seed: of the network and of the batches; the caller's random state is not touched.

    Returns:
        float64 scores ``(n,)``.

    Raises:
        ValueError: wrong shapes, fewer than 10 population points, NaN or infinite values.

    >>> x = torch.linspace(0, 1, 50)[:, None]
    >>> float(quantile_regression(torch.tensor([5.0]), x[:1], x[:, 0], x, epochs=5)) > 1
    True
    """
    signal, population_signal = check_finite("signal", signal), check_finite("population_signal", population_signal)
    if len(population_signal) < 10:
        raise ValueError(
            f"quantile regression needs a population of at least 10 examples, not {len(population_signal)}."
        )
    if inputs.ndim != 2 or population_inputs.shape != (len(population_signal), inputs.shape[-1]):
        raise ValueError(
            f"inputs and population_inputs must be flat features (n, d) and ({len(population_signal)}, d), not "
            f"{tuple(inputs.shape)} and {tuple(population_inputs.shape)}."
        )
    x, known = (
        check_finite("inputs", inputs.T).T.float(),
        check_finite("population_inputs", population_inputs.T).T.float(),
    )
    mean, deviation = known.mean(0), known.std(0).clamp_min(1e-6)
    centre, spread = population_signal.mean(), population_signal.std().clamp_min(1e-6)
    y = ((population_signal - centre) / spread).float()

    def loss(network: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        location, log_scale = network(x).unbind(-1)
        log_scale = log_scale.clamp(-5, 5)
        likelihood: Tensor = ((y[rows] - location).square() * torch.exp(-2 * log_scale) / 2 + log_scale).mean()
        return likelihood

    network = _trained((known - mean) / deviation, 2, loss, hidden=hidden, epochs=epochs, seed=seed)
    with torch.no_grad():
        location, log_scale = network((x - mean) / deviation).double().unbind(-1)
    scores: Tensor = ((signal - centre) / spread - location) / log_scale.clamp(-5, 5).exp()
    return scores


def _features(logits: Tensor, targets: Tensor) -> Tensor:
    log_p = F.log_softmax(check_finite("logits", logits), -1)
    own = -example_losses(logits, targets)
    return torch.cat([log_p.sort(-1, descending=True).values, own.unsqueeze(-1)], -1).clamp_min(-50).float()


def _trained(x: Tensor, outputs: int, loss: object, *, hidden: int, epochs: int, seed: int) -> nn.Module:
    """A network of one hidden layer, by Adam with weight decay, in batches of 256."""
    with isolated_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(x)), 256):
                optimizer.zero_grad()
                loss(network, x[rows], rows).backward()  # type: ignore[operator]
                optimizer.step()
            schedule.step()
    return network.eval()
