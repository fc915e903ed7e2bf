"""Outputs of any engine, as arrays: read into logits and class indices, and checked."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cwrf.checks import check_number
from lightning_cwrf.classification import check_no_probabilities
from lightning_cwrf.targets import class_indices, two_classes

__all__ = ["probabilities_to_logits"]

_FIX = "pass logits, or lightning_cwrf.probabilities_to_logits of the probabilities."


def probabilities_to_logits(probabilities: Any, *, floor: float = 1e-6) -> Tensor:
    """Logits whose softmax is these probabilities: ``log(max(p, floor))``.

    A probability of 0 has no logarithm, so one below ``floor`` counts as ``floor``. The floor is the resolution of the
    probabilities: 1e-6 where they are printed with six digits, 1 / (2 T) for the votes of T trees. LiRA's signal of an
    example then lies between log(floor) and −log(floor), nearly; a far smaller floor makes outliers of the zeros.

    Args:
        probabilities: of K classes, ``(..., n, K)``, every row with the sum 1; or ``(n,)``, of class 1 of two.
        floor: above 0, at most 1 / K.

    Returns:
        ``(..., n, K)``, float32; float64 where the probabilities are.

    Raises:
        TypeError: no numbers.
        ValueError: values outside [0, 1] or NaN, rows with another sum; a floor out of range.

    >>> probabilities_to_logits([[0.25, 0.75], [1.0, 0.0]], floor=0.01).exp()
    tensor([[0.2500, 0.7500],
            [1.0000, 0.0100]], dtype=torch.float64)
    """
    values = read_tensor(probabilities, "probabilities")
    if not values.is_floating_point():
        raise TypeError(f"probabilities must be floats, not {values.dtype}.")
    values = values if values.dtype == torch.float64 else values.float()
    if not bool(((values >= 0) & (values <= 1 + 1e-6)).all()):
        raise ValueError("probabilities must lie between 0 and 1, and some do not, or are NaN.")
    if values.ndim == 1:
        values = torch.stack([1 - values, values], -1)
    if values.ndim == 0 or values.shape[-1] < 2:
        raise ValueError(
            f"probabilities must have shape (..., n, K) with K >= 2 classes, or (n,), not {tuple(values.shape)}."
        )
    check_number("floor", floor, low=0, low_open=True, high=1 / values.shape[-1])
    sums = values.sum(-1)
    if not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ValueError(
            f"every row of probabilities must have the sum 1; here sums go from {float(sums.min()):.4g} to "
            f"{float(sums.max()):.4g}. Of one label of several, pass its own probabilities, (n,)."
        )
    return values.clamp(floor, 1).log()


def read_outputs(given: Any, name: str) -> tuple[Tensor, Tensor]:
    """One model's logits ``(n, K)`` float32 and targets ``(n,)``, from a pair of arrays.

    Raises:
        TypeError: no pair, or no numbers.
        ValueError: shapes that do not fit; values that are not finite, or are probabilities; no class indices.

    >>> read_outputs(([[0.5, -1.0, 2.0]], [2]), "members")
    (tensor([[ 0.5000, -1.0000,  2.0000]]), tensor([2]))
    """
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"{name} must be a pair (logits, targets), not a {type(given).__name__}.")
    logits = read_logits(given[0], name).float()
    return logits, read_targets(given[1], name, *logits.shape)


def read_logits(given: Any, name: str, *, models: bool = False) -> Tensor:
    """Logits ``(n, K)``, or of several models ``(k, n, K)``, in their dtype but float64, which becomes float32.

    One logit for each example, ``(n,)`` or ``(n, 1)``, is that of class 1 of two.
    """
    values = read_tensor(given, f"the logits of {name}")
    if not values.is_floating_point():
        raise TypeError(f"the logits of {name} must be floats, not {values.dtype}.")
    values = values.float() if values.dtype == torch.float64 else values
    dimensions, wanted = (3, "(models, n, K)") if models else (2, "(n, K)")
    if values.ndim == dimensions - 1:
        values = values.unsqueeze(-1)
    if values.ndim == dimensions and values.shape[-1] == 1:
        values = two_classes(values.reshape(-1)).reshape(*values.shape[:-1], 2)
    if values.ndim != dimensions or values.shape[-1] < 2 or 0 in values.shape:
        raise ValueError(
            f"the logits of {name} must have shape {wanted} with K >= 2 classes, or one dimension less for one logit "
            f"for each example; not {tuple(values.shape)}."
        )
    bad = sum(int((~torch.isfinite(rows)).any(-1).sum()) for rows in (values if models else values[None]))
    if bad:
        raise ValueError(
            f"the logits of {name} are NaN or infinite in {bad} rows. The logarithm of a probability of 0 is infinite: "
            "probabilities_to_logits has a floor for it."
        )
    for i, rows in enumerate(values if models else values[None]):
        check_no_probabilities(rows, f"{name}, model {i}" if models else name, fix=_FIX)
    return values


def read_targets(given: Any, name: str, examples: int, classes: int) -> Tensor:
    """Class indices ``(n,)``, int64."""
    values = class_indices(read_tensor(given, f"the targets of {name}"))
    if values.ndim == 2:
        if bool(((values == 0) | (values == 1)).all()) and not bool((values.sum(1) == 1).all()):
            raise ValueError(
                f"the targets of {name} are those of multi-label classification, of shape {tuple(values.shape)}. Audit "
                "one label at a time: its logits, logits[:, j], and its targets, targets[:, j]."
            )
        raise ValueError(
            f"the targets of {name} must be class indices of shape (n,), not of shape {tuple(values.shape)}; turn "
            "one-hot targets into indices with .argmax(-1)."
        )
    if values.is_floating_point() or values.ndim != 1:
        raise ValueError(
            f"the targets of {name} must be class indices of shape (n,), not {values.dtype} of shape "
            f"{tuple(values.shape)}."
        )
    if len(values) != examples:
        raise ValueError(f"{name} has logits of {examples} examples and {len(values)} targets.")
    if int(values.min()) < 0 or int(values.max()) >= classes:
        raise ValueError(
            f"the targets of {name} go from {int(values.min())} to {int(values.max())}; with {classes} classes they "
            f"must be indices from 0 to {classes - 1}."
        )
    return values.long()


def read_tensor(given: Any, name: str) -> Tensor:
    """A tensor on the CPU, which shares the memory of the array where it can.

    Raises:
        TypeError: no numbers; sparse or masked values.
    """
    if isinstance(given, Tensor):
        if given.layout != torch.strided:
            raise TypeError(f"{name} must be dense, not {given.layout}; use .to_dense().")
        unsigned = given.dtype in (torch.uint16, torch.uint32, torch.uint64)
        return given.detach().cpu().long() if unsigned else given.detach().cpu()
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise TypeError(f"{name} have masked values; leave these examples out, of the targets and the membership too.")
    array = np.asarray(given)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"{name} must be numbers, not of type {array.dtype}. Labels that are words become indices by "
            "numpy.unique(labels, return_inverse=True); keep the order of the classes of the model."
        )
    if array.dtype.kind in "iu":
        array = array.astype(np.int64)  # torch can do little with wide unsigned integers
    elif array.dtype.itemsize > 8 or not array.dtype.isnative:
        array = array.astype(np.float64)
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not writable.*")  # nothing here writes: a read-only memory map is fine
        return torch.as_tensor(array)


def labels_of(given: Any, size: int, name: str, *, of: str = "audited examples, members first") -> list[Any]:
    """A value for each example, none of them missing.

    Raises:
        ValueError: another length, more than one dimension, or a missing value.
    """
    values = given.detach().cpu().numpy() if isinstance(given, Tensor) else given
    if hasattr(values, "isna"):  # of pandas, whose missing values have several types
        values = [None if missing else value for value, missing in zip(values, values.isna(), strict=True)]
    if not isinstance(values, (list, tuple)):
        values = np.asarray(values).tolist()
    if not isinstance(values, (list, tuple)) or len(values) != size:
        length = len(values) if isinstance(values, (list, tuple)) else f"no list but {type(given).__name__}"
        raise ValueError(f"{name} must have a value for each of the {size} {of}; it has {length}.")
    values = [value.item() if isinstance(value, (Tensor, np.generic)) else value for value in values]
    missing = [i for i, value in enumerate(values) if _is_missing(value)]
    if missing:
        raise ValueError(
            f"{name} has no value for {len(missing)} examples (first {missing[:10]}); give them one of their own."
        )
    try:
        set(values)
    except TypeError as error:
        raise ValueError(f"{name} must have one value for each example, which can be compared: {error}.") from error
    return values


def _is_missing(value: Any) -> bool:
    of_pandas = type(value).__name__ in ("NAType", "NaTType")
    return value is None or of_pandas or (isinstance(value, float) and value != value)
