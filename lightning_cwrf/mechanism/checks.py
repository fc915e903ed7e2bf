"""What draws need of their settings, the model and the private data, so that their guarantee holds."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable

from torch import nn
from torch.utils.data import DataLoader

from lightning_cwrf.checks import check_choice, check_integer, check_number
from lightning_cwrf.data import Batches
from lightning_cwrf.data.examples import ExampleId, is_whole
from lightning_cwrf.data.overlap import is_ambiguous, origins, places_among, told
from lightning_cwrf.mechanism.curvature import PublicCurvature
from lightning_cwrf.mechanism.parameters import flat, parameter_names
from lightning_cwrf.mechanism.spent import SHIFTS, GaussianLedger
from lightning_cwrf.weights.copies import parameters_and_buffers, weights_digest

_REMEDY = (
    "Leave them out of the private data (lightning_cwrf.without_overlap(private, public)), not out of the public data, "
    "which would then depend on the private ones."
)


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
        hint = "A larger one promises nothing."
        check_number("mu", mu, low=0, high=1e7, low_open=True, hint=hint)
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
    steps = sum(getattr(getattr(module, "_dpsgd_ledger", None), "steps", 0) for module in model.modules())
    if steps:
        raise ValueError(
            f"this model has taken {steps} steps of DP-SGD, and the ε of draws would not count them. Start from the "
            "weights of before; or load these into a new model, and add the two ε and the two δ yourself."
        )


def check_public(private: list[ExampleId], curvature: PublicCurvature) -> None:
    """Raise a ValueError where private examples are among the public ones, by their inputs.

    Where many examples of both share their content, it identifies none, and this is a warning.
    """
    if curvature.public is None:
        return
    inside = [digest for digest, _ in private]
    places = places_among(inside, curvature.public)
    if not places:
        return
    what = told(places, len(inside), "the private data", "public", "the same inputs")
    message = f"{what}: the curvature must come from public data"
    if is_ambiguous(inside) and curvature.ambiguous:
        warnings.warn(f"{message}. Many examples of both share their content, so this may be chance.", stacklevel=3)
        return
    raise ValueError(f"{message}. {_REMEDY}")


def check_single(private: Batches, ids: list[ExampleId]) -> None:
    """Raise a ValueError for an example that the private data hold several times; warn of equal ones.

    The guarantee is for one row of the data, so an example in k rows is protected less.
    """
    several = _several(origins(private.dataset if isinstance(private, DataLoader) else private) or ())
    cost = "the guarantee of μ is for one row, and an example in k rows has that of k times μ alone"
    if several:
        raise ValueError(
            f"the private data hold {len(several)} examples more than once (one of them {max(several)} times, by index "
            f"in their data set): {cost}. Take each example once."
        )
    equal = _several(ids)
    if equal:
        warnings.warn(
            f"{sum(equal)} of the {len(ids)} private examples are equal to others, up to {max(equal)} to one another: "
            f"{cost}. If they are of one person, leave the copies out.",
            stacklevel=3,
        )


def _several(values: Iterable[Hashable]) -> list[int]:
    """How often each value occurs that occurs more than once."""
    return [count for count in Counter(values).values() if count > 1]


def written(model: nn.Module) -> tuple[str, str] | None:
    """Digests of the names and of the values of a model's parameters and buffers; None: the values have none."""
    values = weights_digest(model)
    names = repr(sorted(name for name, _ in parameters_and_buffers(model)))
    return (hashlib.blake2b(names.encode(), digest_size=8).hexdigest(), values) if values else None


def warn_of_other_training(model: nn.Module, ledger: GaussianLedger) -> None:
    """Warn where the weights are not those that the earlier draws wrote."""
    now, then = written(model), ledger.weights
    if now is not None and then is not None and now[0] == then[0] and now[1] != then[1]:
        warnings.warn(
            f"the weights are not those that the {ledger.draws} earlier draws gave: something else has changed them "
            "since. ε does not count it, and holds only if nothing of the private data was used for it.",
            stacklevel=3,
        )


def check_parts(private: Batches, public: Batches) -> None:
    """Raise a ValueError where both take an index of one data set, also under random augmentation."""
    if not is_whole(public):
        return  # which public_curvature refuses
    shared = sorted(place for _, place in set(origins(private) or ()) & set(origins(public) or ()))
    if shared:
        shown = ", ".join(map(str, shared[:10])) + (", ..." if len(shared) > 10 else "")
        raise ValueError(
            f"the private and the public data are parts of one data set and share {len(shared)} of its examples (at "
            f"{shown}): the curvature must come from public data. {_REMEDY}"
        )
