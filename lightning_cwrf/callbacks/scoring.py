"""Scoring the weights of a finished model at the start of its hardening."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from tqdm.auto import tqdm

from lightning_cwrf.callbacks.common import OncePerModule, training_data
from lightning_cwrf.checks import check_integer
from lightning_cwrf.data import Batches, all_ids, isolated_rng
from lightning_cwrf.scores import (
    check_scoring,
    learnability_scores,
    privacy_vulnerability_scores,
    trainable_parameters,
)
from lightning_cwrf.seen import record_seen
from lightning_cwrf.transfer import transfer_of
from lightning_cwrf.vanilla import VanillaSource, load_vanilla, save_vanilla


class PrivacyScoringCallback(OncePerModule):
    """Scores every weight's privacy vulnerability when training starts (CWRF, Algorithm 1, lines 1-10).

    The scores are in :attr:`scores` afterwards, and the vanilla weights in :attr:`vanilla_weights` until the fit ends;
    :class:`CriticalRewindCallback` takes both from there. The model itself is not changed.

    Args:
        nonmembers: reference data D_re the model never saw, disjoint from test data: a loader or a dataset.
        vanilla: θ_vn: a path, a state dict, an untrained module, a factory, or ``"redraw"``
            (:func:`~lightning_cwrf.vanilla.load_vanilla`).
        lam: λ of Eq. 4. Published: 0.7 (CIFAR-10, CINIC-10), 0.9 (CIFAR-100).
        steps: T, the number of batches. Published: 30.
        lr: η_e, the rate of the steps on the copy.
        members: training data; None: the trainer's own.
        kind: ``"privacy"`` (Eq. 4); ``"learnability"`` (Eq. 2 on the members' loss alone) or ``"random"`` are controls:
            they tell what the choice of weights adds.
        batch_size: examples in a batch of members, and in one of reference data. Published: 256. Ready batches, of an
            iterable or of a batch sampler of your own, are taken as they are.

    >>> callback = PrivacyScoringCallback(nonmembers=[], vanilla="redraw", lam=0.9)
    """

    def __init__(
        self,
        nonmembers: Batches,
        vanilla: VanillaSource,
        lam: float = 0.7,
        steps: int = 30,
        lr: float = 1e-3,
        members: Batches | None = None,
        kind: Literal["privacy", "learnability", "random"] = "privacy",
        batch_size: int = 256,
    ) -> None:
        if kind not in ("privacy", "learnability", "random"):
            raise ValueError(f"kind must be 'privacy', 'learnability' or 'random', not {kind!r}.")
        self.kind = kind
        check_scoring(lam, steps, lr)
        check_integer("batch_size", batch_size, low=1)
        self.batch_size = batch_size
        self.nonmembers = nonmembers
        self.vanilla = vanilla
        self.lam = lam
        self.steps = steps
        self.lr = lr
        self.members = members
        self.reset()

    def reset(self) -> None:
        self.scores: dict[str, Tensor] | None = None
        self.vanilla_weights: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note on the module which reference data it has seen, for audits."""
        if self.kind == "privacy":
            record_seen(pl_module, "reference data of the scoring", all_ids(self.nonmembers) or ())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.scores is not None:
            return
        self.vanilla_weights = trainer.strategy.broadcast(load_vanilla(self.vanilla, pl_module))
        shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
        with tqdm(total=self.steps, desc="scoring weights", leave=False, disable=not shown) as bar:
            scores = self._score(trainer, pl_module, self.vanilla_weights, lambda _: bar.update())
        # Every rank scored by itself; the mask must be one and the same on all.
        self.scores = trainer.strategy.broadcast({name: score.cpu() for name, score in scores.items()})

    def _score(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        vanilla: dict[str, Tensor],
        on_step: Callable[[int], Any],
    ) -> dict[str, Tensor]:
        if self.kind == "random":
            with isolated_rng():
                return {name: torch.rand(p.shape) for name, p in trainable_parameters(pl_module).items()}
        members = self.members if self.members is not None else training_data(trainer, self)
        common: dict[str, Any] = {
            "steps": self.steps,
            "lr": self.lr,
            "transfer": transfer_of(trainer),
            "batch_size": self.batch_size,
        }
        with trainer.precision_plugin.forward_context():
            if self.kind == "learnability":
                return learnability_scores(pl_module, members, on_step=on_step, **common)
            return privacy_vulnerability_scores(
                pl_module, vanilla, members, self.nonmembers, lam=self.lam, on_step=on_step, **common
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.vanilla_weights = None

    def save_scores(self, path: str | PathLike[str]) -> None:
        """Save the scores as safetensors, for ``CriticalRewindCallback(scores=path)``."""
        if self.scores is None:
            raise RuntimeError("there are no scores yet: they come when training starts.")
        save_vanilla(self.scores, path)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scores is None else {"scores": self.scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores = state_dict["scores"]
