"""The settings of a rewind: their checks, and by what a resumed run compares them."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_cwrf.checks import check_choice, check_flag, check_integer
from lightning_cwrf.files import digest
from lightning_cwrf.weights.masks import WeightMask
from lightning_cwrf.weights.score_files import load_scores
from lightning_cwrf.weights.units import HEADS, is_of_heads

VALUES = ("initial", "fresh", "trained", "zero")
OLD_WORDS = {"vanilla": "initial"}  # by the old name, to=


def check_rewinding(values: Any, hold: Any, batchnorm: Any, seed: Any, vanilla: Any) -> None:
    """Raise for settings of a rewind of the wrong type, out of range, or without an effect beside the others."""
    check_choice("values", values, VALUES)
    check_flag("hold", hold)
    check_choice("batchnorm", batchnorm, ("keep", "reset", "estimate"))
    if values == "trained" and not hold:
        raise ValueError("values='trained' with hold=False changes nothing and holds nothing: for that, pass rate=0.")
    if seed is not None:
        check_integer("seed", seed, low=0)
        if values != "fresh":
            raise ValueError(f"seed draws fresh values, and values is {values!r}: leave it out, or pass 'fresh'.")
    if vanilla is not None and values != "initial":
        raise ValueError(
            f"vanilla has the initial values, and values is {values!r}: leave it out here. PrivacyScoringCallback, "
            "which scores with it, takes its own."
        )


def check_mask(mask: Any) -> None:
    """Raise a TypeError unless ``mask`` is one, a file of one, or None."""
    if mask is not None and not isinstance(mask, (str, PathLike, WeightMask)):
        raise TypeError(f"mask must be a WeightMask or a file of one, not a {type(mask).__name__}.")


def warn_of_few(mask: WeightMask, rate: float, structured: bool | str) -> None:
    """Warn where a mask has much less than its share of the weights, or no head where heads were asked for."""
    wanted = round(rate * mask.total)
    if wanted == 0 and rate > 0:
        rank_zero_warn(f"rate {rate} of {mask.total} weights is less than one: nothing is rewound.")
        return
    if structured and mask.count < 0.9 * wanted:
        rank_zero_warn(
            f"whole units fill {mask.count} of the {wanted} weights that rate={rate} allows: the next has no room. "
            "Raise the rate for more."
        )
    if structured == HEADS and rate > 0 and not any(mask.masks[name].any() for name in mask.masks if is_of_heads(name)):
        rank_zero_warn(
            f"rate={rate} chose no head: the units with the highest mean scores that fit into it are others. Raise the "
            "rate until one is chosen."
        )


def mask_identity(mask: str | PathLike[str] | WeightMask) -> str | None:
    """A digest of a given mask, by which a resumed run compares it; None where its file is gone."""
    try:
        return digest((mask if isinstance(mask, WeightMask) else WeightMask.load(mask)).masks)
    except FileNotFoundError:
        return None


def scores_identity(scores: str | PathLike[str] | Mapping[str, Tensor] | None) -> str | None:
    """As :func:`mask_identity`, of scores."""
    try:
        return None if scores is None else digest(scores if isinstance(scores, Mapping) else load_scores(scores))
    except FileNotFoundError:
        return None
