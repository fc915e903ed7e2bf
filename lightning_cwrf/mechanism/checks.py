"""What draws need of their settings, the model and the private data, so that their guarantee holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_cwrf.checks import check_choice, check_integer, check_number
from lightning_cwrf.data import Batches, all_ids, as_loader, check_batches, fingerprints, isolated_rng, reads_alike
from lightning_cwrf.data.examples import ExampleId, is_whole
from lightning_cwrf.data.poisson import whole_order
from lightning_cwrf.mechanism.curvature import PublicCurvature
from lightning_cwrf.mechanism.gradients import flat, parameter_names, rows
from lightning_cwrf.mechanism.spent import SHIFTS


def check_settings(
    target_epsilon: float | None, mu: float | None, target_delta: float, draws: int, eta: float, adjacency: str
) -> None:
    """Raise a TypeError or ValueError for settings of :func:`exponential_mechanism` that are out of range."""
    if (target_epsilon is None) == (mu is None):
        raise ValueError("the exponential mechanism needs one of target_epsilon and mu, and not both.")
    if target_epsilon is not None:
        hint = "A larger one promises nothing; pass mu for so little noise."
        check_number("target_epsilon", target_epsilon, low=0, high=100, low_open=True, hint=hint)
    if mu is not None:
        check_number("mu", mu, low=0, low_open=True)
    hint = "It is the chance that the guarantee fails: take less than 1 / (number of training examples)."
    check_number("target_delta", target_delta, low=0, high=1, low_open=True, high_open=True, hint=hint)
    check_integer("draws", draws, low=1)
    check_number("eta", eta, low=0, low_open=True)
    check_choice("adjacency", adjacency, SHIFTS)


def check_fit(model: nn.Module, curvature: PublicCurvature) -> None:
    """Raise a ValueError where a curvature is not of this model, or draws cannot be accounted for by themselves."""
    if parameter_names(model, curvature.names) != curvature.names:
        raise ValueError("the curvature's names are not in the model's order: it is that of another model.")
    numbers = len(flat(model, curvature.names))
    expected = curvature.dimensions if curvature.subspace is None else len(curvature.subspace.basis)
    if numbers != expected:
        raise ValueError(f"the curvature is of {expected} parameters, and the model has {numbers} under its names.")
    steps = getattr(getattr(model, "_dpsgd_ledger", None), "steps", 0)
    if steps:
        raise ValueError(
            f"this model has taken {steps} steps of DP-SGD, and the ε of draws would not count them. Start from the "
            "weights of before; or load these into a new model, and add the two ε and the two δ yourself."
        )


def check_private(private: Batches, transfer: Callable[[Any], Any] | None = None) -> list[ExampleId]:
    """The identity of each private example, of which every pass must give each exactly once, by itself.

    Raises:
        TypeError: a stream, or an iterator.
        ValueError: a loader that leaves examples out or draws them; data, or a ``transfer``, that change at random.
    """
    check_batches(private, "the private data")
    if not is_whole(private):
        raise TypeError(
            "the private data are read once for each draw: pass a data set, a loader of one or a list of batches, not "
            "a stream."
        )
    if isinstance(private, DataLoader) and not isinstance(private.dataset, IterableDataset):
        if whole_order(private) is None:
            raise ValueError(
                "the private loader's sampler chooses examples, so that one example could decide about others: pass a "
                "loader with batch_size= of the whole dataset, or of a Subset."
            )
        if private.drop_last:
            raise ValueError(
                "the private loader has drop_last=True, so that one example could decide about others: every example "
                "must count once. Leave it out."
            )
    ids = all_ids(private)
    if not ids:
        raise ValueError("the private data hold no batch.")
    if not reads_alike(private):
        raise ValueError(
            "the private data read differently each time (random augmentation, or examples that are mixed): the "
            "gradient of an example must be its own. Leave that out."
        )
    with isolated_rng():
        _check_own(private, transfer or (lambda batch: batch))
    return ids


def _check_own(private: Batches, transfer: Callable[[Any], Any]) -> None:
    """Raise where the first example reads differently without the others of its batch."""
    batch, alone = (next(iter(as_loader(private, shuffle=False, batch_size=size))) for size in (None, 1))
    one = rows(batch, 0, 1)
    pairs = {"a collate_fn": (alone, batch), "the module's batch transfer hooks": (transfer(one), transfer(batch))}
    for hook, (other, whole) in pairs.items():
        if fingerprints(other)[0] != fingerprints(whole)[0]:
            raise ValueError(
                f"an example of the private data reads differently without the others of its batch ({hook}): the "
                "gradient of an example must be its own. Do the same to each example by itself, or nothing at random."
            )
