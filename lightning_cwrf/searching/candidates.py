"""The recipes that a search tries by default: every defense at several strengths, with and without rewinding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_cwrf.checks import check_number
from lightning_cwrf.data import Batches
from lightning_cwrf.defenses import available_defenses, create_defense, defense_class
from lightning_cwrf.recipes import CWRFConfig, ShadowRecipe

RATES = (0.0, 0.01, 0.03, 0.1)
"""r, the shares of the weights to rewind; 0: the fine-tuning alone, the control."""


def default_candidates(
    tune: ShadowRecipe,
    nonmembers: Batches | None = None,
    *,
    defenses: Sequence[str] | None = None,
    rates: Sequence[float] = RATES,
    **cwrf: Any,
) -> dict[str, ShadowRecipe]:
    """Every defense at each of its strengths (:attr:`Defense.strengths`), for each share of rewound weights.

    Args:
        tune: the fine-tuning of a finished model, without defense and CWRF.
        nonmembers: reference data that no model is trained on, for CWRF's scoring and for defenses that need such data.
        defenses: names; None: all that have strengths and, where ``nonmembers`` is None, need no data.
        rates: shares of the weights; 0 must be among them, since only that shows what rewinding adds.
        cwrf: further settings of :class:`~lightning_cwrf.CWRFConfig`, such as ``lam=0.9`` for 100 classes.

    Returns:
        The recipes by a name that says the defense, its strength and r.

    Raises:
        TypeError: ``tune`` is not a ShadowRecipe.
        ValueError: a defense without strengths; ``tune`` has a defense or CWRF; rates without 0; rewinding, or a
            defense against non-members, without ``nonmembers``.

    >>> from lightning.pytorch import LightningModule
    >>> tune = ShadowRecipe(LightningModule, {"max_epochs": 40}, batch_size=32)
    >>> list(default_candidates(tune, defenses=["hamp"], rates=[0]))[:2]
    ['hamp gamma=0.6 alpha=0.01, r = 0', 'hamp gamma=0.8 alpha=0.01, r = 0']
    """
    if not isinstance(tune, ShadowRecipe):
        raise TypeError(f"tune must be a ShadowRecipe, not {type(tune).__name__}.")
    if tune.defense is not None or tune.cwrf is not None:
        raise ValueError("tune must have no defense and no cwrf: the candidates add them.")
    for rate in rates:
        check_number("rates", rate, low=0, high=1)
    if 0 not in rates:
        raise ValueError("rates must contain 0: without the fine-tuning alone, nobody knows what rewinding adds.")
    if nonmembers is None and max(rates) > 0:
        raise ValueError("CWRF scores weights on reference data: pass nonmembers=, or rates=[0].")
    found = {}
    for name in _named(defenses, nonmembers):
        cls = defense_class(name)
        data = dict.fromkeys(cls.data_names(), nonmembers)
        for strength in cls.strengths:
            defense = create_defense(name, **strength, **data)
            told = " ".join(f"{key}={value:g}" for key, value in strength.items())
            for rate in dict.fromkeys(rates):
                config = None
                if rate > 0:
                    assert nonmembers is not None
                    config = CWRFConfig(nonmembers, rate=rate, **cwrf)
                found[f"{name} {told}, r = {rate:g}"] = replace(tune, defense=defense, cwrf=config)
    return found


def _named(defenses: Sequence[str] | None, nonmembers: Batches | None) -> list[str]:
    """The names of the defenses to try."""
    if defenses is None:
        return [
            name
            for name in available_defenses()
            if defense_class(name).strengths and (nonmembers is not None or not defense_class(name).data_names())
        ]
    if isinstance(defenses, str) or not defenses:
        raise ValueError(f"defenses must be a list of names, such as ['relaxloss'], not {defenses!r}.")
    for name in defenses:
        cls = defense_class(name)
        if not cls.strengths:
            raise ValueError(
                f"{name} has no strengths to try. Write its recipes yourself: replace(tune, "
                f"defense=create_defense({name!r}, ...))."
            )
        if cls.data_names() and nonmembers is None:
            raise ValueError(f"{name} needs data that no model is trained on: pass nonmembers=.")
    return list(defenses)
