"""A model's outputs over a data set, the input of every attack, audit and shadow store."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.classification import check_no_probabilities, classification_step, split_batch
from lightning_cwrf.data import (
    Batches,
    Key,
    as_loader,
    bring_to,
    check_batches,
    example_digests,
    isolated_rng,
    tensors_of,
)
from lightning_cwrf.data.examples import ExampleId, example_keys


@dataclass(frozen=True)
class ModelOutputs:
    """Logits ``(n, K)`` float32 and targets ``(n,)`` on the CPU, and the identity of each example.

    Attributes:
        logits: of the model.
        targets: class indices.
        digests: of the inputs' content, one per example.
        keys: the user's own ids; None: examples are identified by content.
        scale: mean and standard deviation of the inputs' floats; None: there are none.
        random: the model gave other logits for the same batch a second time.
    """

    logits: Tensor
    targets: Tensor
    digests: list[bytes]
    keys: list[Hashable] | None = None
    scale: tuple[float, float] | None = None
    random: bool = False

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def ids(self) -> list[ExampleId]:
        """The identity of each example: its content and label, or its key."""
        if self.keys is not None:
            return [(key, None) for key in self.keys]
        return list(zip(self.digests, self.targets.tolist(), strict=True))

    def at(self, places: list[int]) -> ModelOutputs:
        """The outputs at these indices."""
        return replace(
            self,
            logits=self.logits[places],
            targets=self.targets[places],
            digests=[self.digests[i] for i in places],
            keys=None if self.keys is None else [self.keys[i] for i in places],
        )

    @property
    def correct(self) -> Tensor:
        """Bool ``(n,)``: whether the largest logit is the target's."""
        return self.logits.argmax(-1) == self.targets


class ForwardStep(nn.Module):
    """A model whose forward takes a batch, so that ``functional_call`` runs its own ``classification_step``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        return classification_step(self.model, batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; at the end, modes and the caller's random state are restored."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), None)
    try:
        with torch.no_grad(), isolated_rng(device):
            model.eval()
            yield
    finally:
        # In older versions of PyTorch (its issue 112583), autocast reuses the converted weights of this pass, which
        # have no gradient, in the next one.
        torch.clear_autocast_cache()
        for module, training in modes:
            module.training = training


def collect_outputs(
    model: nn.Module,
    data: Batches,
    *,
    name: str = "data",
    transfer: Callable[[Any], Any] | None = None,
    key: Key | None = None,
    repeat: bool = False,
) -> ModelOutputs:
    """Run ``model`` over every example of ``data``, in order, in eval mode; the model is not changed.

    Args:
        model: a classifier.
        data: a loader (its examples are read by a new one, in order), a dataset or an iterable of batches.
        name: of the data, for errors.
        transfer: applied to each batch before its tensors go to the model's device and precision.
        key: gives the id of one example, in the form of its batch.
        repeat: run the first batch twice, to find outputs that are random.

    Raises:
        TypeError: ``data`` is none of the three.
        ValueError: no batch; labels out of range; logits that are not finite, or are probabilities.

    >>> outputs = collect_outputs(nn.Linear(4, 3), [(torch.randn(2, 4), torch.tensor([0, 1]))])
    >>> outputs.logits.shape, len(outputs)
    (torch.Size([2, 3]), 2)
    """
    check_batches(data, name)
    bring = bring_to(model, transfer)
    logits: list[Tensor] = []
    targets, digests = [], []
    keys: list[Hashable] | None = None if key is None else []
    scale = _Scale()
    random = False
    with evaluating(model):
        for batch in as_loader(data, shuffle=False):
            digests += example_digests(batch)
            if keys is not None and key is not None:
                keys += example_keys(batch, key)
            scale.see(batch)
            z, y = classification_step(model, bring(batch))
            if repeat and not logits:
                again, _ = classification_step(model, bring(batch))
                # Kernels may sum in another order; noise that could hide members is much larger.
                random = z.shape == again.shape and not torch.allclose(z.float(), again.float(), rtol=1e-2, atol=1e-3)
            logits.append(z.float().cpu())
            targets.append(y.cpu())
    if not targets:
        raise ValueError(f"{name} holds no batch: an empty loader cannot be audited.")
    for what, found in (("inputs", digests), ("keys", keys)):
        if found is not None and len(found) != sum(map(len, targets)):
            raise ValueError(f"{name}: the {what} have {len(found)} examples, the targets {sum(map(len, targets))}.")
    classes = sorted({z.shape[1] for z in logits})
    if len(classes) > 1:
        raise ValueError(f"the model gives {' and '.join(map(str, classes))} classes on different batches of {name}.")
    outputs = ModelOutputs(torch.cat(logits), torch.cat(targets), digests, keys, scale.value, random)
    check_no_probabilities(outputs.logits, name)
    return outputs


class _Scale:
    """Mean and standard deviation of the floats in the inputs, batch by batch."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)

    def see(self, batch: Any) -> None:
        try:
            leaves = tensors_of(split_batch(batch)[0])
        except TypeError:  # only the user's own step can interpret it
            return
        for leaf in leaves:
            if leaf.is_floating_point():
                values = leaf.detach().double().cpu()
                self.sums += torch.tensor([values.numel(), values.sum(), values.square().sum()], dtype=torch.float64)

    @property
    def value(self) -> tuple[float, float] | None:
        count, total, squares = self.sums.tolist()
        if not count:
            return None
        return total / count, max(0.0, squares / count - (total / count) ** 2) ** 0.5


def collect_view_logits(model: nn.Module, data: Batches, views: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Logits of ``model`` on each view of each example: float32 ``(q, n, K)``; the model is not changed.

    Args:
        model: a classifier.
        data: as for :func:`collect_outputs`; its inputs must be single tensors.
        views: functions of a batch of inputs, such as rotations.
    """
    bring = bring_to(model)
    rows: list[list[Tensor]] = [[] for _ in views]
    with evaluating(model):
        for batch in as_loader(data, shuffle=False):
            inputs, targets = split_batch(bring(batch))
            if not isinstance(inputs, Tensor):
                raise TypeError(
                    f"views need batches (inputs, targets) of one input tensor, not {type(inputs).__name__}."
                )
            for row, view in zip(rows, views, strict=True):
                row.append(classification_step(model, (view(inputs), targets))[0].float().cpu())
    return torch.stack([torch.cat(row) for row in rows])


def collect_inputs(data: Batches) -> Tensor:
    """The examples' flattened inputs, float32 ``(n, d)``, for attacks that use them."""
    rows = []
    with isolated_rng():
        for batch in as_loader(data, shuffle=False):
            inputs, _ = split_batch(batch)
            rows.append(torch.cat([leaf.reshape(len(leaf), -1).float().cpu() for leaf in tensors_of(inputs)], 1))
    if not rows:
        raise ValueError("there are no inputs: the data holds no batch.")
    return torch.cat(rows)
