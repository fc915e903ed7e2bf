"""The package's attacks, each under its name: what each takes from the evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_cwrf.attacks.augmentation import augmentation_attack
from lightning_cwrf.attacks.bavaria import bavaria, check_bavaria
from lightning_cwrf.attacks.evidence import Evidence
from lightning_cwrf.attacks.learned import check_network, check_neural, neural_attack, quantile_regression
from lightning_cwrf.attacks.lira import check_lira, lira
from lightning_cwrf.attacks.metric_based import calibrated, confidence, correctness, entropy, modified_entropy
from lightning_cwrf.attacks.reference import attack_p, attack_r
from lightning_cwrf.attacks.registry import register_attack
from lightning_cwrf.attacks.rmia import check_rmia, rmia
from lightning_cwrf.attacks.signals import (
    check_targets,
    example_losses,
    logit_signal,
    true_class_probability,
)
from lightning_cwrf.attacks.threshold import loss_threshold
from lightning_cwrf.checks import check_flag

Function = Callable[..., Tensor]


@register_attack("loss")
def _loss(evidence: Evidence) -> Tensor:
    return loss_threshold(example_losses(evidence.logits, evidence.targets))


def _register_signal_attacks(name: str, function: Function, check: Callable[..., None]) -> None:
    @register_attack(name, "shadows", settings_of=function, check=check)
    def attack(evidence: Evidence, **settings: Any) -> Tensor:
        own = logit_signal(evidence.logits, evidence.targets)
        return function(own, evidence.shadow_signals(logit_signal), evidence.membership, **settings)


_register_signal_attacks("lira", lira, check_lira)
_register_signal_attacks("bavaria", bavaria, check_bavaria)


@register_attack("rmia", "shadows", "shadow_population", "population", settings_of=rmia, check=check_rmia)
def _rmia(evidence: Evidence, **settings: Any) -> Tensor:
    return rmia(
        true_class_probability(evidence.logits, evidence.targets),
        evidence.shadow_signals(true_class_probability),
        _given(evidence.membership),
        true_class_probability(_given(evidence.population_logits), _given(evidence.population_targets)),
        evidence.shadow_signals(true_class_probability, "population"),
        **settings,
    )


@register_attack("attack_p", "population")
def _attack_p(evidence: Evidence) -> Tensor:
    population = example_losses(_given(evidence.population_logits), _given(evidence.population_targets))
    return attack_p(example_losses(evidence.logits, evidence.targets), population)


@register_attack("attack_r", "shadows")
def _attack_r(evidence: Evidence) -> Tensor:
    shadows = evidence.shadow_signals(example_losses)
    return attack_r(example_losses(evidence.logits, evidence.targets), shadows, _given(evidence.membership))


def _check_metric(per_class: bool = True) -> None:
    check_flag("per_class", per_class)


def _register_metric(name: str, signal: Function) -> None:
    @register_attack(name, check=_check_metric)
    def attack(evidence: Evidence, per_class: bool = True) -> Tensor:
        own = signal(evidence.logits, evidence.targets)
        if not evidence.has("shadow_logits"):
            return own
        shadows = evidence.shadow_signals(signal)
        return calibrated(own, evidence.targets, shadows, _given(evidence.membership), per_class=per_class)


for _name, _signal in {
    "correctness": correctness,
    "confidence": confidence,
    "entropy": entropy,
    "modified_entropy": modified_entropy,
}.items():
    _register_metric(_name, _signal)


@register_attack("neural", "shadows", settings_of=neural_attack, check=check_neural)
def _neural(evidence: Evidence, **settings: Any) -> Tensor:
    shadows, membership = _given(evidence.shadow_logits), _given(evidence.membership)
    return neural_attack(evidence.logits, evidence.targets, shadows, membership, **settings)


@register_attack(
    "quantile_regression",
    "population",
    "inputs",
    "population_inputs",
    settings_of=quantile_regression,
    check=check_network,
)
def _quantile_regression(evidence: Evidence, **settings: Any) -> Tensor:
    logits, known_logits = evidence.logits, _given(evidence.population_logits)
    targets = check_targets(logits, evidence.targets)
    known_targets = check_targets(known_logits, _given(evidence.population_targets))
    classes = logits.shape[-1]
    if known_logits.shape[-1] != classes:
        raise ValueError(
            f"the population's logits are of {known_logits.shape[-1]} classes, the examples' of {classes}."
        )
    lost = targets[torch.bincount(known_targets, minlength=classes)[targets] == 0]
    if len(lost):
        raise ValueError(
            f"the population has no example of the classes {sorted(set(lost.tolist()))[:10]}, which {len(lost)} of the "
            f"{len(targets)} audited examples have: what a class's signal is like can only be learned from it. Add "
            f"examples of them to the population of {len(known_targets)}."
        )
    # Beside its input, an example's label is known.
    own, known = (
        (logit_signal(z, y), torch.cat([x, F.one_hot(y, classes).to(x.dtype)], 1))
        for z, y, x in (
            (logits, targets, _given(evidence.inputs)),
            (known_logits, known_targets, _given(evidence.population_inputs)),
        )
    )
    return quantile_regression(*own, *known, **settings)


@register_attack("augmentation", "views")
def _augmentation(evidence: Evidence) -> Tensor:
    own = correctness(_given(evidence.view_logits), evidence.targets) > 0
    if not evidence.has("shadow_view_logits", "membership"):
        return augmentation_attack(own)
    shadows = evidence.shadow_signals(correctness, "views").transpose(0, 1) > 0
    return augmentation_attack(own, shadows, evidence.membership)


@register_attack("lira_views", "shadows", "views", "shadow_views", settings_of=lira, check=check_lira)
def _lira_views(evidence: Evidence, **settings: Any) -> Tensor:
    own = logit_signal(_given(evidence.view_logits), evidence.targets)
    shadows = evidence.shadow_signals(logit_signal, "views").transpose(0, 1)
    return lira(own, shadows, _given(evidence.membership), **settings)


def _given(value: Tensor | None) -> Tensor:
    assert value is not None  # Attack.__call__ has checked what the attack needs
    return value
