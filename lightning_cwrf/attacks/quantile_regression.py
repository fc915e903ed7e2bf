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
    Gaussian likelihood (the paper's parametric variant). An example's residual is ``(signal − mean) / spread``.

    Neither is the network right nor are residuals normal, so quantiles of the normal distribution would not have the
    false positive rates that they promise: a network that has learned the population by heart gives fresh non-members
    large residuals. So the population is divided at random into three parts. The network learns from the first (60 %);
    it is kept as it was in the epoch with the lowest loss on the second (15 %); and a residual's rank among those of
    the third, c examples, is its score (split conformal prediction; Papadopoulos et al. 2002, Vovk et al. 2005).

    **Accusing where score ≥ 1 − f has a false positive rate of at most ⌈f (c + 1)⌉ / (c + 1)**, which is f where f is a
    multiple of 1 / (c + 1). This is exact, whatever the network has learned, on average over populations, for
    non-members that are drawn as the population was; with this one population the rate varies around it as
    Beta(j, c + 1 − j), j = f (c + 1), does. It holds over all such non-members, not in each class. No f below
    1 / (c + 1) can be promised. Within a step of 1 / (c + 1), scores are ordered by the residual, so the ROC is that of
    the residuals.

    Features are standardised by the first part and clamped to its range, beyond which nothing was learned. So a
    feature that is constant there has no effect, also where an example differs.

    Args:
        signal: φ of the audited examples, ``(n,)`` (:func:`~lightning_cwrf.attacks.logit_signal`).
        inputs: their features, flat: ``(n, d)`` (pixels, or an embedding, and one-hot labels).
        population_signal: φ of the population, ``(m,)``.
        population_inputs: ``(m, d)``.
        hidden: width of the one hidden layer.
        epochs: most passes over the first part, in batches of 256, or in 64 batches where that is fewer.
        seed: of the parts, the network and the batches; the caller's random state is not touched.

    Returns:
        float64 scores ``(n,)``, strictly between 0 and 1.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: wrong shapes or settings, fewer than 10 population points, NaN or infinite values.

    >>> x = torch.linspace(0, 1, 50)[:, None]
    >>> quantile_regression(torch.tensor([5.0, -5.0]), x[:2], x[:, 0], x, epochs=5) > 0.5
    tensor([ True, False])
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
    first, second, third = _parts(len(known), seed, known.device)
    centre, spread = population_signal[first].mean(), population_signal[first].std().clamp_min(1e-6)

    def loss(predicted: Tensor, y: Tensor) -> Tensor:
        location, log_scale = predicted.unbind(-1)
        log_scale = log_scale.clamp(-5, 5)
        likelihood: Tensor = ((y - location).square() * torch.exp(-2 * log_scale) / 2 + log_scale).mean()
        return likelihood

    y = (population_signal - centre) / spread
    learned, asked = standardize(known[first], torch.cat([known[second], known[third], x]))
    stop, asked = asked[: len(second)], asked[len(second) :]
    held_out = stop, y[second].float()
    settings = {"hidden": hidden, "epochs": epochs, "seed": seed}
    predicted = fit_predict(learned, y[first].float(), asked, 2, loss, **settings, held_out=held_out)
    location, log_scale = predicted.unbind(-1)
    residuals = (torch.cat([y[third], (signal - centre) / spread]) - location) / log_scale.clamp(-5, 5).exp()
    return conformal_score(residuals[len(third) :], residuals[: len(third)])


def conformal_score(residuals: Tensor, calibration: Tensor) -> Tensor:
    """``(#{calibration < residual} + s) / (c + 1)``, with s between 0 and 1 rising with the residual; float64 ``(n,)``.

    One minus the conformal p-value ``(#{calibration ≥ residual} + 1) / (c + 1)``, and a place within its step.

    >>> conformal_score(torch.tensor([-1.0, 0.0, 9.0]), torch.tensor([0.0, 1.0, 2.0]))
    tensor([0.0625, 0.1250, 0.9875], dtype=torch.float64)
    """
    below = torch.searchsorted(calibration.double().sort().values, residuals.double())
    place = (1 + residuals.double() / (1 + residuals.double().abs())) / 2
    return (below + place) / (len(calibration) + 1)


def _parts(m: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """To learn from (60 %), to stop by (15 %) and to calibrate on (25 %), drawn at random."""
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed), device="cpu").to(device)
    learn, stop = m * 3 // 5, m * 3 // 4
    return order[:learn], order[learn:stop], order[stop:]


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
