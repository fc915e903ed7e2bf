"""What the step of one model sees inside a vectorised step: its own random numbers, and which weights are trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from lightning_cwrf.data import isolated_rng
from lightning_cwrf.shadows.jobs import seed_all

_FACTORS: set[Any] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout}
"""Functions that multiply their first argument by random numbers."""

_LIKE: set[Any] = {torch.rand_like, torch.randn_like, torch.randint_like}
_DRAWN: set[Any] = {torch.rand, torch.randn, torch.randint, torch.randperm}

_TRAINED = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class RandomStates:
    """The states of torch's random generators in K trainings that each began with their own seed."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.device = device
        self.states = []
        with isolated_rng(device):
            for seed in seeds:
                seed_all(seed)
                self.states.append(self._now())

    @contextmanager
    def of(self, k: int) -> Iterator[None]:
        """Random numbers are those of model k."""
        before = self._now()
        self._set(self.states[k])
        try:
            yield
        finally:
            self.states[k] = self._now()
            self._set(before)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Numbers that are drawn will be drawn again."""
        before = list(self.states)
        try:
            yield
        finally:
            self.states = before

    def begin_epoch(self) -> None:
        """Draw what a loader draws when an epoch begins."""
        for k in range(len(self.states)):
            with self.of(k):
                iter(DataLoader([0]))  # type: ignore[arg-type]

    def _now(self) -> list[Tensor]:
        kinds = [torch] if self.device.type == "cpu" else [torch, torch.get_device_module(self.device)]
        return [kind.get_rng_state() for kind in kinds]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.get_device_module(self.device).set_rng_state(state)


class OwnView(TorchFunctionMode):
    """Inside ``torch.func.vmap``, give a model the random numbers that it draws alone, and say which weights it trains.

    Under ``vmap`` alone, random numbers are an error, and no weight says that it requires a gradient.

    Args:
        row: the number of the model, a scalar that ``vmap`` batches.
        random: the states to draw from.
        trained: the weights that require a gradient.
    """

    def __init__(self, row: Tensor, random: RandomStates, trained: Collection[Tensor]) -> None:
        super().__init__()
        self.row = row
        self.random = random
        self.trained = {id(p) for p in trained}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _TRAINED:
            return id(args[0]) in self.trained or func(*args)
        if "generator" in kwargs or "out" in kwargs:
            return func(*args, **kwargs)
        if func in _FACTORS:
            x, *rest = args if args else (kwargs.pop("input"),)
            inplace = kwargs.pop("inplace", False)
            like = _layout(x)
            noise = self._rows(lambda: func(like().fill_(1), *rest, **kwargs))
            return x.mul_(noise) if inplace else x * noise
        if func in _LIKE:
            x, *rest = args if args else (kwargs.pop("input"),)
            like = _layout(x)
            return self._rows(lambda: func(like(), *rest, **kwargs))
        if func in _DRAWN:
            return self._rows(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

    def _rows(self, draw: Callable[[], Tensor]) -> Tensor:
        def of(k: int) -> Tensor:
            with self.random.of(k):
                return draw()

        rows: Tensor = _Rows.apply(self.row, of)
        return rows


def _layout(x: Tensor) -> Callable[[], Tensor]:
    """What makes an empty tensor with the shape, the type and the order in memory of another.

    Random numbers are drawn in the order of memory: a transposed tensor gets others than a contiguous one.
    """
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda dim: -strides[dim])
    shape, dtype, device = [x.shape[dim] for dim in order], x.dtype, x.device
    back = [order.index(dim) for dim in range(x.ndim)]
    return lambda: torch.empty(shape, dtype=dtype, device=device).permute(back)


class _Rows(torch.autograd.Function):
    """A tensor made for each model by itself, outside of ``vmap``."""

    @staticmethod
    def forward(row: Tensor, of: Callable[[int], Tensor]) -> Tensor:
        raise NotImplementedError("only within vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, row: Tensor, of: Callable[[int], Tensor]) -> tuple[Tensor, int]:
        return torch.stack([of(k) for k in range(info.batch_size)]), 0
