"""CWRF's settings, as shadow models are hardened by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning.pytorch import Callback
from torch import Tensor

from lightning_cwrf.callbacks import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback
from lightning_cwrf.checks import check_choice, check_integer
from lightning_cwrf.data import Batches


@dataclass(frozen=True)
class CWRF:
    """How shadow models are hardened: settings of the three CWRF callbacks, by their names there.

    Args:
        nonmembers: reference data, as for :class:`~lightning_cwrf.PrivacyScoringCallback`.
        vanilla: ``"own"``: each shadow model's initial weights, from before its training; ``"redraw"``: drawn anew, as
            by ``PrivacyScoringCallback(vanilla="redraw")``.
        members: what each shadow model is scored on: ``"training"``: the batches of its training, augmented where the
            training is; ``"plain"``: its own members as the pool gives them, as where the audited model's
            PrivacyScoringCallback was given its plain training data as ``members=``.

    >>> CWRF(nonmembers=[], rate=0.05).rate
    0.05
    """

    nonmembers: Batches = field(repr=False)
    rate: float = 0.03
    lam: float = 0.7
    steps: int = 30
    lr: float = 1e-3
    kind: Literal["privacy", "learnability", "random"] = "privacy"
    per_layer: bool = False
    to: Literal["vanilla", "zero"] = "vanilla"
    tune: Literal["rest", "masked"] = "rest"
    batch_size: int = 256
    vanilla: Literal["own", "redraw"] = "own"
    members: Literal["training", "plain"] = "training"

    def __post_init__(self) -> None:
        check_choice("vanilla", self.vanilla, ("own", "redraw"))
        check_choice("members", self.members, ("training", "plain"))
        check_integer("batch_size", self.batch_size, low=1)
        self.callbacks({})  # they check their settings

    def callbacks(self, vanilla: Mapping[str, Tensor], members: Batches | None = None) -> list[Callback]:
        """The callbacks of one hardening; ``vanilla`` is θ_vn, ``members`` what to score on (None: the training's)."""
        names = ("lam", "steps", "lr", "kind", "batch_size")
        settings = {name: getattr(self, name) for name in names}
        return [
            PrivacyScoringCallback(self.nonmembers, dict(vanilla), members=members, **settings),
            CriticalRewindCallback(self.rate, per_layer=self.per_layer, to=self.to),
            GradientMaskCallback(tune=self.tune),
        ]
