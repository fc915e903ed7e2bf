"""The mask of critical weights: choose it (Eq. 5), rewind it (Eq. 6), and keep it frozen (Eq. 7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_cwrf.weights import mask_files
from lightning_cwrf.weights.frozen_weights import Frozen
from lightning_cwrf.weights.selection import top_share

# What schedule-free optimizers call their extra copies of the weights.
_COPIES = ("x", "y", "z")


class WeightMask:
    """Which weights of a model are critical: one bool tensor per parameter, True where a weight is rewound and frozen.

    A mask is made from scores (:meth:`top`), a file (:meth:`load`) or tensors. :meth:`rewind_` sets the chosen weights
    to their vanilla values; then :meth:`zero_grad_` before each optimizer step and :meth:`restore_` after it keep
    them there bit for bit, despite weight decay, momentum or noise.

    Args:
        masks: bool tensors by parameter name.

    Raises:
        TypeError: ``masks`` is not a mapping of names to bool tensors.

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
        mask_files.check_masks(masks)
        self.masks: dict[str, Tensor] = {name: mask.detach().cpu() for name, mask in masks.items()}
        self.count = sum(int(torch.count_nonzero(mask)) for mask in self.masks.values())
        self.total = sum(mask.numel() for mask in self.masks.values())
        self._frozen: dict[str, Frozen] = {}

    def __repr__(self) -> str:
        return f"WeightMask({self.count:,} of {self.total:,} weights in {len(self.masks)} parameters)"

    def __invert__(self) -> WeightMask:
        """The mask of all other weights of the same parameters, without held values."""
        return WeightMask({name: ~mask for name, mask in self.masks.items()})

    def rest_of(self, model: nn.Module) -> WeightMask:
        """The mask of all other trainable weights of ``model``, including parameters without a mask.

        >>> model = nn.Linear(2, 1)
        >>> WeightMask({"bias": torch.tensor([True])}).rest_of(model)
        WeightMask(2 of 3 weights in 2 parameters)
        """
        masked = set(self._parameters(model).values())  # a tied one may be here under its other name
        rest = {
            name: torch.ones(p.shape, dtype=torch.bool)
            for name, p in model.named_parameters()
            if p.requires_grad and p not in masked
        }
        return WeightMask({**rest, **(~self).masks})

    @property
    def is_frozen(self) -> bool:
        """Whether the mask has values to hold: after :meth:`rewind_` or :meth:`freeze`, or loaded with them."""
        return bool(self._frozen) or self.count == 0

    @classmethod
    def top(
        cls,
        scores: Mapping[str, Tensor],
        rate: float,
        *,
        per_layer: bool = False,
        structured: bool | Mapping[str, int] = False,
    ) -> WeightMask:
        """Choose exactly ``round(rate · N)`` weights: the highest scores over all N weights together (Eq. 5).

        Ties at the threshold are broken by the order of parameters and positions. The threshold is found by two
        counting passes over the bits of the scores, so they are neither sorted nor copied as a whole.

        Args:
            scores: non-negative float32 tensors by parameter name.
            rate: r in [0, 1]. The paper searches 0.01 to 0.10.
            per_layer: choose the share ``rate`` of each layer (a module's weight and bias together) instead. Where the
                shares are not whole, the largest remainders round up, so the total is still ``round(rate · N)``.
            structured: choose whole units by their mean scores instead, the highest first, until the next has no room
                in ``round(rate · N)`` weights: at most so many are chosen. A unit is one index of a parameter's first
                dimension: a channel's kernel, a neuron's row, an embedding's; of a transposed convolution, an input
                channel. Its bias is part of it where names and sizes say so (``weight``, ``bias``), as is the pair of a
                normalisation. With the numbers of heads by module name, of
                :func:`~lightning_cwrf.weights.attention_heads`, the queries, keys and values of a head are one unit.

        Raises:
            TypeError: a rate that is not a number, or scores of another type.
            ValueError: a rate outside [0, 1]; scores that are negative, NaN or infinite, or no scores at all;
                ``per_layer`` and ``structured`` together.

        >>> WeightMask.top({"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0])}, rate=1 / 3).masks
        {'a': tensor([ True, False]), 'b': tensor([False])}
        """
        return cls(top_share(scores, rate, per_layer=per_layer, structured=structured))

    def rewind_(self, model: nn.Module, vanilla: Mapping[str, Tensor]) -> None:
        """Set the masked weights to their vanilla values, in place, and take these as the values to hold (Eq. 6).

        Only parameters are rewound. Buffers, such as BatchNorm's running statistics, stay as they are.

        Args:
            model: the finished model.
            vanilla: θ_vn, as :func:`~lightning_cwrf.weights.vanilla.load_vanilla` returns it.

        Raises:
            ValueError: vanilla values are missing, of another shape, NaN or infinite; or the mask is of another model.
        """
        parameters = self._parameters(model)
        for name, parameter in parameters.items():
            if name not in vanilla or vanilla[name].shape != parameter.shape:
                found = f"shape {tuple(vanilla[name].shape)}" if name in vanilla else "nothing"
                raise ValueError(
                    f"vanilla weights for {name!r}: expected shape {tuple(parameter.shape)}, found {found}."
                )
            if not torch.isfinite(vanilla[name]).all():
                raise ValueError(f"the vanilla weights for {name!r} hold NaN or infinite values.")
        with torch.no_grad():
            for name, parameter in parameters.items():
                values = vanilla[name].to(parameter.device, parameter.dtype)
                parameter.copy_(torch.where(self.masks[name].to(parameter.device), values, parameter))
        self.freeze(model)

    def freeze(self, model: nn.Module) -> None:
        """Take the masked weights' current values as those that :meth:`restore_` writes back."""
        frozen = {}
        for name, parameter in self._parameters(model).items():
            index = self.masks[name].flatten().nonzero().flatten().to(parameter.device)
            frozen[name] = Frozen(index, parameter.detach().take(index))
        self._frozen = frozen

    def zero_grad_(self, model: nn.Module) -> None:
        """Set the masked weights' gradients to zero, in place (Eq. 7); NaN and infinite ones too.

        Parameters without a gradient are left without one.
        """
        for parameter, frozen in self._held(model):
            frozen.clear_gradient(parameter)

    def clear_gradients_of(self, model: nn.Module) -> list[RemovableHandle]:
        """Register hooks that set the masked weights' gradients to zero as soon as a backward pass accumulates them.

        For loops that clip gradients before :meth:`zero_grad_` can be called. Gradients that are written to ``.grad``
        by hand, or computed by ``torch.autograd.grad``, are not changed.

        Returns:
            The hooks; call ``remove()`` on each at the end. Deep copies of the model do not have them.
        """

        def clearing(frozen: Frozen) -> Callable[[Tensor], None]:
            def clear(parameter: Tensor) -> None:
                frozen.follow(parameter)
                frozen.clear_gradient(parameter)

            return clear

        return [
            parameter.register_post_accumulate_grad_hook(clearing(frozen))  # type: ignore[no-untyped-call]
            for parameter, frozen in self._held(model)
            if len(frozen.index) and parameter.is_leaf and parameter.requires_grad
        ]

    @torch.no_grad()
    def restore_(self, model: nn.Module, optimizer: Any = None) -> None:
        """Write the held values back, in place, bit for bit; the other weights are not touched.

        Args:
            model: the model.
            optimizer: one whose state may hold copies of the weights, as schedule-free optimizers do under ``"z"``.
                They swap them with the weights in ``optimizer.eval()``, so the copies are written as well.
        """
        swaps = callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))
        for parameter, frozen in self._held(model):
            frozen.write(parameter)
            state = optimizer.state.get(parameter, {}) if swaps else {}
            for copied in (state.get(name) for name in _COPIES):
                if isinstance(copied, Tensor) and copied.shape == parameter.shape:
                    frozen.like(copied).write(copied)

    def moved(self, model: nn.Module) -> dict[str, int]:
        """The number of masked weights that differ from their held values, by parameter name, without zeros."""
        counts = {name: int(count) for name, count in self.moved_counts(model).items()}
        return {name: count for name, count in counts.items() if count}

    def moved_counts(self, model: nn.Module) -> dict[str, Tensor]:
        """As :meth:`moved`, for every parameter and as tensors on its device, without a synchronisation."""
        return {
            name: frozen.moved(parameter)
            for (parameter, frozen), name in zip(self._held(model), self._frozen, strict=True)
        }

    @torch.no_grad()
    def restore_in_(self, state: dict[str, Tensor]) -> dict[str, int]:
        """Put the held values into a state dict of the model; tensors that have other values are replaced by new ones.

        Returns:
            The number of values that differed, by parameter name, without zeros.
        """
        found = {}
        for name, frozen in self._frozen.items():
            if name not in state or state[name].shape != self.masks[name].shape:
                continue
            here = frozen.like(state[name])
            count = int(here.moved(state[name]))
            if count:
                state[name] = state[name].detach().clone()
                here.write(state[name])
                found[name] = count
        return found

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The masks, as packed bits with their shapes, and the held values if known; tensors only."""
        return mask_files.pack(self.masks, self._values())

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Mapping[str, Tensor]]) -> WeightMask:
        """The inverse of :meth:`state_dict`; it also takes bool tensors under ``"masks"`` instead of the bits.

        Raises:
            ValueError: not the state of a mask: values without a mask, or the wrong number of them.
        """
        masks, values = mask_files.unpack(state)
        mask = cls(masks)
        mask._frozen = {name: Frozen(mask.masks[name].flatten().nonzero().flatten(), v) for name, v in values.items()}
        return mask

    def save(self, path: str | PathLike[str]) -> Path:
        """Save the masks and, if known, the held values as safetensors."""
        return mask_files.save(self.masks, self._values(), path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> WeightMask:
        """Load what :meth:`save` saved.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a saved mask, or it is damaged.
        """
        state = mask_files.load(path)
        try:
            return cls.from_state_dict(state)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be used: {error}") from error

    def _values(self) -> dict[str, Tensor]:
        return {name: frozen.value for name, frozen in self._frozen.items()}

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

    def _held(self, model: nn.Module) -> list[tuple[nn.Parameter, Frozen]]:
        if not self.is_frozen:
            raise RuntimeError("the mask holds no values yet: call rewind_(model, vanilla) or freeze(model) first.")
        pairs = []
        for name, frozen in self._frozen.items():
            parameter = model.get_parameter(name)
            frozen.follow(parameter)
            pairs.append((parameter, frozen))
        return pairs
