"""Eq. 5: the weights with the largest scores, found by counting the bits of the scores instead of sorting them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_cwrf.checks import check_flag, check_number
from lightning_cwrf.weights.units import check_structured, heads_of, largest_units

_CHUNK = 1 << 18  # scores per counting step: its temporaries stay in the cache


def check_rate(rate: Any) -> None:
    """Raise unless ``rate`` is a rewinding rate: a number in [0, 1]."""
    check_number("rate", rate, low=0, high=1, hint="It is the fraction of weights to rewind.")


def check_choosing(rate: Any, per_layer: Any, structured: Any) -> None:
    """Raise for settings of the wrong type, out of range, or that exclude one another."""
    check_rate(rate)
    check_flag("per_layer", per_layer)
    check_structured(structured)
    if per_layer and structured:
        raise ValueError("per_layer takes an exact share of each layer, and structured whole units: pass one of them.")


def top_share(
    scores: Mapping[str, Tensor],
    rate: float,
    *,
    per_layer: bool = False,
    structured: bool | Mapping[str, int] = False,
) -> dict[str, Tensor]:
    """Masks of the ``round(rate · N)`` largest of all N scores (Eq. 5); see :meth:`WeightMask.top`."""
    check_choosing(rate, per_layer, structured)
    total = sum(score.numel() for score in scores.values())
    if total == 0:
        raise ValueError("there are no scores to choose weights by.")
    wanted = round(rate * total)
    if structured:
        for name, score in scores.items():
            _order_keys(name, score)  # raises for invalid scores
        return largest_units(scores, wanted, heads_of(structured))
    if not per_layer:
        return largest(scores, wanted)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, score in scores.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = score
    sizes = [sum(score.numel() for score in layer.values()) for layer in layers.values()]
    masks: dict[str, Tensor] = {}
    for layer, share in zip(layers.values(), apportion(sizes, wanted), strict=True):
        masks.update(largest(layer, share))
    return {name: masks[name] for name in scores}


def apportion(sizes: list[int], wanted: int) -> list[int]:
    """Divide ``wanted`` in proportion to ``sizes``: floors, then the largest remainders, earlier ones first.

    >>> apportion([8, 2, 10], 5)
    [2, 1, 2]
    """
    total = sum(sizes)
    shares = [wanted * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: -(wanted * sizes[i] % total))
    for i in order[: wanted - sum(shares)]:
        shares[i] += 1
    return shares


def largest(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Masks of the k largest scores. The bits of non-negative floats, read as integers, have the order of the floats.

    It uses NumPy, whose loops run on one thread: PyTorch's threads would synchronise several hundred times in such
    short passes, which costs more than it saves as soon as anything else runs on the machine.
    """
    if k == 0:
        return {name: torch.zeros(score.shape, dtype=torch.bool) for name, score in scores.items()}
    high = np.zeros(1 << 16, dtype=np.int64)
    keys = {}
    for name, score in scores.items():
        keys[name], counts = _order_keys(name, score)
        high += counts
    top, above = _bucket_of(high, k)
    low = np.zeros_like(high)
    for chunk in (chunk for key in keys.values() for chunk in _chunks(key)):
        low += np.bincount(chunk[chunk >> 16 == top] & 0xFFFF, minlength=1 << 16)
    bottom, inside = _bucket_of(low, k - above)
    threshold, ties = (top << 16) | bottom, k - above - inside
    masks = {}
    for name, key in keys.items():
        mask = np.empty(key.shape, dtype=np.bool_)
        for chunk, out in zip(_chunks(key), _chunks(mask), strict=True):
            np.greater(chunk, threshold, out=out)
            if ties:
                first = np.flatnonzero(chunk == threshold)[:ties]
                out[first] = True
                ties -= len(first)
        masks[name] = torch.from_numpy(mask).view(scores[name].shape)
    return masks


def _bucket_of(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bucket that holds the k-th largest element, and how many lie in the buckets above."""
    from_top = counts[::-1].cumsum()
    position = int(np.searchsorted(from_top, k))
    bucket = len(counts) - 1 - position
    return bucket, int(from_top[position] - counts[bucket])


def _order_keys(name: str, score: Tensor) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The scores' bits, and how many scores have each upper half. That count also reveals every invalid score."""
    if score.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"the scores of {name!r} must be float32, not {score.dtype}; pass them through .float().")
    flat = score.detach().cpu().float().reshape(-1).numpy()
    counts = _count_high(flat.view(np.uint32))
    if counts[0x8000:].any():  # the sign bit is set
        if (flat < 0).any():
            raise ValueError(f"the scores of {name!r} hold negative values; a score is a sum of absolute values.")
        flat = flat + np.float32(0)  # -0.0 becomes 0.0
        counts = _count_high(flat.view(np.uint32))
    if counts[0x7F80:].any():
        raise ValueError(f"the scores of {name!r} hold NaN or infinite values; was the learning rate too high?")
    return flat.view(np.uint32), counts


def _count_high(keys: NDArray[np.uint32]) -> NDArray[np.int64]:
    counts = np.zeros(1 << 16, dtype=np.int64)
    for chunk in _chunks(keys):
        counts += np.bincount(chunk >> 16, minlength=1 << 16)
    return counts


def _chunks(flat: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (flat[begin : begin + _CHUNK] for begin in range(0, len(flat), _CHUNK))


def how_rewound(values: str, hold: bool, tune: str = "rest") -> str:
    """What was done to the chosen weights, in words, by the settings of the callbacks.

    >>> how_rewound("initial", True), how_rewound("trained", True), how_rewound("fresh", False)
    ('rewound and held', 'held at their trained values', 'rewound to fresh values and not held')
    """
    if values == "trained":
        return "held at their trained values" if tune == "rest" else "not rewound, and tuned alone"
    where = {"fresh": " to fresh values", "zero": " to zero"}.get(values, "")
    return f"rewound{where} and {'not held' if not hold else 'held' if tune == 'rest' else 'tuned alone'}"
