"""What private training has spent: accounted steps, the guarantee they give, and the noise that a target allows."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cwrf.mechanism.spent import PrivacySpent as PrivacySpent

if TYPE_CHECKING:
    from opacus.accountants import IAccountant

ACCOUNTANTS = ("prv", "rdp", "gdp")
_KEPT = ("noise_multiplier", "sampling_seed", "noise_state", "layout")


class Ledger:
    """The privacy accounting across fits: the accounted steps, the noise multiplier, and the random state.

    ``from_scratch``: the weights had seen no private data before the first step; ``earlier``: what they spent before.
    """

    def __init__(self, mechanism: str, *, from_scratch: bool = False, earlier: Ledger | None = None) -> None:
        from opacus.accountants import create_accountant

        self.from_scratch = from_scratch
        if earlier is not None:
            self._check_origin(earlier.steps, earlier.from_scratch)
        self.accountant: IAccountant = create_accountant(mechanism)
        self.noise_multiplier: float | None = None
        self.sampling_seed: int | None = None
        self.noise_state: Tensor | None = None
        self.layout: dict[str, int] | None = None
        if earlier is not None:
            self.accountant.history = list(earlier.accountant.history)

    def _check_origin(self, steps: int, from_scratch: bool) -> None:
        if self.from_scratch and steps and not from_scratch:
            raise MisconfigurationException(
                f"from_scratch=True says that the start weights have seen no private data, but the first {steps} steps "
                "of DP-SGD were taken without it. Leave it out: ε covers the fine-tuning phase alone."
            )

    @property
    def steps(self) -> int:
        return sum(count for _, _, count in self.accountant.history)

    def epsilon(self, delta: float, ahead: tuple[float | None, float, int] | None = None) -> float:
        """ε at δ of the steps so far, and of ``ahead`` = (noise multiplier, sample rate, number) further ones."""
        accountant = copy.deepcopy(self.accountant)
        if ahead is not None:
            accountant.history.append(ahead)
        if any(noise == 0 for noise, _, _ in accountant.history):
            return math.inf
        with warnings.catch_warnings():
            # Where little is spent, RDP's grid of orders ends too early; ε is then slightly larger than necessary.
            warnings.filterwarnings("ignore", "Optimal order is the largest alpha")
            return float(accountant.get_epsilon(delta)) if accountant.history else 0.0

    def noise_for(self, target: float, delta: float, sample_rate: float, steps: int) -> float:
        """The smallest noise multiplier, to 1 % of ε, for which the steps so far and ``steps`` more stay within ε."""

        def end(noise: float) -> float:
            return self.epsilon(delta, (noise, sample_rate, steps))

        low, high = 0.0, 1.0
        spent = end(high)
        while spent > target:
            low, high = high, 2 * high
            if high > 1e6:
                raise MisconfigurationException(
                    f"no noise keeps {steps} steps within target_epsilon={target:g} at target_delta={delta:g}"
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
            setattr(self, name, state[name])
