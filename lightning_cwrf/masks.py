"""The mask of critical weights: choose it (Eq. 5), rewind it (Eq. 6), and hold it still (Eq. 7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_FORMAT = "lightning_cwrf.WeightMask/1"
_CHUNK = 1 << 18  # scores per counting step: its temporaries stay in the cache


@dataclass
class _Frozen:
    """The masked weights of one parameter: flat positions and the values they are held at."""

    index: Tensor
    value: Tensor

    def mask(self, parameter: Tensor) -> Tensor:
        """The positions as a mask of the parameter's shape, for layouts that have no flat view."""
        flat = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
        return flat.index_fill_(0, self.index, True).view(parameter.shape)


class WeightMask:
    """Which weights of a model are critical: one bool tensor per parameter, True where a weight is rewound and frozen.

    A mask comes from scores (:meth:`top`), from a file (:meth:`load`) or from given tensors. :meth:`rewind_` sets the
    chosen weights to their vanilla values; from then on :meth:`zero_grad_` before an optimizer's step and
    :meth:`restore_` after it keep them there bit for bit, whatever weight decay, momentum or noise would do.

    Args:
        masks: bool tensors by parameter name.

    >>> model = nn.Linear(4, 1, bias=False)
    >>> vanilla = {"weight": torch.zeros(1, 4)}
    >>> mask = WeightMask.top({"weight": torch.tensor([[0.1, 0.9, 0.5, 0.2]])}, rate=0.5)
    >>> mask.masks["weight"]
    tensor([[False,  True,  True, False]])
    >>> mask.rewind_(model, vanilla)
    >>> model.weight[mask.masks["weight"]]
    tensor([0., 0.], grad_fn=<IndexBackward0>)
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"the mask of {name!r} must be a bool tensor, not {mask.dtype}.")
        self.masks: dict[str, Tensor] = {name: mask.detach().cpu() for name, mask in masks.items()}
        self.count = sum(int(torch.count_nonzero(mask)) for mask in self.masks.values())
        self.total = sum(mask.numel() for mask in self.masks.values())
        self._frozen: dict[str, _Frozen] = {}

    def __repr__(self) -> str:
        return f"WeightMask({self.count:,} of {self.total:,} weights in {len(self.masks)} parameters)"

    def __invert__(self) -> WeightMask:
        """The mask of all other weights; it holds no values yet."""
        return WeightMask({name: ~mask for name, mask in self.masks.items()})

    @property
    def is_frozen(self) -> bool:
        """Whether the values to hold are known: after :meth:`rewind_`, :meth:`freeze`, or a load of both."""
        return bool(self._frozen) or self.count == 0

    @classmethod
    def top(cls, scores: Mapping[str, Tensor], rate: float, *, per_layer: bool = False) -> WeightMask:
        """Choose exactly ``round(rate · N)`` weights: the highest scores over all N weights together (Eq. 5).

        Equal scores at the threshold are taken in order of parameter and position. The threshold is found by two
        counting passes over the bits of the scores, so nothing is sorted or copied as a whole.

        Args:
            scores: non-negative float32 tensors by parameter name.
            rate: r in [0, 1]. The paper searches 0.01 to 0.10.
            per_layer: choose the share ``rate`` inside each layer (a module's weight and bias together) instead. Where
                the shares are not whole, the largest remainders round up, so the total is still ``round(rate · N)``.

        Raises:
            ValueError: a rate outside [0, 1]; scores that are negative, NaN or infinite, or no scores at all.

        >>> WeightMask.top({"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0])}, rate=1 / 3).masks
        {'a': tensor([ True, False]), 'b': tensor([False])}
        """
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate must lie in [0, 1], not {rate}: it is the fraction of weights to rewind.")
        total = sum(score.numel() for score in scores.values())
        if total == 0:
            raise ValueError("there are no scores to choose weights by.")
        wanted = round(rate * total)
        if not per_layer:
            return cls(_largest(scores, wanted))
        layers: dict[str, dict[str, Tensor]] = {}
        for name, score in scores.items():
            layers.setdefault(name.rpartition(".")[0], {})[name] = score
        sizes = [sum(score.numel() for score in layer.values()) for layer in layers.values()]
        masks: dict[str, Tensor] = {}
        for layer, share in zip(layers.values(), _apportion(sizes, wanted), strict=True):
            masks.update(_largest(layer, share))
        return cls({name: masks[name] for name in scores})

    def rewind_(self, model: nn.Module, vanilla: Mapping[str, Tensor]) -> None:
        """Set the masked weights to their vanilla values, in place, and hold them from now on (Eq. 6).

        Args:
            model: the finished model.
            vanilla: θ_vn, as :func:`~lightning_cwrf.vanilla.load_vanilla` gives it.
        """
        parameters = self._parameters(model)
        for name, parameter in parameters.items():
            if name not in vanilla or vanilla[name].shape != parameter.shape:
                found = f"shape {tuple(vanilla[name].shape)}" if name in vanilla else "nothing"
                raise ValueError(
                    f"vanilla weights for {name!r}: expected shape {tuple(parameter.shape)}, found {found}."
                )
        with torch.no_grad():
            for name, parameter in parameters.items():
                values = vanilla[name].to(parameter.device, parameter.dtype)
                parameter.copy_(torch.where(self.masks[name].to(parameter.device), values, parameter))
        self.freeze(model)

    def freeze(self, model: nn.Module) -> None:
        """Take the masked weights' present values as the ones that :meth:`restore_` writes back."""
        frozen = {}
        for name, parameter in self._parameters(model).items():
            index = self.masks[name].flatten().nonzero().flatten().to(parameter.device)
            frozen[name] = _Frozen(index, parameter.detach().take(index))
        self._frozen = frozen

    def zero_grad_(self, model: nn.Module) -> None:
        """Set the masked weights' gradients to zero, in place (Eq. 7); NaN and infinite ones too.

        Parameters without a gradient are left without one.
        """
        for parameter, frozen in self._held(model):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                gradient = parameter.grad = gradient.coalesce()
                rows = frozen.mask(parameter)[tuple(gradient.indices())]
                gradient.values().masked_fill_(rows, 0)
            elif gradient.is_contiguous():
                gradient.view(-1).index_fill_(0, frozen.index, 0)
            else:
                gradient.masked_fill_(frozen.mask(parameter), 0)

    @torch.no_grad()
    def restore_(self, model: nn.Module) -> None:
        """Write the held values back, in place, bit for bit; the other weights are not touched."""
        for parameter, frozen in self._held(model):
            if parameter.is_contiguous():
                parameter.view(-1).scatter_(0, frozen.index, frozen.value)
            else:
                parameter[frozen.mask(parameter)] = frozen.value

    def moved(self, model: nn.Module) -> dict[str, int]:
        """How many masked weights differ from their held values now, by parameter name, where there are any."""
        found = {}
        for (parameter, frozen), name in zip(self._held(model), self._frozen, strict=True):
            different = int((parameter.detach().take(frozen.index) != frozen.value).sum())
            if different:
                found[name] = different
        return found

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The masks and, if known, the held values, as tensors only."""
        return {
            "masks": dict(self.masks),
            "values": {name: frozen.value.cpu() for name, frozen in self._frozen.items()},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Mapping[str, Tensor]]) -> WeightMask:
        """The inverse of :meth:`state_dict`."""
        mask = cls(state["masks"])
        for name, value in state["values"].items():
            mask._frozen[name] = _Frozen(mask.masks[name].flatten().nonzero().flatten(), value)
        return mask

    def save(self, path: str | PathLike[str]) -> Path:
        """Save the masks and, if known, the held values as safetensors."""
        state = self.state_dict()
        flat = {f"{part}/{name}": value.contiguous() for part in state for name, value in state[part].items()}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(flat, path, metadata={"format": _FORMAT})
        return path

    @classmethod
    def load(cls, path: str | PathLike[str]) -> WeightMask:
        """Load what :meth:`save` saved.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a saved mask.
        """
        state: dict[str, dict[str, Tensor]] = {"masks": {}, "values": {}}
        with safe_open(Path(path), framework="pt") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise ValueError(f"{path} is not a weight mask; WeightMask.save writes one.")
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                part, _, name = key.partition("/")
                state[part][name] = file.get_tensor(key)
        return cls.from_state_dict(state)

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in self.masks.items():
            if name not in own:
                raise ValueError(f"the mask is of another model: there is no parameter {name!r}.")
            if own[name].shape != mask.shape:
                raise ValueError(
                    f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(own[name].shape)}."
                )
        return {name: own[name] for name in self.masks}

    def _held(self, model: nn.Module) -> list[tuple[nn.Parameter, _Frozen]]:
        if not self.is_frozen:
            raise RuntimeError("the mask holds no values yet: call rewind_(model, vanilla) or freeze(model) first.")
        pairs = []
        for name, frozen in self._frozen.items():
            parameter = model.get_parameter(name)
            if frozen.index.device != parameter.device or frozen.value.dtype != parameter.dtype:
                frozen.index = frozen.index.to(parameter.device)
                frozen.value = frozen.value.to(parameter.device, parameter.dtype)
            pairs.append((parameter, frozen))
        return pairs


def _apportion(sizes: list[int], wanted: int) -> list[int]:
    """Share ``wanted`` out in proportion to ``sizes``: floors, then the largest remainders."""
    total = sum(sizes)
    shares = [wanted * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: -(wanted * sizes[i] % total))
    for i in order[: wanted - sum(shares)]:
        shares[i] += 1
    return shares


def _largest(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Masks of the k largest scores. The bits of non-negative floats, read as integers, are in the floats' order.

    In NumPy, whose loops run on one thread: with torch's, two cores meet several hundred times in such short
    passes, and waiting for one another costs more than they save as soon as anything else runs on the machine.
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
    """The scores' bits, and how many scores have each upper half. That count also shows every bad score."""
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
