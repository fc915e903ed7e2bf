"""Scoring the weights of a finished model at the start of its hardening."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from tqdm.auto import tqdm

from lightning_cwrf.callbacks.common import RewindsWeights, saved_state
from lightning_cwrf.callbacks.loggers import log_settings
from lightning_cwrf.callbacks.reading import ReadsData, training_data
from lightning_cwrf.checks import check_choice, check_flag, check_integer
from lightning_cwrf.data import Batches, all_ids, isolated_rng
from lightning_cwrf.data.seen import SCORED, record_seen
from lightning_cwrf.trainers import Split, callbacks_of, transfer_of
from lightning_cwrf.weights.score_files import save_scores
from lightning_cwrf.weights.scores import check_scoring, learnability_scores, privacy_vulnerability_scores
from lightning_cwrf.weights.trained import check_trained
from lightning_cwrf.weights.vanilla import VanillaSource, check_source, identity, is_file, is_redraw, load_vanilla


class PrivacyScoringCallback(ReadsData):
    """Scores every weight's privacy vulnerability when training starts (CWRF, Algorithm 1, lines 1-10).

    The scores are in :attr:`scores` afterwards, and the vanilla weights in :attr:`vanilla_weights` until the fit ends;
    :class:`CriticalRewindCallback` reads both there. The model itself is not changed. Scores are computed in the
    precision of the weights, without autocast, whatever the Trainer's mixed precision is.

    Scores are as large as the weights: where a :class:`CriticalRewindCallback` makes a mask of them, they are dropped
    then, unless ``keep_scores`` is True, and checkpoints do not contain them. A resumed run does not score again.

    Args:
        nonmembers: reference data D_re that the model never saw, disjoint from test data: a loader, a dataset, the name
            of a split (``"val"``: the ``val_dataloader`` of the fit's DataModule, or of the module), or a DataModule,
            whose test split is read.
        vanilla: θ_vn: a path, a state dict, an untrained module, a factory, or ``"redraw"``
            (:func:`~lightning_cwrf.weights.vanilla.load_vanilla`).
        lam: λ of Eq. 4. Published: 0.7 (CIFAR-10, CINIC-10), 0.9 (CIFAR-100).
        steps: T, the number of batches. Published: 30.
        lr: η_e, the learning rate of the steps on the copy.
        members: training data, likewise. Default: the trainer's own.
        kind: ``"privacy"`` (Eq. 4); ``"learnability"`` (Eq. 2 on the members' loss alone) and ``"random"`` are controls
            that show what the choice of weights adds.
        batch_size: examples in a batch of members, and in one of reference data. Published: 256. Batches of an iterable
            or of your own batch sampler keep their size.
        mode: ``"eval"``; ``"train"``: the scores are of the model as it trains, with batch statistics and dropout, but
            without its Trainer. Layers in eval mode stay so. Random scores do not depend on it.
        keep_scores: keep the scores after a mask was made of them, for :meth:`save_scores`; 4 bytes per weight.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.

    >>> callback = PrivacyScoringCallback(nonmembers=[], vanilla="redraw", lam=0.9)
    """

    def __init__(
        self,
        nonmembers: Split | LightningDataModule | Batches,
        vanilla: VanillaSource,
        lam: float = 0.7,
        steps: int = 30,
        lr: float = 1e-3,
        members: Split | LightningDataModule | Batches | None = None,
        kind: Literal["privacy", "learnability", "random"] = "privacy",
        batch_size: int = 256,
        keep_scores: bool = False,
        mode: Literal["eval", "train"] = "eval",
    ) -> None:
        check_choice("kind", kind, ("privacy", "learnability", "random"))
        check_scoring(lam, steps, lr, mode)
        check_integer("batch_size", batch_size, low=1)
        check_flag("keep_scores", keep_scores)
        self.keep_scores = keep_scores
        self.batch_size = batch_size
        check_source(vanilla)
        self.take_data(nonmembers=nonmembers, members=members)
        self.kind = kind
        self.vanilla = vanilla
        self.lam = lam
        self.steps = steps
        self.lr = lr
        self.mode = mode
        self.reset()

    later: ClassVar[dict[str, Any]] = {"mode": "eval"}

    def reset(self) -> None:
        self.scores: dict[str, Tensor] | None = None
        self._vanilla_weights: Mapping[str, Tensor] | None = None
        self._read_vanilla: Callable[[], Mapping[str, Tensor]] | None = None
        self._rewinds = False

    @property
    def vanilla_weights(self) -> Mapping[str, Tensor] | None:
        """θ_vn from the scoring until the fit ends; those of a file are read when all ranks first ask."""
        if self._vanilla_weights is None and self._read_vanilla is not None:
            self._vanilla_weights = self._read_vanilla()
        return self._vanilla_weights

    def mask_made(self) -> None:
        """Drop the scores, which a mask was made of, unless they are to be kept."""
        if not self.keep_scores:
            self.scores = None

    def settings(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "lam": self.lam,
            "steps": self.steps,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "mode": self.mode,
            "vanilla": identity(self.vanilla),
        }

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().prepare(trainer, pl_module, stage)
        self._rewinds = bool(callbacks_of(trainer, RewindsWeights))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record on the module which reference data it has seen, for audits."""
        super().on_fit_start(trainer, pl_module)
        if self.kind == "privacy":
            record_seen(pl_module, SCORED, all_ids(self.nonmembers) or ())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.done_with is None and self.scores is None:
            self._do(trainer, pl_module)
        log_settings(trainer, "scoring", self.done_with or {})

    def _do(self, trainer: Trainer, pl_module: LightningModule) -> None:
        settings = self.settings()  # reads a file of vanilla weights: now, before the scores need the memory
        # A file is read again when the scores are dropped, which need the memory; drawn or built weights are kept.
        vanilla: Any = load_vanilla(self.vanilla, pl_module)
        self.check_model(trainer, pl_module, None if is_redraw(self.vanilla) else vanilla)
        if is_file(self.vanilla):
            vanilla = self.vanilla
        shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
        with tqdm(total=self.steps, desc="scoring weights", leave=False, disable=None if shown else True) as bar:
            scores = self._score(trainer, pl_module, vanilla, lambda _: bar.update())
        # Each rank has scored by itself, and the mask must be the same on all.
        self.scores = trainer.strategy.broadcast({name: score.cpu() for name, score in scores.items()})
        self._read_vanilla = functools.partial(_vanilla_weights, vanilla, trainer, pl_module)
        self.done_with = settings

    def _score(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        vanilla: VanillaSource,
        on_step: Callable[[int], Any],
    ) -> dict[str, Tensor]:
        members = self.members if self.members is not None else training_data(trainer, self)
        common: dict[str, Any] = {"transfer": transfer_of(trainer)}
        common.update(lr=self.lr, batch_size=self.batch_size)
        if self.kind == "random":
            # One step shows which parameters the loss reaches; only those count as weights.
            reached = learnability_scores(pl_module, members, steps=1, **common)
            with isolated_rng():
                return {name: torch.rand(score.shape, dtype=torch.float32) for name, score in reached.items()}
        common.update(steps=self.steps, on_step=on_step, mode=self.mode)
        if self.kind == "learnability":
            return learnability_scores(pl_module, members, **common)
        return privacy_vulnerability_scores(pl_module, vanilla, members, self.nonmembers, lam=self.lam, **common)

    def check_model(self, trainer: Trainer, pl_module: LightningModule, vanilla: Mapping[str, Tensor] | None) -> None:
        """Raise a ValueError where the model is untrained; ``vanilla`` is None if the weights were redrawn."""
        members = self.members if self.members is not None else training_data(trainer, self)
        check_trained(pl_module, members, vanilla, transfer=transfer_of(trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._vanilla_weights = self._read_vanilla = None

    def save_scores(self, path: str | PathLike[str]) -> None:
        """Save the scores as safetensors, for ``CriticalRewindCallback(scores=path)``."""
        if self.scores is None:
            raise RuntimeError(
                "there are no scores: they are computed when a first training starts, and dropped where a "
                "CriticalRewindCallback makes a mask of them. Pass PrivacyScoringCallback(keep_scores=True) in the run "
                "that scores; a resumed run does not score again."
            )
        save_scores(self.scores, path)

    @saved_state
    def state_dict(self) -> dict[str, Any]:
        if self.done_with is None and self.scores is None:
            return {}
        return {"settings": self.done_with} if self._rewinds else {"settings": self.done_with, "scores": self.scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores = state_dict.get("scores")
        # Checkpoints of early versions have no settings: nothing can be compared.
        self.done_with = state_dict.get("settings") or {}


def _vanilla_weights(vanilla: Any, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, Tensor]:
    """The weights, of a file read again."""
    weights = load_vanilla(vanilla, pl_module) if is_file(vanilla) else vanilla
    return cast(Mapping[str, Tensor], trainer.strategy.broadcast(weights))
