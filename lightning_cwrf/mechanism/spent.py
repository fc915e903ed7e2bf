"""What private training has spent: the (ε, δ) guarantee of a result, and the exact accounting of Gaussian draws."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from lightning_cwrf.checks import check_choice, check_integer, check_number
from lightning_cwrf.metrics.functional import gaussian_epsilon, gaussian_mu

Adjacency: TypeAlias = Literal["add_remove", "replace_one"]
"""What neighbouring data sets differ in: one example that is there or not, or one that is exchanged."""

SHIFTS = {"add_remove": 1.0, "replace_one": 2.0}
"""By how many clipping norms C the sum of clipped gradients of neighbours differs at most."""

_LEDGER = "_gaussian_ledger"


@dataclass(frozen=True)
class PrivacySpent:
    """An (ε, δ) guarantee, and what it covers.

    Attributes:
        epsilon: ε.
        delta: δ.
        steps: how many noisy steps, or draws, were accounted for.
        accountant: how.
        from_scratch: whether the weights had seen no private data before.
        mechanism: what spent it: ``"DP-SGD"`` or ``"exponential mechanism"``.
        adjacency: ``"add_remove"``, as for DP-SGD, or ``"replace_one"``; ε of the two are not comparable.
        mu: μ of Gaussian DP, which is the whole guarantee; None where the accountant has none.
    """

    epsilon: float
    delta: float
    steps: int
    accountant: str
    from_scratch: bool
    mechanism: str = "DP-SGD"
    adjacency: Adjacency = "add_remove"
    mu: float | None = None

    @property
    def covers(self) -> str:
        """``"the whole training"``, or ``"the fine-tuning phase alone"``."""
        return "the whole training" if self.from_scratch else "the fine-tuning phase alone"

    def __str__(self) -> str:
        steps = "steps" if self.mechanism == "DP-SGD" else "draws"
        adjacency = "" if self.adjacency == "add_remove" else ", where neighbours differ by replacing one example"
        text = (
            f"{self.mechanism}: ε = {self.epsilon:.4g} at δ = {self.delta:g} after {self.steps} {steps} "
            f"({self.accountant} accountant){adjacency}. It covers {self.covers}"
        )
        return text + ("." if self.from_scratch else ": the weights it started from were not trained under it.")


class GaussianLedger:
    """The draws that a model's weights come from, over all fits; their composition is exact.

    A draw with the noise multiplier σ (the noise's standard deviation in units of the clipping norm C, where the sum of
    all examples is taken, as a step of DP-SGD at a sampling rate of 1) is s/σ-GDP, where s is 1 if a neighbour has one
    example more or less, and 2 if one is exchanged. Draws compose to ``μ = s √(Σ 1/σ²)`` (Dong, Roth & Su 2022,
    Corollary 2), also where each depends on those before.

    >>> ledger = GaussianLedger()
    >>> ledger.add(ledger.new_run(), noise_multiplier=2.0, draws=4)
    >>> ledger.draws, ledger.mu(), ledger.mu("replace_one")
    (4, 1.0, 2.0)
    """

    def __init__(self) -> None:
        self._runs: dict[str, tuple[float, int]] = {}
        self.weights: tuple[str, str] | None = None
        """Digests of the names and of the values of what the last draws wrote; None: not known."""

    @staticmethod
    def new_run() -> str:
        """An identity of a run, by which a ledger in memory and one from a checkpoint count it once."""
        return uuid.uuid4().hex

    def add(self, run: str, noise_multiplier: float, draws: int = 1) -> None:
        """Count draws of a run, which has one noise multiplier.

        Raises:
            TypeError: not numbers.
            ValueError: the run had another one; noise that is not above 0; less than one draw.
        """
        check_number("noise_multiplier", noise_multiplier, low=0, low_open=True)
        check_integer("draws", draws, low=1)
        known, done = self._runs.get(run, (noise_multiplier, 0))
        if known != noise_multiplier:
            raise ValueError(
                f"this run has the noise multiplier {known:g}, not {noise_multiplier:g}; make a new_run()."
            )
        self._runs[run] = (noise_multiplier, done + draws)

    @property
    def draws(self) -> int:
        return sum(count for _, count in self._runs.values())

    def mu(self, adjacency: Adjacency = "add_remove") -> float:
        """μ of all draws so far."""
        check_choice("adjacency", adjacency, SHIFTS)
        total = math.fsum(count / sigma**2 for sigma, count in self._runs.values())
        return SHIFTS[adjacency] * math.sqrt(total)

    @staticmethod
    def noise_for(mu: float, adjacency: Adjacency, draws: int) -> float:
        """The noise multiplier with which so many further draws, by themselves, are μ-GDP.

        >>> GaussianLedger().noise_for(0.5, "replace_one", 4)
        8.0
        """
        return SHIFTS[adjacency] * math.sqrt(draws) / mu

    def left(self, target_epsilon: float, delta: float, adjacency: Adjacency) -> float:
        """μ of the further draws with which all draws together end at (ε, δ).

        Raises:
            ValueError: nothing is left.
        """
        target, spent = gaussian_mu(target_epsilon, delta), self.mu(adjacency)
        if spent >= target * (1 - 1e-6):  # a budget that is spent is so up to rounding
            raise ValueError(
                f"the {self.draws} draws so far have spent ε = {gaussian_epsilon(spent, delta):.4g} at δ = {delta:g}, "
                f"and target_epsilon={target_epsilon:g} is for all draws of these weights together. Raise it, or start "
                "from the weights of before."
            )
        return math.sqrt((target - spent) * (target + spent))

    def spent(self, delta: float, adjacency: Adjacency = "add_remove") -> PrivacySpent:
        """The guarantee of all draws so far at δ."""
        mu = self.mu(adjacency)
        epsilon = gaussian_epsilon(mu, delta)
        return PrivacySpent(epsilon, delta, self.draws, "exact Gaussian", False, "exponential mechanism", adjacency, mu)

    def state_dict(self) -> dict[str, Any]:
        weights = None if self.weights is None else list(self.weights)
        return {"runs": {run: list(entry) for run, entry in self._runs.items()}, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add the draws of a checkpoint; those that are here already count once, and none is forgotten.

        Where the two say different things of one run, the smaller noise and the larger number of draws count.

        Raises:
            TypeError, ValueError: noise that is not above 0, or less than one draw.
        """
        written = state.get("weights")
        self.weights = self.weights if written is None else tuple(written)
        for run, (sigma, count) in state["runs"].items():
            check_number("noise_multiplier", sigma, low=0, low_open=True)
            check_integer("draws", count, low=1)
            known, done = self._runs.get(run, (math.inf, 0))
            self._runs[run] = (min(float(sigma), known), max(int(count), done))


def ledger_of(model: nn.Module, names: Sequence[str] | None = ()) -> GaussianLedger:
    """The ledger that a model object carries along, also into its copies; a new one where it had no draw.

    It holds the draws of the model's parts too, and those of a larger model that changed this part of it.

    Args:
        model: a classifier.
        names: of the parameters that draws change: the parts that have them get this ledger too. None: all parts.
    """
    found = _merged(model)
    every = dict(model.named_parameters(remove_duplicate=False))
    chosen = {id(every[name]) for name in (every if names is None else names)}
    for module in model.modules():
        if module is model or any(id(parameter) in chosen for parameter in module.parameters()):
            setattr(module, _LEDGER, found)
    return found


def draws_of(model: nn.Module) -> int:
    """How many draws a model object's weights come from."""
    return _merged(model).draws


def _merged(model: nn.Module) -> GaussianLedger:
    """The ledger of a model, with the draws of all its parts; the model's own object where it has one."""
    own: GaussianLedger | None = getattr(model, _LEDGER, None)
    found = GaussianLedger() if own is None else own
    for module in model.modules():
        other: GaussianLedger | None = getattr(module, _LEDGER, None)
        if other is not None and other is not found:
            found.load_state_dict({**other.state_dict(), "weights": None})
    return found


def large_delta(delta: float, examples: int) -> str:
    """A warning about a δ at which the guarantee says nothing about single examples; empty where δ is small enough."""
    if delta < 1 / examples:
        return ""
    return (
        f"target_delta={delta:g} is not below 1/n = {1 / examples:.2g} for {examples} training examples: such a "
        "guarantee allows giving away a whole example. Lower it."
    )
