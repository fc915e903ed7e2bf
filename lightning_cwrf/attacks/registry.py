"""Attacks by name, over one description of what an attacker may see."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_cwrf.attacks.augmentation import augmentation_attack
from lightning_cwrf.attacks.bavaria import bavaria
from lightning_cwrf.attacks.learned import neural_attack, quantile_regression
from lightning_cwrf.attacks.lira import lira
from lightning_cwrf.attacks.metric_based import calibrated, confidence, correctness, entropy, modified_entropy
from lightning_cwrf.attacks.reference import attack_p, attack_r
from lightning_cwrf.attacks.rmia import rmia
from lightning_cwrf.attacks.signals import check_finite, example_losses, logit_signal, true_class_probability
from lightning_cwrf.attacks.threshold import loss_threshold


@dataclass(frozen=True)
class Evidence:
    """What an attacker sees: outputs of the audited model, of shadow models, and on a population. No membership of it.

    Attributes:
        logits: of the audited model on the n examples, ``(n, K)``.
        targets: class indices ``(n,)``.
        shadow_logits: of the k shadow models, ``(k, n, K)``.
        membership: of the shadow models, bool ``(k, n)``.
        population_logits: of the audited model on m examples that no model was trained on, ``(m, K)``.
        population_targets: ``(m,)``.
        shadow_population_logits: ``(k, m, K)``.
        inputs: flat features of the examples, ``(n, d)``.
        population_inputs: ``(m, d)``.
        view_logits: of the audited model on q augmented views of the examples, ``(q, n, K)``.
        shadow_view_logits: of the shadow models on the same views, ``(k, q, n, K)``.
    """

    logits: Tensor
    targets: Tensor
    shadow_logits: Tensor | None = None
    membership: Tensor | None = None
    population_logits: Tensor | None = None
    population_targets: Tensor | None = None
    shadow_population_logits: Tensor | None = None
    inputs: Tensor | None = None
    population_inputs: Tensor | None = None
    view_logits: Tensor | None = None
    shadow_view_logits: Tensor | None = None


Function: TypeAlias = Callable[..., Tensor]
_NEEDS = {
    "shadows": ("shadow_logits", "shadow models: pass shadows= (lightning_cwrf.train_shadows)"),
    "population": ("population_logits", "a population: data that no model was trained on"),
    "shadow_population": ("shadow_population_logits", "a population: pass population= to train_shadows"),
    "inputs": ("inputs", "the examples' inputs"),
    "views": ("view_logits", "the model's outputs on augmented views"),
    "shadow_views": ("shadow_view_logits", "shadow models' outputs on views: pass views= to train_shadows"),
}


@dataclass(frozen=True)
class Attack:
    """An attack and its settings. Calling it with :class:`Evidence` gives one score per example."""

    name: str
    function: Function = field(repr=False)
    needs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check(self, evidence: Evidence) -> None:
        """Raise a ValueError that names what the attack needs and the evidence lacks."""
        for need in self.needs:
            attribute, what = _NEEDS[need]
            if getattr(evidence, attribute) is None:
                raise ValueError(f"the {self.name} attack needs {what}.")

    def __call__(self, evidence: Evidence) -> Tensor:
        """Scores ``(n,)``, higher = more likely a member.

        Raises:
            ValueError: the evidence lacks what the attack needs, or does not fit together.
        """
        self.check(evidence)
        scores = self.function(evidence, **self.settings)
        if scores.shape != evidence.targets.shape:
            raise ValueError(
                f"the {self.name} attack gave scores of shape {tuple(scores.shape)}; one per example is "
                f"{tuple(evidence.targets.shape)}."
            )
        return scores


class _Registered(NamedTuple):
    function: Function
    needs: tuple[str, ...]
    settings: tuple[str, ...]


_ATTACKS: dict[str, _Registered] = {}


def register_attack(name: str, *needs: str, settings_of: Function | None = None) -> Callable[[Function], Function]:
    """A decorator that makes ``function(evidence, **settings) -> scores`` known by a name.

    Args:
        name: of the attack.
        needs: of ``"shadows"``, ``"population"``, ``"shadow_population"``, ``"inputs"``, ``"views"``,
            ``"shadow_views"``; evidence without them is an error before the function is called.
        settings_of: a function whose keyword-only arguments are the settings; None: the registered function's own
            arguments after the evidence.

    Raises:
        ValueError: another attack has the name; an unknown need.

    >>> @register_attack("margin")
    ... def margin(evidence):
    ...     first, second = evidence.logits.topk(2).values.unbind(-1)
    ...     return first - second
    >>> create_attack("margin").name
    'margin'
    >>> _ = _ATTACKS.pop("margin")
    """
    unknown = sorted(set(needs) - set(_NEEDS))
    if unknown:
        raise ValueError(f"unknown needs {', '.join(unknown)}; known are {', '.join(_NEEDS)}.")

    def register(function: Function) -> Function:
        parameters = list(inspect.signature(settings_of or function).parameters.values())
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY] if settings_of else parameters[1:]
        known = _Registered(function, needs, tuple(p.name for p in own))
        if _ATTACKS.setdefault(name, known).function is not function:
            raise ValueError(f"there is an attack {name!r} already.")
        return function

    return register


def create_attack(name: str, **settings: Any) -> Attack:
    """The attack of that name with these settings.

    Raises:
        ValueError: an unknown name; the known ones are listed.
        TypeError: an unknown setting; the known ones are listed.

    >>> create_attack("lira", online=False).settings
    {'online': False}
    """
    if name not in _ATTACKS:
        raise ValueError(f"there is no attack {name!r}; known are {', '.join(available_attacks())}.")
    function, needs, known = _ATTACKS[name]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise TypeError(f"the {name} attack has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}.")
    return Attack(name, function, needs, settings)


def create_attacks(attacks: Sequence[str | Attack]) -> list[Attack]:
    """Attacks of which some are given by name.

    Raises:
        TypeError: one name in the place of a list.
        ValueError: an unknown name, the same attack twice, or none.
    """
    if isinstance(attacks, str):
        raise TypeError(f"attacks must be a list of names, such as [{attacks!r}].")
    chosen = [create_attack(attack) if isinstance(attack, str) else attack for attack in attacks]
    names = [attack.name for attack in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise ValueError(f"attacks must be given once each, and one at least; {', '.join(twice) or 'there is none'}.")
    return chosen


def available_attacks() -> list[str]:
    """The names that :func:`create_attack` knows."""
    return sorted(_ATTACKS)


@register_attack("loss")
def _loss(evidence: Evidence) -> Tensor:
    return loss_threshold(example_losses(evidence.logits, evidence.targets))


def _register_signal_attacks(name: str, function: Function) -> None:
    @register_attack(name, "shadows", settings_of=function)
    def attack(evidence: Evidence, **settings: Any) -> Tensor:
        targets = evidence.targets
        own, shadows = logit_signal(evidence.logits, targets), logit_signal(_given(evidence.shadow_logits), targets)
        return function(own, shadows, evidence.membership, **settings)


_register_signal_attacks("lira", lira)
_register_signal_attacks("bavaria", bavaria)


@register_attack("rmia", "shadows", "shadow_population", "population", settings_of=rmia)
def _rmia(evidence: Evidence, **settings: Any) -> Tensor:
    targets, others = evidence.targets, _given(evidence.population_targets)
    return rmia(
        true_class_probability(evidence.logits, targets),
        true_class_probability(_given(evidence.shadow_logits), targets),
        _given(evidence.membership),
        true_class_probability(_given(evidence.population_logits), others),
        true_class_probability(_given(evidence.shadow_population_logits), others),
        **settings,
    )


@register_attack("attack_p", "population")
def _attack_p(evidence: Evidence) -> Tensor:
    population = example_losses(_given(evidence.population_logits), _given(evidence.population_targets))
    return attack_p(example_losses(evidence.logits, evidence.targets), population)


@register_attack("attack_r", "shadows")
def _attack_r(evidence: Evidence) -> Tensor:
    shadows = example_losses(_given(evidence.shadow_logits), evidence.targets)
    return attack_r(example_losses(evidence.logits, evidence.targets), shadows, _given(evidence.membership))


def _register_metric(name: str, signal: Function) -> None:
    @register_attack(name)
    def attack(evidence: Evidence, per_class: bool = True) -> Tensor:
        own = signal(evidence.logits, evidence.targets)
        if evidence.shadow_logits is None:
            return own
        shadows = signal(evidence.shadow_logits, evidence.targets)
        return calibrated(own, evidence.targets, shadows, _given(evidence.membership), per_class=per_class)


for _name, _signal in {
    "correctness": correctness,
    "confidence": confidence,
    "entropy": entropy,
    "modified_entropy": modified_entropy,
}.items():
    _register_metric(_name, _signal)


@register_attack("neural", "shadows", settings_of=neural_attack)
def _neural(evidence: Evidence, **settings: Any) -> Tensor:
    shadows, membership = _given(evidence.shadow_logits), _given(evidence.membership)
    return neural_attack(evidence.logits, evidence.targets, shadows, membership, **settings)


@register_attack("quantile_regression", "population", "inputs", settings_of=quantile_regression)
def _quantile_regression(evidence: Evidence, **settings: Any) -> Tensor:
    sides = (
        (evidence.logits, evidence.targets, _given(evidence.inputs)),
        (_given(evidence.population_logits), _given(evidence.population_targets), _given(evidence.population_inputs)),
    )
    # Beside its input, an example's label is known.
    own, known = (
        (logit_signal(logits, labels), torch.cat([x, F.one_hot(labels, logits.shape[-1]).to(x.dtype)], 1))
        for logits, labels, x in sides
    )
    return quantile_regression(*own, *known, **settings)


@register_attack("augmentation", "views")
def _augmentation(evidence: Evidence) -> Tensor:
    logits, targets = _given(evidence.view_logits), evidence.targets
    check_finite("view_logits", logits.sum(-1))
    own = logits.argmax(-1) == targets
    if evidence.shadow_view_logits is None:
        return augmentation_attack(own)
    shadows = evidence.shadow_view_logits.argmax(-1).transpose(0, 1) == targets
    return augmentation_attack(own, shadows, evidence.membership)


@register_attack("lira_views", "shadows", "views", "shadow_views", settings_of=lira)
def _lira_views(evidence: Evidence, **settings: Any) -> Tensor:
    own = logit_signal(_given(evidence.view_logits), evidence.targets)
    shadows = logit_signal(_given(evidence.shadow_view_logits).transpose(0, 1), evidence.targets)
    return lira(own, shadows, _given(evidence.membership), **settings)


def _given(value: Tensor | None) -> Tensor:
    assert value is not None  # Attack.__call__ has checked what the attack needs
    return value
