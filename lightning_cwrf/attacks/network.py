"""A small network on tensors: what the learned attacks (neural, quantile regression) share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_cwrf.checks import check_integer
from lightning_cwrf.data import isolated_rng

_BATCH, _STEPS = 256, 64
"""Examples per batch, and the most batches per epoch: beyond that, batches are larger."""


def check_network(*, hidden: int = 64, epochs: int = 30, seed: int = 0) -> None:
    """Raise if a setting of a learned attack is invalid."""
    check_integer("hidden", hidden, low=1)
    check_integer("epochs", epochs, low=1, hint="An untrained network learns nothing.")
    check_integer("seed", seed, low=-(2**63), high=2**64 - 1)


def standardize(known: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise both by ``known``. ``asked`` is clamped to the range of ``known`` first, per feature."""
    least, most = known.aminmax(dim=0)
    mean, deviation = known.mean(0), known.std(0).masked_fill(least == most, 1.0)
    return (known - mean) / deviation, (asked.clamp(least, most) - mean) / deviation


def fit_predict(
    x: Tensor,
    y: Tensor,
    asked: Tensor,
    outputs: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    hidden: int,
    epochs: int,
    seed: int,
    held_out: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Train a network with one hidden layer on x and y, and return its outputs on ``asked``, float64 ``(n, outputs)``.

    With ``held_out``, other x and y, the network is that of the epoch with the lowest loss on them. AdamW in float32
    and with gradients, whatever autocast or grad mode is active around the call.
    """
    device = x.device
    around = torch.autocast(device.type, enabled=False), torch.inference_mode(False), torch.enable_grad()
    with isolated_rng(), around[0], around[1], around[2]:
        # Tensors created in inference mode cannot be trained on; their copies can.
        x, y, asked = (part.detach().clone() for part in (x, y, asked))
        torch.manual_seed(seed)
        first = nn.Linear(x.shape[1], hidden, device="cpu", dtype=torch.float32)
        last = nn.Linear(hidden, outputs, device="cpu", dtype=torch.float32)
        network = nn.Sequential(first, nn.ReLU(), last).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        size = max(_BATCH, -(-len(x) // _STEPS))
        least, best = torch.inf, [weight.detach().clone() for weight in network.parameters()]
        other_x, other_y = (x[:0], y[:0]) if held_out is None else (part.detach().clone() for part in held_out)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(x), device="cpu").to(device), size):
                optimizer.zero_grad()
                torch.autograd.backward(loss(network(x[rows]), y[rows]))
                optimizer.step()
            schedule.step()
            if held_out is None:
                continue
            with torch.no_grad():
                now = float(loss(network(other_x), other_y))
            if now < least:
                least, best = now, [weight.detach().clone() for weight in network.parameters()]
        with torch.no_grad():
            if held_out is not None:
                for weight, kept in zip(network.parameters(), best, strict=True):
                    weight.copy_(kept)
            found: Tensor = network(asked).double()
    return found
