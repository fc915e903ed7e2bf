"""Which examples are at risk, and how much the model as a whole, from the losses of its own training alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from lightning_cwrf.attacks.signals import check_finite
from lightning_cwrf.checks import check_integer
from lightning_cwrf.files import load_tensors, save_tensors
from lightning_cwrf.metrics.functional import tpr_at_fpr

_KIND = "lightning_cwrf.LossTraces/1"
_BLOCK = 1 << 20


def lt_iqr(losses: Tensor) -> Tensor:
    """LT-IQR (Pollock et al. 2024, arXiv 2411.05743): the interquartile range of each training example's losses.

    The losses of an example that is easy to fit fall early and stay low, those of one that is never fitted stay high:
    both have a small range. An outlier that the model has memorised late has a large one, and such examples are the
    ones that LiRA recognises. It ranks training examples by risk; it does not say who is a member.

    Quantiles are interpolated linearly, as in the authors' code.

    Args:
        losses: of the n training examples at t points in time, ``(t, n)``, the points spread evenly over the training.

    Returns:
        float64 scores ``(n,)``, higher = more at risk.

    Raises:
        ValueError: fewer than 2 points in time; losses that are NaN or infinite.

    >>> lt_iqr(torch.tensor([[2.0, 2.0], [0.1, 2.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
    tensor([0.1000, 2.0000], dtype=torch.float64)
    """
    if losses.ndim != 2 or len(losses) < 2 or losses.shape[1] == 0:
        raise ValueError(
            f"losses must have shape (t, n) of at least 2 points in time and 1 example, not {tuple(losses.shape)}: "
            "train longer, or measure more often."
        )
    whole = check_finite("losses", losses)
    quarters = torch.tensor([0.25, 0.75], dtype=torch.float64, device=whole.device)
    found = []
    for block in torch.split(whole, max(1, _BLOCK // len(whole)), dim=1):  # torch.quantile takes 16 M values at most
        low, high = torch.quantile(block, quarters, dim=0)
        found.append(high - low)
    return torch.cat(found)


def loss_tnr(member_losses: Tensor, nonmember_losses: Tensor, *, max_fnr: float = 1e-3) -> float:
    """Loss-TNR (Dodd et al. 2025, arXiv 2510.19773): the share of non-members with a loss that no member has.

    The loss attack is used to recognise non-members: its threshold is the lowest loss that at most ``max_fnr`` of the
    members exceed, and its true negative rate is the share of the non-members above it. The paper finds that it is
    close to the true positive rate of LiRA at a false positive rate of the same size. It is of the model as a whole:
    the examples at risk are those that would be in the tail of the losses, had the model not learned them.

    Args:
        member_losses: of the training examples under the finished model, ``(n,)``.
        nonmember_losses: of others, ``(m,)``.
        max_fnr: the share of the members that may be above the threshold. The paper compares it with LiRA's false
            positive rate; the default is this package's, as for :func:`~lightning_cwrf.metrics.functional.tpr_at_fpr`.

    Raises:
        ValueError: losses that are NaN or infinite, an empty side, a rate that is not in [0, 1].

    >>> loss_tnr(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.2, 0.4, 0.9, 3.0]))
    0.75
    """
    losses = [check_finite("member_losses", member_losses), check_finite("nonmember_losses", nonmember_losses)]
    is_nonmember = torch.arange(sum(map(len, losses))) >= len(losses[0])
    return float(tpr_at_fpr(torch.cat(losses).cpu(), is_nonmember, max_fnr))


@dataclass(frozen=True)
class LossTraces:
    """The losses of every training example over one training, as :class:`~lightning_cwrf.LossTraceCallback` records.

    Attributes:
        losses: cross-entropy ``(t, n)``, float16, at t points in time; float32 where a loss exceeds 65,504.
        steps: optimizer steps done at each point, ``(t,)``: 0 is before the training, the last one its end.
        nonmember_losses: of the finished model ``(m,)``, rounded likewise; None where no non-members were given.
        digest: of the examples' contents and labels in their order; empty: unknown.

    >>> traces = LossTraces(torch.tensor([[2.0, 2.0], [2.0, 0.1], [1.8, 0.0]]).half(), torch.tensor([0, 10, 20]))
    >>> traces.lt_iqr().argmax()
    tensor(1)
    >>> traces.at_risk(1)
    tensor([1])
    """

    losses: Tensor = field(repr=False)
    steps: Tensor
    nonmember_losses: Tensor | None = field(default=None, repr=False)
    digest: str = ""

    def lt_iqr(self) -> Tensor:
        """:func:`lt_iqr` of each training example, float64 ``(n,)``."""
        return lt_iqr(self.losses)

    def at_risk(self, k: int) -> Tensor:
        """The indices of the k training examples with the largest :func:`lt_iqr`, the largest first, int64 ``(k,)``.

        Raises:
            ValueError: k is not from 1 to the number of examples.
        """
        check_integer("k", k, low=1, high=self.losses.shape[1])
        return self.lt_iqr().argsort(descending=True, stable=True)[:k]

    def loss_tnr(self, max_fnr: float = 1e-3) -> float:
        """:func:`loss_tnr` of the finished model.

        Raises:
            ValueError: the losses of non-members were not recorded.
        """
        if self.nonmember_losses is None:
            raise ValueError("Loss-TNR needs the losses of non-members: pass LossTraceCallback(nonmembers=...).")
        return loss_tnr(self.losses[-1], self.nonmember_losses, max_fnr=max_fnr)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write a safetensors file, which :meth:`load` reads."""
        tensors = {"losses": self.losses, "steps": self.steps}
        if self.nonmember_losses is not None:
            tensors["nonmember_losses"] = self.nonmember_losses
        return save_tensors(tensors, path, _KIND, {"examples": self.digest})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LossTraces:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or another kind of file.
        """
        file = load_tensors(path, _KIND, what="file of loss traces")
        return cls(**file.tensors, digest=file.metadata["examples"])
