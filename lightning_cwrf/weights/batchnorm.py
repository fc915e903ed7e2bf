"""BatchNorm's running statistics after weights have been rewound: reset, or estimated again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset

from lightning_cwrf.classification import classification_step
from lightning_cwrf.data import Batches, as_loader, bring_to
from lightning_cwrf.weights.copies import copied
from lightning_cwrf.weights.descent import scoring_context


def tracking_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that move their running statistics in training: those in train mode that have some.

    Raises:
        ValueError: there is none.

    >>> sorted(tracking_layers(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
    ['1']
    """
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.training
    }
    if not found:
        raise ValueError(
            "the model has no BatchNorm layer in train mode with running statistics: leave batchnorm at 'keep'."
        )
    return found


@torch.no_grad()
def reset_statistics(model: nn.Module) -> None:
    """Set running means to 0 and running variances to 1, as before training, in place.

    Raises:
        ValueError: no BatchNorm layer in train mode has running statistics.
    """
    for layer in tracking_layers(model).values():
        layer.reset_running_stats()


def estimated_statistics(
    model: nn.Module,
    members: Batches,
    *,
    transfer: Callable[[Any], Any] | None = None,
    batch_size: int = 256,
) -> dict[str, Tensor]:
    """Running statistics of the model's present weights: means over one pass of training data, in random order.

    The pass is in train mode on a copy of the model, so dropout is active, as when the statistics were first collected.
    The variance is the mean over batches of their unbiased variances. Batches count by their numbers of examples; for
    batches of one size that is what a layer with ``momentum=None`` collects. The model and the caller's random state
    are not changed.

    Args:
        model: a classifier (:func:`~lightning_cwrf.classification.classification_step`) in the modes of its training.
        members: its training data.
        transfer: applied to each batch before its tensors go to the model's device and precision.
        batch_size: examples in a batch, or a few fewer where the last one would be of a single example, which has no
            variance; batches of an iterable or of your own batch sampler keep their size.

    Returns:
        Buffers by name: ``running_mean`` and ``running_var`` of shape ``(channels,)`` and ``num_batches_tracked`` of
        the BatchNorm layers in train mode that the forward pass reaches.

    Raises:
        ValueError: there is no such layer, or no batch; or statistics are not finite.

    >>> layer = nn.BatchNorm1d(1)
    >>> data = [(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]))]
    >>> found = estimated_statistics(nn.Sequential(layer, nn.Linear(1, 2)), data)
    >>> found["0.running_mean"], found["0.running_var"], layer.running_mean
    (tensor([2.]), tensor([2.]), tensor([0.]))
    """
    tracking_layers(model)
    bring = bring_to(model, transfer)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}  # a layer may be skipped at random
    batches = 0
    with scoring_context(model), torch.no_grad():
        work = copied(model)
        layers = tracking_layers(work)
        for layer in layers.values():
            layer.momentum = None  # a layer that is used twice in a pass has the mean of both uses
        for batch in _batches(members, batch_size):
            reset_statistics(work)
            seen = len(classification_step(work, bring(batch))[1])
            batches += 1
            for name, value in _statistics(layers).items():
                sums[name] = sums.get(name, 0) + seen * value.double()
                counts[name] = counts.get(name, 0) + seen
    if not batches:
        raise ValueError("members holds no batch: BatchNorm's statistics cannot be estimated from an empty loader.")
    bad = sorted(name for name, total in sums.items() if not total.isfinite().all())
    if bad:
        raise ValueError(f"the estimated statistics {', '.join(bad[:5])} are NaN or infinite: are the inputs finite?")
    own = dict(model.named_buffers())
    estimated = {name: (total / counts[name]).to(own[name].dtype) for name, total in sums.items()}
    reached = {name.rpartition(".")[0] for name in sums}
    tracked = {f"{name}.num_batches_tracked".lstrip("."): torch.tensor(batches) for name in reached}
    return estimated | tracked


def _statistics(layers: dict[str, _BatchNorm]) -> dict[str, Tensor]:
    """Running means and variances by their names in the model, of the layers that the last pass reached."""
    return {
        f"{name}.{each}".lstrip("."): getattr(layer, each)
        for name, layer in layers.items()
        if layer.num_batches_tracked
        for each in ("running_mean", "running_var")
    }


def _batches(members: Batches, size: int) -> Iterable[Any]:
    loader = as_loader(members, shuffle=True, batch_size=size)
    if isinstance(loader, DataLoader) and loader.batch_size and not isinstance(loader.dataset, IterableDataset):
        examples = len(loader.sampler)  # type: ignore[arg-type]
        smaller = next((each for each in range(loader.batch_size, 1, -1) if examples % each != 1), loader.batch_size)
        return as_loader(members, shuffle=True, batch_size=smaller)
    return loader
