"""Quantile regression (Bertran et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_cwrf.attacks.base import Evidence, register_attack
from lightning_cwrf.attacks.network import check_network, fit_predict, standardize
from lightning_cwrf.attacks.signals import check_finite, check_targets, logit_signal


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
    """Quantile regression (Bertran et al. 2023): how unusual a signal is given the input, without shadow models.

    A network learns the mean and the spread of the signal given the input, on data the audited model never saw, by the
    Gaussian likelihood (the paper's parametric variant). The score is ``(signal − mean) / spread``: thresholding it at
    the normal quantile of 1 − f is the q-quantile test at false positive rate f, for every f at once.

    Features are standardised by the population and clamped to its range, beyond which nothing was learned. So a
    feature that is constant in the population has no effect, also where an example differs there.

    Args:
        signal: φ of the audited examples, ``(n,)`` (:func:`~lightning_cwrf.attacks.logit_signal`).
        inputs: their features, flat: ``(n, d)`` (pixels, or an embedding, and one-hot labels).
        population_signal: φ of the population, ``(m,)``.
        population_inputs: ``(m, d)``.
        hidden: width of the one hidden layer.
        epochs: passes over the population, in batches of 256, or in 64 batches where that is fewer.
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
    x = check_finite("inputs", inputs.T).T.float()
    known = check_finite("population_inputs", population_inputs.T).T.float()
    centre, spread = population_signal.mean(), population_signal.std().clamp_min(1e-6)

    def loss(predicted: Tensor, y: Tensor) -> Tensor:
        location, log_scale = predicted.unbind(-1)
        log_scale = log_scale.clamp(-5, 5)
        likelihood: Tensor = ((y - location).square() * torch.exp(-2 * log_scale) / 2 + log_scale).mean()
        return likelihood

    y = ((population_signal - centre) / spread).float()
    known, x = standardize(known, x)
    predicted = fit_predict(known, y, x, 2, loss, hidden=hidden, epochs=epochs, seed=seed)
    location, log_scale = predicted.unbind(-1)
    scores: Tensor = ((signal - centre) / spread - location) / log_scale.clamp(-5, 5).exp()
    return scores


@register_attack(
    "quantile_regression",
    "population",
    "inputs",
    "population_inputs",
    settings_of=quantile_regression,
    check=check_network,
)
def _attack(evidence: Evidence, **settings: Any) -> Tensor:
    logits, known_logits = evidence.logits, evidence.require("population_logits")
    targets = check_targets(logits, evidence.targets)
    known_targets = check_targets(known_logits, evidence.require("population_targets"))
    classes = logits.shape[-1]
    if known_logits.shape[-1] != classes:
        raise ValueError(
            f"the population's logits have {known_logits.shape[-1]} classes, those of the examples {classes}."
        )
    missing = targets[torch.bincount(known_targets, minlength=classes)[targets] == 0]
    if len(missing):
        raise ValueError(
            f"the population has no example of the classes {sorted(set(missing.tolist()))[:10]}, to which "
            f"{len(missing)} of the {len(targets)} audited examples belong: the signal of a class can only be learned "
            f"from its examples. Add some to the population of {len(known_targets)}."
        )

    def features(inputs: Tensor, labels: Tensor) -> Tensor:
        """An attacker knows the label of an example as well as its input."""
        return torch.cat([inputs, F.one_hot(labels, classes).to(inputs.dtype)], 1)

    return quantile_regression(
        evidence.signal(logit_signal),
        features(evidence.require("inputs"), targets),
        evidence.signal(logit_signal, "population"),
        features(evidence.require("population_inputs"), known_targets),
        **settings,
    )
