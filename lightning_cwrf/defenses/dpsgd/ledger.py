"""What private training has spent: accounted steps, the guarantee they give, and the noise that a target allows."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor

from lightning_cwrf.mechanism.spent import PrivacySpent as PrivacySpent

if TYPE_CHECKING:
    from opacus.accountants import IAccountant

ACCOUNTANTS = ("prv", "rdp", "gdp")
_KEPT = ("noise_multiplier", "clip_norm", "first_clip_norm", "sampling_seed", "noise_state", "layout")

Steps = tuple[float, float, int]
"""A noise multiplier, a sample rate, and how many steps were taken with them."""


class Ledger:
    """The privacy accounting across fits: the accounted steps, the (first) noise multiplier, the adaptive clip norm,
    and the random state.

    ``from_scratch``: the weights had seen no private data before the first step; ``earlier``: what they spent before.
    """

    def __init__(self, mechanism: str, *, from_scratch: bool = False, earlier: Ledger | None = None) -> None:
        from opacus.accountants import create_accountant

        self.from_scratch = from_scratch
        if earlier is not None:
            self._check_origin(earlier.steps, earlier.from_scratch)
        self.accountant: IAccountant = create_accountant(mechanism)
        self.noise_multiplier: float | None = None
        self.clip_norm: float | None = None
        self.first_clip_norm: float | None = None  # what the setting was that clip_norm started from
        self.sampling_seed: int | None = None
        self.noise_state: Tensor | None = None
        self.layout: dict[str, int] | None = None
        if earlier is not None:
            self.accountant.history = list(earlier.accountant.history)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        """Without the random state: with the same noise, the difference of two fits would show the data."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        twin.sampling_seed = twin.noise_state = None
        return twin

    def _check_origin(self, steps: int, from_scratch: bool) -> None:
        if self.from_scratch and steps and not from_scratch:
            raise MisconfigurationException(
                f"from_scratch=True says that the start weights have seen no private data, but the first {steps} steps "
                "of DP-SGD were taken without it. Leave it out: ε covers the fine-tuning phase alone."
            )

    @property
    def steps(self) -> int:
        return sum(count for _, _, count in self.accountant.history)

    def record(self, noise_multiplier: float, sample_rate: float) -> None:
        """Account for one step."""
        self.accountant.history = _merged([*self.accountant.history, (noise_multiplier, sample_rate, 1)])

    def epsilon(self, delta: float, ahead: Iterable[Steps] = ()) -> float:
        """ε at δ of the steps so far, and of those ``ahead``."""
        history = _merged([*self.accountant.history, *ahead])
        return _epsilon(self.accountant.mechanism(), tuple(history), delta)

    def noise_for(self, target: float, delta: float, sample_rate: float, plan: Sequence[tuple[float, int]]) -> float:
        """The smallest noise multiplier, to 1 % of ε, for which the steps so far and those of ``plan`` stay within ε.

        ``plan``: multiples of that noise multiplier, each with a number of steps.
        """

        def end(noise: float) -> float:
            return self.epsilon(delta, [(noise * factor, sample_rate, count) for factor, count in plan])

        low, high = 0.0, 1.0
        spent = end(high)
        while spent > target:
            low, high = high, 2 * high
            if high > 1e6:
                raise MisconfigurationException(
                    f"no noise keeps {sum(count for _, count in plan)} steps within target_epsilon={target:g} at "
                    f"target_delta={delta:g}"
                    + (f", {self.epsilon(delta):.4g} of it is spent" if self.steps else "")
                    + ". Raise one of the two, or train for fewer steps."
                )
            spent = end(high)
        while target - spent > min(0.01, target / 100) and high - low > 1e-6:
            middle = (low + high) / 2
            at = end(middle)
            if at <= target:
                high, spent = middle, at
            else:
                low = middle
        return high

    def state_dict(self) -> dict[str, Any]:
        return {
            "accountant": dict(self.accountant.state_dict()),
            "from_scratch": self.from_scratch,
            **{name: getattr(self, name) for name in _KEPT},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        history = [tuple(entry) for entry in state["accountant"]["history"]]
        self._check_origin(sum(count for _, _, count in history), state.get("from_scratch", self.from_scratch))
        self.accountant.history = history  # the same steps, whichever accountant counted them
        for name in _KEPT:
            setattr(self, name, state.get(name))  # None in checkpoints of versions that did not know it


def _merged(history: Iterable[Steps]) -> list[Steps]:
    """Neighbours with the same noise and sample rate as one."""
    merged: list[Steps] = []
    for noise, rate, count in history:
        if merged and merged[-1][:2] == (noise, rate):
            count += merged.pop()[2]
        merged.append((noise, rate, count))
    return merged


@lru_cache(maxsize=128)
def _epsilon(mechanism: str, history: tuple[Steps, ...], delta: float) -> float:
    if any(noise == 0 for noise, _, _ in history):
        return math.inf
    if not history:
        return 0.0
    if mechanism == "gdp":
        return _gdp(history, delta)
    if mechanism == "rdp" or min(noise for noise, _, _ in history) < 0.3:
        bound = _rdp(history, delta)
        # Beyond this, the grid of PRV takes gigabytes; what RDP bounds is as true.
        if mechanism == "rdp" or bound > 100:
            return bound
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    with _quiet():
        return float(accountant.get_epsilon(delta))


def _rdp(history: tuple[Steps, ...], delta: float) -> float:
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    spent = sum(count * _rdp_of_a_step(noise, rate) for noise, rate, count in history)
    with _quiet():
        return float(get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=spent, delta=delta)[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Where little is spent, RDP's grid of orders ends too early; ε is then slightly larger than necessary."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the largest alpha")
        yield


@lru_cache(maxsize=4096)
def _rdp_of_a_step(noise: float, rate: float) -> NDArray[np.float64]:
    """RDP of one step at the accountant's orders: Opacus takes a while for it."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    return np.asarray(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders))


def _gdp(history: tuple[Steps, ...], delta: float) -> float:
    """Gaussian DP composes as μ = √(Σ μ_i²); Opacus' accountant has steps of one kind alone."""
    from opacus.accountants.analysis.gdp import compute_mu_poisson, delta_eps_mu, eps_from_mu

    with np.errstate(over="ignore", divide="ignore"):  # of a tiny noise, which is found out below
        parts = [compute_mu_poisson(steps=c, noise_multiplier=n, sample_rate=r) for n, r, c in history]
        mu = math.hypot(*parts)
        if not delta_eps_mu(eps=500, mu=mu) < delta:
            return math.inf  # beyond what eps_from_mu looks for
        if mu == 0 or delta_eps_mu(eps=0, mu=mu) <= delta:
            return 0.0  # below it
    return float(eps_from_mu(mu=mu, delta=delta))
