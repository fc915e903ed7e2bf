"""Attacks by name, over one description of what an attacker may see."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_cwrf.attacks.evidence import Evidence

Function: TypeAlias = Callable[..., Tensor]
_NEEDS = {
    "shadows": (("shadow_logits", "membership"), "shadow models: pass shadows= (lightning_cwrf.train_shadows)"),
    "population": (("population_logits", "population_targets"), "a population: data that no model was trained on"),
    "shadow_population": (("shadow_population_logits",), "a population: pass population= to train_shadows"),
    "inputs": (("inputs",), "the examples' inputs"),
    "population_inputs": (("population_inputs",), "a population's inputs"),
    "views": (("view_logits",), "the model's outputs on augmented views"),
    "shadow_views": (("shadow_view_logits",), "shadow models' outputs on views: pass views= to train_shadows"),
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
            fields, what = _NEEDS[need]
            if not evidence.has(*fields):
                raise ValueError(f"the {self.name} attack needs {what}.")

    def __call__(self, evidence: Evidence) -> Tensor:
        """float64 scores ``(n,)``, higher = more likely a member.

        Raises:
            TypeError: the attack gave no tensor of numbers.
            ValueError: the evidence lacks what the attack needs, or does not fit together; scores that are NaN, or not
                one per example.
        """
        self.check(evidence)
        scores = self.function(evidence, **self.settings)
        if not isinstance(scores, Tensor) or scores.is_complex():
            kind = scores.dtype if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise TypeError(f"the {self.name} attack gave {kind}; it must give a tensor of one number per example.")
        if scores.shape != evidence.targets.shape:
            raise ValueError(
                f"the {self.name} attack gave scores of shape {tuple(scores.shape)}; one per example is "
                f"{tuple(evidence.targets.shape)}."
            )
        scores = scores.detach().to(torch.float64)
        lost = scores.isnan().nonzero().flatten().tolist()
        if lost:
            raise ValueError(f"the {self.name} attack gave NaN for {len(lost)} examples (first {lost[:10]}).")
        return scores


class _Registered(NamedTuple):
    function: Function
    needs: tuple[str, ...]
    settings: tuple[str, ...]
    check: Callable[..., None] | None


_ATTACKS: dict[str, _Registered] = {}


def register_attack(
    name: str, *needs: str, settings_of: Function | None = None, check: Callable[..., None] | None = None
) -> Callable[[Function], Function]:
    """A decorator that makes ``function(evidence, **settings) -> scores`` known by a name.

    Args:
        name: of the attack.
        needs: of ``"shadows"``, ``"population"``, ``"shadow_population"``, ``"inputs"``, ``"population_inputs"``,
            ``"views"``, ``"shadow_views"``; evidence without them is an error before the function is called.
        settings_of: a function whose keyword-only arguments are the settings; None: the registered function's own
            arguments after the evidence.
        check: a function of the settings that raises where one is wrong; :func:`create_attack` calls it.

    Raises:
        TypeError: a name that is no text.
        ValueError: another attack has the name; an unknown need.

    >>> @register_attack("margin")
    ... def margin(evidence):
    ...     first, second = evidence.logits.topk(2).values.unbind(-1)
    ...     return first - second
    >>> create_attack("margin").name
    'margin'
    >>> _ = _ATTACKS.pop("margin")
    """
    if not isinstance(name, str):
        raise TypeError(f'an attack\'s name must be text, not {name!r}; write @register_attack("my_attack").')
    unknown = sorted(set(needs) - set(_NEEDS))
    if unknown:
        raise ValueError(f"unknown needs {', '.join(unknown)}; known are {', '.join(_NEEDS)}.")

    def register(function: Function) -> Function:
        parameters = list(inspect.signature(settings_of or function).parameters.values())
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY] if settings_of else parameters[1:]
        known = _Registered(function, needs, tuple(p.name for p in own), check)
        if _ATTACKS.setdefault(name, known).function is not function:
            raise ValueError(f"there is an attack {name!r} already.")
        return function

    return register


def create_attack(name: str, **settings: Any) -> Attack:
    """The attack of that name with these settings.

    Raises:
        ValueError: an unknown name; the known ones are listed. A setting out of range.
        TypeError: an unknown setting; the known ones are listed. A setting of the wrong type.

    >>> create_attack("lira", online=False).settings
    {'online': False}
    """
    if name not in _ATTACKS:
        raise ValueError(f"there is no attack {name!r}; known are {', '.join(available_attacks())}.")
    function, needs, known, check = _ATTACKS[name]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise TypeError(f"the {name} attack has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}.")
    if check is not None:
        check(**settings)
    return Attack(name, function, needs, settings)


def create_attacks(attacks: Collection[str | Attack]) -> list[Attack]:
    """Attacks of which some are given by name.

    Raises:
        TypeError: one attack in the place of a list; what is neither a name nor an attack.
        ValueError: an unknown name, the same attack twice, or none.
    """
    given: Any = attacks
    if isinstance(given, str):
        raise TypeError(f"attacks must be a list of names, such as [{given!r}].")
    if not isinstance(given, Collection):
        example = f"create_attack({given.name!r})" if isinstance(given, Attack) else "'loss', 'lira'"
        raise TypeError(f"attacks must be a list, such as [{example}], not {_said(given)}.")
    for attack in given:
        if not isinstance(attack, (str, Attack)):
            raise TypeError(
                f"attacks must be names or what create_attack gives, not {_said(attack)}; known names are "
                f"{', '.join(available_attacks())}. Make a function of your own known by register_attack."
            )
    chosen = [create_attack(attack) if isinstance(attack, str) else attack for attack in attacks]
    names = [attack.name for attack in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise ValueError(f"attacks must be given once each, and one at least; {', '.join(twice) or 'there is none'}.")
    return chosen


def available_attacks() -> list[str]:
    """The names that :func:`create_attack` knows."""
    return sorted(_ATTACKS)


def _said(value: object) -> str:
    name = getattr(value, "__name__", None)
    return f"the {type(value).__name__} {name}" if name else f"a {type(value).__name__}"
