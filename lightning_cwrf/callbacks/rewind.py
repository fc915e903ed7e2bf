"""Choosing the critical weights and rewinding them."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors.torch import load_file
from torch import Tensor

from lightning_cwrf.callbacks.common import OncePerModule, earlier, refuse_averaging
from lightning_cwrf.callbacks.scoring import PrivacyScoringCallback
from lightning_cwrf.masks import WeightMask
from lightning_cwrf.scores import trainable_parameters
from lightning_cwrf.vanilla import VanillaSource, load_vanilla


class CriticalRewindCallback(OncePerModule):
    """Rewinds the most vulnerable weights to their vanilla values when training starts (Eq. 5 and 6).

    The mask is in :attr:`mask` afterwards and in every checkpoint; a resumed run does not rewind again. Rewinding
    alone does not hold the weights: put :class:`GradientMaskCallback` after it.

    Args:
        rate: r, the fraction of all weights to rewind. Published: searched in [0.01, 0.10].
        per_layer: take that fraction of each layer instead.
        scores: a file of scores, or a dict by parameter name; None: from the :class:`PrivacyScoringCallback` before.
        mask: a mask, or a file of one; then neither rate nor scores are used.
        vanilla: θ_vn; None: from the :class:`PrivacyScoringCallback` before.
        to: ``"vanilla"``, or ``"zero"`` to remove the chosen weights instead (ablation A1 of §4.4).

    >>> CriticalRewindCallback(rate=0.03).rate
    0.03
    """

    def __init__(
        self,
        rate: float = 0.03,
        per_layer: bool = False,
        scores: str | PathLike[str] | Mapping[str, Tensor] | None = None,
        mask: str | PathLike[str] | WeightMask | None = None,
        vanilla: VanillaSource | None = None,
        to: Literal["vanilla", "zero"] = "vanilla",
    ) -> None:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate must lie in [0, 1], not {rate}: it is the fraction of weights to rewind.")
        if scores is not None and mask is not None:
            raise ValueError("pass scores or a mask, not both.")
        if to not in ("vanilla", "zero"):
            raise ValueError(f"to must be 'vanilla' or 'zero', not {to!r}.")
        self.to = to
        self.rate = rate
        self.per_layer = per_layer
        self.scores = scores
        self.given_mask = mask
        self.vanilla = vanilla
        self.reset()

    def reset(self) -> None:
        self.mask: WeightMask | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_averaging(trainer, self)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(type(other).__name__ == "GradientMaskCallback" for other in callbacks):
            rank_zero_warn("nothing holds the rewound weights: put GradientMaskCallback after CriticalRewindCallback.")
        scoring = earlier(trainer, self, PrivacyScoringCallback, "scores")
        if scoring is None and self.vanilla is None and self.to == "vanilla":
            raise MisconfigurationException(
                "CriticalRewindCallback needs vanilla weights: put PrivacyScoringCallback before it, "
                "or pass vanilla=..."
            )
        if scoring is None and self.scores is None and self.given_mask is None:
            raise MisconfigurationException(
                "CriticalRewindCallback needs scores: put PrivacyScoringCallback before it, or pass scores= or mask=."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mask is not None:
            return
        scoring = earlier(trainer, self, PrivacyScoringCallback, "scores")
        mask = self._choose(pl_module, scoring)
        if mask.count == 0 and self.rate > 0:
            rank_zero_warn(f"rate {self.rate} of {mask.total} weights is less than one: nothing is rewound.")
        mask.rewind_(pl_module, self._vanilla_weights(trainer, pl_module, scoring))
        self.mask = mask

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mask is None:
            rank_zero_warn(
                "the fit ended without a training step: nothing was scored or rewound, the model is as it was. A "
                "checkpoint passed as ckpt_path brings its epoch along; load the finished weights instead "
                "(load_from_checkpoint)."
            )

    def _choose(self, pl_module: LightningModule, scoring: PrivacyScoringCallback | None) -> WeightMask:
        if self.given_mask is not None:
            return self.given_mask if isinstance(self.given_mask, WeightMask) else WeightMask.load(self.given_mask)
        scores = self.scores if self.scores is not None or scoring is None else scoring.scores
        if isinstance(scores, (str, PathLike)):
            scores = load_file(Path(scores))
        if not isinstance(scores, Mapping):
            raise MisconfigurationException("PrivacyScoringCallback has no scores; is it in this Trainer's callbacks?")
        weights = trainable_parameters(pl_module)
        if set(scores) != set(weights):
            odd = sorted(set(scores) ^ set(weights))
            raise ValueError(
                f"the scores are not of the model's trainable parameters: {', '.join(odd[:5])} stand on one side only."
            )
        return WeightMask.top(scores, self.rate, per_layer=self.per_layer)

    def _vanilla_weights(
        self, trainer: Trainer, pl_module: LightningModule, scoring: PrivacyScoringCallback | None
    ) -> Mapping[str, Tensor]:
        if self.to == "zero":
            return {name: torch.zeros_like(p) for name, p in pl_module.named_parameters()}
        if self.vanilla is None and scoring is not None and scoring.vanilla_weights is not None:
            return scoring.vanilla_weights
        source = self.vanilla if self.vanilla is not None or scoring is None else scoring.vanilla
        if source is None:
            raise MisconfigurationException("CriticalRewindCallback needs vanilla weights: pass vanilla=...")
        weights: Mapping[str, Tensor] = trainer.strategy.broadcast(load_vanilla(source, pl_module))
        return weights

    def state_dict(self) -> dict[str, Any]:
        return {} if self.mask is None else self.mask.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mask = WeightMask.from_state_dict(state_dict)
        if self.given_mask is None and self.mask.count != round(self.rate * self.mask.total):
            rank_zero_warn(
                f"the checkpoint's mask has {self.mask.count} of {self.mask.total} weights and is kept; "
                f"rate={self.rate} would choose another number. To rewind anew, load the finished weights instead of "
                "resuming."
            )
