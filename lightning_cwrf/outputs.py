"""A model's outputs over a data set: what every attack, audit and shadow store begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.classification import check_no_probabilities, classification_step, split_batch
from lightning_cwrf.data import Batches, as_loader, bring_to, example_digests, isolated_rng, tensors_of


@dataclass(frozen=True)
class ModelOutputs:
    """Logits ``(n, K)`` float32 and targets ``(n,)`` on the CPU, and one digest of content per example."""

    logits: Tensor
    targets: Tensor
    digests: list[bytes]

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def correct(self) -> Tensor:
        """Bool ``(n,)``: whether the largest logit is the target's."""
        return self.logits.argmax(-1) == self.targets


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every submodule gets its own mode back, and the caller's random state is kept."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), None)
    try:
        with torch.no_grad(), isolated_rng(device):
            model.eval()
            yield
    finally:
        # In older versions of torch (its issue 112583) autocast would hand the casted weights of this pass, which know
        # of no gradient, to the next one.
        torch.clear_autocast_cache()
        for module, training in modes:
            module.training = training


def collect_outputs(
    model: nn.Module, data: Batches, *, name: str = "data", transfer: Callable[[Any], Any] | None = None
) -> ModelOutputs:
    """Run ``model`` over every example of ``data``, in order, in eval mode; the model is left as it was.

    Args:
        model: a classifier.
        data: a loader (iterated anew, in its dataset's order, nothing dropped), a dataset or an iterable of batches.
        name: what to call the data in an error.
        transfer: moves a batch to the model; None moves its tensors to the model's device and floats to its dtype.

    Raises:
        ValueError: there is no batch; labels out of range; logits that are not finite, or are probabilities.

    >>> outputs = collect_outputs(nn.Linear(4, 3), [(torch.zeros(2, 4), torch.tensor([0, 1]))])
    >>> outputs.logits.shape, len(outputs)
    (torch.Size([2, 3]), 2)
    """
    bring = transfer or bring_to(model)
    logits, targets, digests = [], [], []
    with evaluating(model):
        for batch in as_loader(data, shuffle=False):
            digests += example_digests(batch)
            z, y = classification_step(model, bring(batch))
            logits.append(z.float().cpu())
            targets.append(y.cpu())
    if not targets:
        raise ValueError(f"{name} holds no batch: an empty loader cannot be audited.")
    if len(digests) != sum(map(len, targets)):
        raise ValueError(f"{name}: the inputs have {len(digests)} examples, the targets {sum(map(len, targets))}.")
    outputs = ModelOutputs(torch.cat(logits), torch.cat(targets), digests)
    check_no_probabilities(outputs.logits, name)
    return outputs


def collect_view_logits(model: nn.Module, data: Batches, views: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Logits of ``model`` on each view of each example: float32 ``(q, n, K)``; the model is left as it was.

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
    """The examples' inputs, flat: float32 ``(n, d)``, for attacks that look at them."""
    rows = []
    with isolated_rng():
        for batch in as_loader(data, shuffle=False):
            inputs, _ = split_batch(batch)
            rows.append(torch.cat([leaf.reshape(len(leaf), -1).float().cpu() for leaf in tensors_of(inputs)], 1))
    if not rows:
        raise ValueError("there are no inputs: the data holds no batch.")
    return torch.cat(rows)
