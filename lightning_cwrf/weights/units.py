"""Whole units instead of single weights: channels, neurons, and the heads of an attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.checks import check_flag, check_integer

HEADS = "heads"
_PACKED = 3  # in_proj_weight and in_proj_bias have the rows of the queries, then of the keys, then of the values
_PROJECTIONS = {"in_proj_weight": _PACKED, "in_proj_bias": _PACKED}
_PROJECTIONS |= {f"{each}_proj_weight": 1 for each in "qkv"}


def check_structured(structured: Any) -> None:
    """Raise unless ``structured`` is True, False, ``"heads"``, or numbers of heads by module name."""
    if isinstance(structured, Mapping):
        if not structured:
            raise ValueError("structured names no attention: pass True for channels and neurons alone.")
        for name, heads in structured.items():
            check_integer(f"the number of heads of {name!r}", heads, low=1)
    elif isinstance(structured, str):
        if structured != HEADS:
            raise ValueError(f"structured must be True, False or 'heads', not {structured!r}.")
    else:
        check_flag("structured", structured)


def attention_heads(model: nn.Module) -> dict[str, int]:
    """The number of heads of each ``nn.MultiheadAttention``, by module name.

    Raises:
        ValueError: the model has none.

    >>> attention_heads(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}))
    {'attention': 2}
    """
    found = {name: each.num_heads for name, each in model.named_modules() if isinstance(each, nn.MultiheadAttention)}
    if not found:
        raise ValueError(
            "structured='heads' needs an nn.MultiheadAttention, whose heads are known, and the model has none: pass "
            "structured=True, which takes the rows of its projections one by one."
        )
    return found


def is_of_heads(name: str) -> bool:
    """Whether a parameter is a projection to heads, by its name."""
    return name.rpartition(".")[2] in _PROJECTIONS


def units_of(structured: bool | str, model: nn.Module, scores: Iterable[str]) -> bool | Mapping[str, int]:
    """What :meth:`WeightMask.top` takes: in place of ``"heads"``, their numbers in the model's scored attentions."""
    if not isinstance(structured, str):
        return structured
    scored = _modules(scores)
    return {name: heads for name, heads in attention_heads(model).items() if name in scored}


def _modules(parameters: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in parameters}


def heads_of(structured: Any) -> Mapping[str, int]:
    """The numbers of heads that were given with scores; none where all units are channels and neurons."""
    if structured == HEADS:
        raise ValueError("scores do not say how many heads there are: pass structured=attention_heads(model).")
    return structured if isinstance(structured, Mapping) else {}


def largest_units(scores: Mapping[str, Tensor], k: int, heads: Mapping[str, int]) -> dict[str, Tensor]:
    """Masks of the units with the largest mean scores, in this order, until the next has no room in k weights.

    A unit is one index of the first dimension of a parameter, and of its bias: ``weight`` and ``bias`` go together, as
    do ``in_proj_weight`` and ``in_proj_bias``, where the bias is a vector of the same size. Of a module in ``heads`` it
    is the rows of the queries, keys and values of one head, with their biases.

    >>> scores = {"weight": torch.tensor([[1.0, 1.0], [0.0, 9.0]]), "bias": torch.tensor([1.0, 0.0])}
    >>> {name: mask.tolist() for name, mask in largest_units(scores, 5, {}).items()}
    {'weight': [[False, False], [True, True]], 'bias': [False, True]}
    """
    groups = _groups(scores, heads)
    totals, sizes = [], []
    for group in groups:
        parts = group.by_unit(scores)
        totals.append(torch.stack([part.sum(1) for part in parts]).sum(0))
        sizes.append(torch.full((group.units,), sum(part.shape[1] for part in parts)))
    size = torch.cat(sizes)
    order = (torch.cat(totals) / size).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(size), dtype=torch.bool)
    chosen[order] = size[order].cumsum(0) <= k
    masks: dict[str, Tensor] = {}
    for group, mine in zip(groups, torch.split(chosen, [group.units for group in groups]), strict=True):
        masks.update(group.masks(scores, mine))
    return {name: masks[name] for name in scores}


@dataclass
class _Group:
    """Parameters that have their units in common.

    Attributes:
        units: how many.
        blocks: by parameter, how often its rows go through all units: three times in a packed projection.
    """

    units: int
    blocks: dict[str, int]

    def by_unit(self, scores: Mapping[str, Tensor]) -> list[Tensor]:
        """The scores ``(units, n)`` of each parameter."""
        found = []
        for name in self.blocks:
            score = scores[name].detach().cpu().double()
            found.append(score.reshape(self._sizes(name, score)).transpose(0, 1).reshape(self.units, -1))
        return found

    def masks(self, scores: Mapping[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
        """The masks that have the chosen units ``(units,)``."""
        return {
            name: chosen.view(1, -1, 1).expand(self._sizes(name, scores[name])).reshape(scores[name].shape).clone()
            for name in self.blocks
        }

    def _sizes(self, name: str, score: Tensor) -> tuple[int, int, int]:
        blocks = self.blocks[name]
        return blocks, self.units, score.numel() // max(blocks * self.units, 1)


def _groups(scores: Mapping[str, Tensor], heads: Mapping[str, int]) -> list[_Group]:
    if unknown := sorted(set(heads) - _modules(scores)):
        raise ValueError(f"structured names {', '.join(map(repr, unknown))}, and no scores are of such a module.")
    groups: dict[str | tuple[str, str], _Group] = {}
    for name, score in scores.items():
        module, dot, own = name.rpartition(".")
        rows = len(score) if score.ndim else 1
        if module in heads and own in _PROJECTIONS:
            blocks, units = _PROJECTIONS[own], heads[module]
            if rows % (blocks * units):
                raise ValueError(f"the {rows} rows of {name!r} are not those of {units} heads.")
            groups.setdefault((module, HEADS), _Group(units, {})).blocks[name] = blocks
            continue
        weight = f"{module}{dot}{own.replace('bias', 'weight')}"
        joined = score.ndim == 1 and weight in scores and scores[weight].shape[:1] == score.shape
        groups.setdefault(weight if joined else name, _Group(rows, {})).blocks[name] = 1
    return list(groups.values())
