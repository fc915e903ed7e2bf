"""Choosing the critical weights and rewinding them."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_cwrf._deprecated import renamed
from lightning_cwrf.callbacks.common import HoldsWeights, RewindsWeights, earlier, refuse_moved_weights, saved_state
from lightning_cwrf.callbacks.loggers import log_settings
from lightning_cwrf.callbacks.reading import training_data
from lightning_cwrf.callbacks.rewind_settings import (
    OLD_WORDS,
    check_mask,
    check_rewinding,
    mask_identity,
    scores_identity,
    warn_of_few,
)
from lightning_cwrf.callbacks.scoring import PrivacyScoringCallback
from lightning_cwrf.trainers import callbacks_of, transfer_of
from lightning_cwrf.weights.batchnorm import estimated_statistics, reset_statistics, tracking_layers
from lightning_cwrf.weights.descent import trainable_parameters
from lightning_cwrf.weights.masks import WeightMask
from lightning_cwrf.weights.redraw import fresh_weights
from lightning_cwrf.weights.score_files import load_scores
from lightning_cwrf.weights.selection import check_choosing, how_rewound
from lightning_cwrf.weights.units import units_of
from lightning_cwrf.weights.vanilla import VanillaSource, check_source, identity, load_vanilla


@renamed(OLD_WORDS, to="values")
class CriticalRewindCallback(RewindsWeights):
    """Rewinds the most vulnerable weights to their vanilla values when training starts (Eq. 5 and 6).

    The mask is in :attr:`mask` afterwards and in every checkpoint. A resumed run does not rewind again; with other
    settings it is an error. The weights are held by :class:`GradientMaskCallback`, which must come after it, unless
    ``hold`` is False.

    Args:
        rate: r, the fraction of all weights to rewind. Published: searched in [0.01, 0.10].
        per_layer: take that fraction of each layer instead.
        structured: take whole units by their mean scores, and at most that fraction: a channel's kernel or a neuron's
            row with its bias, or the pair of a normalisation; with ``"heads"`` also a head (:meth:`WeightMask.top`).
        scores: a file of scores, or a dict by parameter name. Default: those of the :class:`PrivacyScoringCallback`
            before this one.
        mask: a mask, or a file of one; then neither rate nor scores are used.
        vanilla: θ_vn. Default: that of the :class:`PrivacyScoringCallback` before this one.
        values: what the chosen weights are set to: ``"initial"``, their values in θ_vn; ``"fresh"``, another draw of
            the model's initialisation (:func:`~lightning_cwrf.weights.redraw.fresh_weights`); ``"zero"`` (ablation A1
            of §4.4); ``"trained"``, the values that they have: held, and not rewound (a control).
        hold: whether they are held afterwards. False: they are rewound and then trained on like all others (a control).
        batchnorm: BatchNorm's running statistics after the rewind: ``"keep"`` those of the finished model; ``"reset"``
            them; or ``"estimate"`` them in one pass over the training data
            (:func:`~lightning_cwrf.weights.batchnorm.estimated_statistics`). Either is of layers in train mode.
        seed: of fresh values. Default: 0.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, scores and a mask together, or settings of which one would have no effect.

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
        values: Literal["initial", "fresh", "trained", "zero"] = "initial",
        hold: bool = True,
        batchnorm: Literal["keep", "reset", "estimate"] = "keep",
        seed: int | None = None,
        structured: bool | Literal["heads"] = False,
    ) -> None:
        check_choosing(rate, per_layer, structured)
        check_rewinding(values, hold, batchnorm, seed, vanilla)
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
        self.values = values
        self.hold = hold
        self.batchnorm = batchnorm
        self.seed = seed
        self.rate = rate
        self.per_layer = per_layer
        self.structured = structured
        self.scores = scores
        self.given_mask = mask
        self.vanilla = vanilla
        self.reset()

    later: ClassVar[dict[str, Any]] = {"hold": True, "batchnorm": "keep", "structured": False}

    def reset(self) -> None:
        self.mask: WeightMask | None = None

    def settings(self) -> dict[str, Any]:
        if self.given_mask is not None:
            chosen: dict[str, Any] = {"mask": mask_identity(self.given_mask)}
        else:
            chosen = {"rate": self.rate, "per_layer": self.per_layer, "structured": self.structured}
            chosen["scores"] = scores_identity(self.scores)
        return {
            **chosen,
            "values": self.values,
            "hold": self.hold,
            "batchnorm": self.batchnorm,
            "seed": (self.seed or 0) if self.values == "fresh" else None,
            "vanilla": None if self.vanilla is None else identity(self.vanilla),
        }

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().prepare(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_moved_weights(trainer, self)
        scoring = earlier(trainer, self, PrivacyScoringCallback, "scores")
        if scoring is None and self.vanilla is None and self.values == "initial":
            raise MisconfigurationException(
                "CriticalRewindCallback needs vanilla weights: put PrivacyScoringCallback before it, "
                "or pass vanilla=..."
            )
        if scoring is None and self.scores is None and self.given_mask is None:
            raise MisconfigurationException(
                "CriticalRewindCallback needs scores: put PrivacyScoringCallback before it, or pass scores= or mask=."
            )
        self._check_holder(trainer)

    def _check_holder(self, trainer: Trainer) -> None:
        holders = callbacks_of(trainer, HoldsWeights)
        if self.hold and not holders:
            raise MisconfigurationException(
                "nothing would hold the rewound weights: put GradientMaskCallback after CriticalRewindCallback; or, to "
                "train them on, pass CriticalRewindCallback(hold=False)."
            )
        if holders and not self.hold:
            raise MisconfigurationException(
                f"CriticalRewindCallback(hold=False) trains the rewound weights on, and {type(holders[0]).__name__} "
                "holds weights: remove it, or leave hold at True."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.mask is None:
            _refuse_finetuning(trainer, pl_module)
            if self.given_mask is None:
                units_of(self.structured, pl_module, [])  # raises where there are no heads
            if self.batchnorm != "keep":
                tracking_layers(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mask is None:
            self.mask = self._rewind(trainer, pl_module)
            self.done_with = self.settings()
        sizes = {"weights": self.mask.count, "of_weights": self.mask.total}
        log_settings(trainer, "rewind", {**(self.done_with or {}), **sizes})

    def _rewind(self, trainer: Trainer, pl_module: LightningModule) -> WeightMask:
        scoring = earlier(trainer, self, PrivacyScoringCallback, "scores")
        mask = self._choose(pl_module, scoring)
        if self.given_mask is None:
            warn_of_few(mask, self.rate, self.structured)
        if self.values == "trained":
            mask.freeze(pl_module)
        else:
            mask.rewind_(pl_module, self._weights(trainer, pl_module, scoring))
        self._set_statistics(trainer, pl_module)
        return mask if self.hold else WeightMask(mask.masks)  # without values to hold

    def _set_statistics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """BatchNorm's running statistics, of the model with its rewound weights."""
        if self.batchnorm == "reset":
            reset_statistics(pl_module)
        elif self.batchnorm == "estimate":
            members = training_data(trainer, self)
            found = estimated_statistics(pl_module, members, transfer=transfer_of(trainer))
            own = dict(pl_module.named_buffers())
            for name, value in trainer.strategy.broadcast({n: v.cpu() for n, v in found.items()}).items():
                own[name].copy_(value)

    def remarks(self) -> list[str]:
        """What an audit of the model must say of a control."""
        if self.mask is None or self.mask.count == 0 or (self.hold and self.values != "trained"):
            return []
        return [f"{self.mask.count:,} of {self.mask.total:,} weights were {how_rewound(self.values, self.hold)}."]

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
        units = units_of(self.structured, pl_module, scores)
        mask = WeightMask.top(scores, self.rate, per_layer=self.per_layer, structured=units)
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

    def _weights(
        self, trainer: Trainer, pl_module: LightningModule, scoring: PrivacyScoringCallback | None
    ) -> Mapping[str, Tensor]:
        """What the chosen weights are set to, among the values of all."""
        if self.values == "zero":
            return {name: torch.zeros_like(p) for name, p in pl_module.named_parameters()}
        if self.values == "fresh":
            return fresh_weights(pl_module, self.seed or 0, None if scoring is None else scoring.vanilla_weights)
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
        self.done_with = dict(state.pop("settings", None) or {})
        if "to" in self.done_with:  # of the previous release
            to = self.done_with.pop("to")
            self.done_with["values"] = OLD_WORDS.get(to, to)
        self.mask = WeightMask.from_state_dict(state)
        chosen = self.given_mask is None and "rate" not in self.done_with
        if chosen and self.mask.count != round(self.rate * self.mask.total):
            self.done_with = {**self.done_with, "rate": round(self.mask.count / self.mask.total, 4)}


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
