"""Choosing the critical weights and rewinding them."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_cwrf.callbacks.common import HoldsWeights, RewindsWeights, earlier, refuse_moved_weights, saved_state
from lightning_cwrf.callbacks.loggers import log_settings
from lightning_cwrf.callbacks.scoring import PrivacyScoringCallback
from lightning_cwrf.checks import check_choice, check_flag
from lightning_cwrf.files import digest
from lightning_cwrf.trainers import callbacks_of
from lightning_cwrf.weights.descent import trainable_parameters
from lightning_cwrf.weights.masks import WeightMask
from lightning_cwrf.weights.score_files import load_scores
from lightning_cwrf.weights.selection import check_rate
from lightning_cwrf.weights.vanilla import VanillaSource, check_source, identity, load_vanilla


class CriticalRewindCallback(RewindsWeights):
    """Rewinds the most vulnerable weights to their vanilla values when training starts (Eq. 5 and 6).

    The mask is in :attr:`mask` afterwards and in every checkpoint. A resumed run does not rewind again; with other
    settings it is an error. Rewinding does not hold the weights: put :class:`GradientMaskCallback` after it.

    Only parameters are rewound: BatchNorm's running statistics stay those of the finished model.

    Args:
        rate: r, the fraction of all weights to rewind. Published: searched in [0.01, 0.10].
        per_layer: take that fraction of each layer instead.
        scores: a file of scores, or a dict by parameter name. Default: those of the :class:`PrivacyScoringCallback`
            before this one.
        mask: a mask, or a file of one; then neither rate nor scores are used.
        vanilla: θ_vn. Default: that of the :class:`PrivacyScoringCallback` before this one.
        to: ``"vanilla"``, or ``"zero"`` to set the chosen weights to zero instead (ablation A1 of §4.4).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or scores and a mask together.

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
        check_rate(rate)
        check_flag("per_layer", per_layer)
        check_choice("to", to, ("vanilla", "zero"))
        if scores is not None and mask is not None:
            raise ValueError("pass scores or a mask, not both.")
        if scores is not None and not isinstance(scores, (str, PathLike, Mapping)):
            raise TypeError(f"scores must be a file or tensors by parameter name, not a {type(scores).__name__}.")
        for name, score in scores.items() if isinstance(scores, Mapping) else ():
            if not isinstance(score, Tensor):
                raise TypeError(f"the scores of {name!r} must be a tensor, not a {type(score).__name__}.")
        check_mask(mask)
        if vanilla is not None:
            check_source(vanilla)
        self.to = to
        self.rate = rate
        self.per_layer = per_layer
        self.scores = scores
        self.given_mask = mask
        self.vanilla = vanilla
        self.reset()

    def reset(self) -> None:
        self.mask: WeightMask | None = None

    def settings(self) -> dict[str, Any]:
        if self.given_mask is not None:
            chosen: dict[str, Any] = {"mask": mask_identity(self.given_mask)}
        else:
            chosen = {"rate": self.rate, "per_layer": self.per_layer, "scores": _scores_identity(self.scores)}
        vanilla = identity(self.vanilla) if self.vanilla is not None and self.to == "vanilla" else None
        return {**chosen, "to": self.to, "vanilla": vanilla}

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().prepare(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_moved_weights(trainer, self)
        if not callbacks_of(trainer, HoldsWeights):
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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.mask is None:
            _refuse_finetuning(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mask is None:
            self.mask = self._rewind(trainer, pl_module)
            self.done_with = self.settings()
        sizes = {"weights": self.mask.count, "of_weights": self.mask.total}
        log_settings(trainer, "rewind", {**(self.done_with or {}), **sizes})

    def _rewind(self, trainer: Trainer, pl_module: LightningModule) -> WeightMask:
        scoring = earlier(trainer, self, PrivacyScoringCallback, "scores")
        mask = self._choose(pl_module, scoring)
        if mask.count == 0 and self.rate > 0:
            rank_zero_warn(f"rate {self.rate} of {mask.total} weights is less than one: nothing is rewound.")
        mask.rewind_(pl_module, self._vanilla_weights(trainer, pl_module, scoring))
        return mask

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
            scores = load_scores(scores)
        if not isinstance(scores, Mapping):
            raise MisconfigurationException(
                "PrivacyScoringCallback has no scores: it scored for another mask, in a run that this one resumes. "
                "Load the finished weights (load_from_checkpoint) instead of resuming."
            )
        self._check_scores(pl_module, scores)
        if not any(bool(score.any()) for score in scores.values()):
            rank_zero_warn("all scores are 0: the weights to rewind are chosen by their order in the model alone.")
        mask = WeightMask.top(scores, self.rate, per_layer=self.per_layer)
        if self.scores is None and scoring is not None:
            scoring.mask_made()
        return mask

    def _check_scores(self, pl_module: LightningModule, scores: Mapping[str, Tensor]) -> None:
        weights = trainable_parameters(pl_module)
        odd = sorted(name for name in scores if name not in weights or scores[name].shape != weights[name].shape)
        if odd:
            raise ValueError(
                f"the scores are not of the model's trainable parameters: {', '.join(odd[:5])} are no such parameters, "
                "or have another shape."
            )
        lacking = sorted(set(weights) - set(scores))
        if lacking and self.scores is not None:  # the scoring has already warned of those that the loss does not reach
            rank_zero_warn(
                f"the scores lack {len(lacking)} of {len(weights)} trainable parameters ({', '.join(lacking[:5])}): "
                "those are neither rewound nor held, and do not count among the weights that the rate is of."
            )

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

    @saved_state
    def state_dict(self) -> dict[str, Any]:
        return {} if self.mask is None else {**self.mask.state_dict(), "settings": self.done_with}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        # A checkpoint of an early version has no settings; the rate follows from the mask, roughly.
        self.done_with = state.pop("settings", None) or {}
        self.mask = WeightMask.from_state_dict(state)
        chosen = self.given_mask is None and "rate" not in self.done_with
        if chosen and self.mask.count != round(self.rate * self.mask.total):
            self.done_with = {**self.done_with, "rate": round(self.mask.count / self.mask.total, 4)}


def check_mask(mask: Any) -> None:
    """Raise a TypeError unless ``mask`` is one, a file of one, or None."""
    if mask is not None and not isinstance(mask, (str, PathLike, WeightMask)):
        raise TypeError(f"mask must be a WeightMask or a file of one, not a {type(mask).__name__}.")


def mask_identity(mask: str | PathLike[str] | WeightMask) -> str | None:
    """A digest of a given mask, by which a resumed run compares it; None where its file is gone."""
    try:
        return digest((mask if isinstance(mask, WeightMask) else WeightMask.load(mask)).masks)
    except FileNotFoundError:
        return None


def _scores_identity(scores: str | PathLike[str] | Mapping[str, Tensor] | None) -> str | None:
    try:
        return None if scores is None else digest(scores if isinstance(scores, Mapping) else load_scores(scores))
    except FileNotFoundError:
        return None


def _refuse_finetuning(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise where a callback has frozen weights that it may train later: the mask would not cover them."""
    names = [type(other).__name__ for other in callbacks_of(trainer, BaseFinetuning)]
    frozen = sum(p.numel() for p in pl_module.parameters() if not p.requires_grad)
    if names and frozen:
        total = sum(p.numel() for p in pl_module.parameters())
        raise MisconfigurationException(
            f"{names[0]} has {frozen:,} of {total:,} weights frozen now and may train them later: they could be "
            f"neither scored nor rewound. Remove {names[0]} from the Trainer of this fit, so that all weights are "
            "trainable from the start; or, to leave those weights as they are, set their requires_grad to False."
        )
