"""What an attacker sees (:class:`Evidence`), attacks over it, and their registry. Imports no attack."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_cwrf.attacks.per_model import PerModel, Signal, per_model_field, version_of
from lightning_cwrf.registry import Registry

Function: TypeAlias = Callable[..., Tensor]
Part: TypeAlias = Literal["examples", "population", "views"]

# For each part of the evidence: the audited model's outputs, the shadow models' outputs, and the labels.
_PARTS: dict[str, tuple[str, str, str]] = {
    "examples": ("logits", "shadow_logits", "targets"),
    "population": ("population_logits", "shadow_population_logits", "population_targets"),
    "views": ("view_logits", "shadow_view_logits", "targets"),
}
# What an attack can need: the fields of the evidence, and how to provide them.
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
class Evidence:
    """What an attacker sees: outputs of the audited model, of shadow models, and on a population. No membership of it.

    Logits of shadow models can be given as a :class:`PerModel` too. Reading such a field gives the tensor, which is
    large, and a copy where the examples are part of a pool; :meth:`shadow_signals` needs no copy. Signals are cached:
    attacks share them, and so do the replicates of :func:`~lightning_cwrf.attacks.shadow_bootstrap`.

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

    >>> from lightning_cwrf.attacks import logit_signal
    >>> Evidence(torch.tensor([[2.0, 0.0]]), torch.tensor([0])).signal(logit_signal)
    tensor([2.], dtype=torch.float64)
    """

    logits: Tensor
    targets: Tensor
    shadow_logits: Tensor | None = per_model_field()  # noqa: RUF009 - a descriptor each, no shared value
    membership: Tensor | None = None
    population_logits: Tensor | None = None
    population_targets: Tensor | None = None
    shadow_population_logits: Tensor | None = per_model_field()  # noqa: RUF009 - a descriptor each, no shared value
    inputs: Tensor | None = None
    population_inputs: Tensor | None = None
    view_logits: Tensor | None = None
    shadow_view_logits: Tensor | None = per_model_field()  # noqa: RUF009 - a descriptor each, no shared value
    _own: dict[str, PerModel] = field(default_factory=dict, init=False, repr=False, compare=False)

    def writes(self) -> dict[str, int]:
        """How often each tensor was written to, cached signals included: attacks share them, so none may."""
        found = {}
        for name, value in (*vars(self).items(), *self._own.items()):
            if isinstance(value, Tensor):
                found[name] = version_of(value)
            elif isinstance(value, PerModel):
                found |= {f"{name}{what}": count for what, count in value.writes().items()}
        return found

    def has(self, *names: str) -> bool:
        """Whether all of these fields are present. Unlike reading them, this copies nothing."""
        return all(vars(self).get(name) is not None for name in names)

    def require(self, name: str) -> Tensor:
        """The field of this name, or a ValueError where it is None."""
        self._check(name)
        value: Tensor = getattr(self, name)
        return value

    def signal(self, signal: Signal, of: Part = "examples") -> Tensor:
        """``signal(logits, targets)`` of the audited model, computed once for all attacks; do not write into it.

        Args:
            signal: a function of logits ``(..., n, K)`` and targets ``(n,)``, such as
                :func:`~lightning_cwrf.attacks.logit_signal`. It is cached by identity: define it once.
            of: the examples, ``(n,)``; the population, ``(m,)``; or the views, ``(q, n)``.

        Raises:
            ValueError: the evidence has no such outputs.
        """
        name, _, targets = _PARTS[of]
        if name not in self._own:
            self._own[name] = PerModel(self.require(name)[None])
        return self._own[name].signal(signal, self.require(targets))[0]

    def shadow_signals(self, signal: Signal, of: Part = "examples") -> Tensor:
        """The same of every shadow model: ``(k, n)``, ``(k, m)`` or ``(k, q, n)``; arguments as for :meth:`signal`."""
        _, name, targets = _PARTS[of]
        self._check(name)
        outputs: PerModel = vars(self)[name]
        return outputs.signal(signal, self.require(targets))

    def with_models(self, rows: Tensor) -> Evidence:
        """The evidence with these shadow models, which may repeat; nothing large is copied, cached signals are kept.

        Raises:
            ValueError: a ``shadow_`` field without one entry per shadow model.
        """
        models = len(self.require("membership"))
        chosen = {}
        for name, value in self._of_shadows().items():
            if len(value) != models:
                raise ValueError(f"the evidence's {name} must have the {models} shadow models along its first axis.")
            chosen[name] = value[rows.to(value.device)]
        return self._replace(chosen)

    def without_shadows(self) -> Evidence:
        """The evidence of an attacker without shadow models."""
        return self._replace(dict.fromkeys(self._of_shadows()))

    def _check(self, name: str) -> None:
        if not self.has(name):
            raise ValueError(f"the evidence has no {name}.")

    def _of_shadows(self) -> dict[str, Tensor | PerModel]:
        """The fields of the shadow models, also those of a subclass; not by getattr, which would copy outputs."""
        names = [name for name in vars(self) if name == "membership" or name.startswith("shadow_")]
        return {name: vars(self)[name] for name in names if self.has(name)}

    def _replace(self, changes: Mapping[str, Any]) -> Evidence:
        changed = replace(self, **changes)
        object.__setattr__(changed, "_own", self._own)  # of the audited model, which is the same
        return changed


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
            TypeError: the attack returned no tensor of numbers.
            ValueError: the evidence lacks what the attack needs, or does not fit together; scores that are NaN, or not
                one per example.
        """
        self.check(evidence)
        scores = self.function(evidence, **self.settings)
        if not isinstance(scores, Tensor) or scores.is_complex():
            kind = scores.dtype if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise TypeError(f"the {self.name} attack returned {kind}; it must return one number per example, a tensor.")
        if scores.shape != evidence.targets.shape:
            raise ValueError(
                f"the {self.name} attack returned scores of shape {tuple(scores.shape)}; one per example is "
                f"{tuple(evidence.targets.shape)}."
            )
        scores = scores.detach().to(torch.float64, copy=True)  # which may be a cached signal
        bad = scores.isnan().nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"the {self.name} attack returned NaN for {len(bad)} examples (first {bad[:10]}).")
        return scores


class _Registered(NamedTuple):
    function: Function
    needs: tuple[str, ...]
    settings: dict[str, Any]  # by name, their defaults
    check: Callable[..., None] | None


ATTACKS: Registry[_Registered] = Registry("attack")
"""Every registered attack."""


def register_attack(
    name: str, *needs: str, settings_of: Callable[..., Any] | None = None, check: Callable[..., None] | None = None
) -> Callable[[Function], Function]:
    """A decorator that registers ``function(evidence, **settings) -> scores`` as an attack.

    Args:
        name: of the attack.
        needs: any of ``"shadows"``, ``"population"``, ``"shadow_population"``, ``"inputs"``, ``"population_inputs"``,
            ``"views"``, ``"shadow_views"``; evidence without them is an error before the function is called.
        settings_of: a function whose keyword-only arguments are the settings. None: the registered function's own
            arguments after the evidence.
        check: a function of the settings that raises where one is wrong; :func:`create_attack` calls it.

    Raises:
        TypeError: a name that is not a string.
        ValueError: another attack has the name; an unknown need.

    >>> with ATTACKS.temporary():
    ...     @register_attack("margin")
    ...     def margin(evidence):
    ...         first, second = evidence.logits.topk(2).values.unbind(-1)
    ...         return first - second
    ...     create_attack("margin").name
    'margin'
    """
    ATTACKS.check_name(name)
    unknown = sorted(set(needs) - set(_NEEDS))
    if unknown:
        raise ValueError(f"unknown needs {', '.join(unknown)}; available: {', '.join(_NEEDS)}.")

    def register(function: Function) -> Function:
        parameters = list(inspect.signature(settings_of or function).parameters.values())
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY] if settings_of else parameters[1:]
        ATTACKS.add(name, _Registered(function, needs, {p.name: p.default for p in own}, check))
        return function

    return register


def create_attack(name: str, **settings: Any) -> Attack:
    """The attack of that name with these settings.

    Raises:
        ValueError: an unknown name (the message lists the available ones); a setting out of range.
        TypeError: an unknown setting (the message lists the attack's settings); a setting of the wrong type.

    >>> create_attack("lira", online=False).settings
    {'online': False}
    """
    function, needs, known, check = ATTACKS.find(name)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise TypeError(f"the {name} attack has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}.")
    if check is not None:
        check(**settings)
    return Attack(name, function, needs, settings)


def create_attacks(attacks: Collection[str | Attack]) -> list[Attack]:
    """Attacks, some of them given by name.

    Raises:
        TypeError: one attack instead of a list; an element that is neither a name nor an attack.
        ValueError: an unknown name, the same attack twice, or an empty list.
    """
    given: Any = attacks
    if isinstance(given, str):
        raise TypeError(f"attacks must be a list of names, such as [{given!r}].")
    if not isinstance(given, Collection):
        example = f"create_attack({given.name!r})" if isinstance(given, Attack) else "'loss', 'lira'"
        raise TypeError(f"attacks must be a list, such as [{example}], not {_described(given)}.")
    for attack in given:
        if not isinstance(attack, (str, Attack)):
            raise TypeError(
                f"attacks must be names or results of create_attack, not {_described(attack)}; available names: "
                f"{', '.join(available_attacks())}. Register a function of your own by register_attack."
            )
    chosen = [create_attack(attack) if isinstance(attack, str) else attack for attack in attacks]
    names = [attack.name for attack in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise ValueError(f"attacks must be given once each, and one at least; {', '.join(twice) or 'there is none'}.")
    return chosen


def available_attacks() -> list[str]:
    """The names that :func:`create_attack` accepts."""
    return ATTACKS.names()


def _described(value: object) -> str:
    name = getattr(value, "__name__", None)
    return f"the {type(value).__name__} {name}" if name else f"a {type(value).__name__}"
