"""Auditing a model while it trains and when it is done."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_cwrf.attacks import Attack, create_attacks
from lightning_cwrf.auditing import AuditResult, attack_scores, audit_outputs
from lightning_cwrf.auditing.audited import AuditedData
from lightning_cwrf.auditing.run import unlike_shadows
from lightning_cwrf.callbacks.common import OncePerModule, saved_state, training_data, unseen_share
from lightning_cwrf.checks import check_choice, check_confidence, check_integer
from lightning_cwrf.data import Batches, Key, Overlap
from lightning_cwrf.data.overlap import OVERLAPS
from lightning_cwrf.shadows import ShadowOutputs
from lightning_cwrf.trainers import transfer_of


class MIAAuditCallback(OncePerModule):
    """Runs membership inference attacks on the model in training, and logs what they find.

    The loss attack runs every few epochs; at the end also LiRA and RMIA where shadow models are given. Every value is
    logged as ``mia/<attack>/<metric>`` (``mia/lira/auroc``), the model's own as ``mia/<name>`` (``mia/loss_gap``). The
    last audit, with intervals and raw scores, is in :attr:`result`; the values of all audits are in :attr:`history`.

    The last audit is of the weights that the user is left with. Where weights are averaged (``WeightAveraging``,
    ``StochasticWeightAveraging``) or otherwise changed after the last epoch, it comes when the fit ends, and its values
    go to the loggers alone.

    Args:
        nonmembers: examples the model never saw: a loader or a dataset, read without augmentation.
        members: training examples, likewise; None: those that the trainer's own loader can give in the batches that
            are used, read in order.
        shadows: signals of shadow models trained on members and non-members by the same recipe
            (:func:`~lightning_cwrf.shadows.train_shadows`).
        every_n_epochs: how often to run the loss attack; 0: only at the end.
        attacks: of the audit at the end, by name or from :func:`~lightning_cwrf.attacks.create_attack`; None: the loss
            attack, LiRA and RMIA. Those that need inputs or augmented views run by
            :func:`~lightning_cwrf.auditing.audit`, on the finished model.
        confidence: of the intervals.
        key: gives the id of one example, as for :func:`~lightning_cwrf.auditing.audit`.
        overlap: what to do with non-members that are members, or reference data of the scoring or the defense:
            ``"error"``, ``"drop"`` or ``"allow"``, as for :func:`~lightning_cwrf.auditing.audit`.
        name: what values are logged under. Two audits in one Trainer need two names.

    >>> callback = MIAAuditCallback(nonmembers=[], every_n_epochs=10)
    """

    several = ", or give each another name="

    def __init__(
        self,
        nonmembers: Batches,
        members: Batches | None = None,
        shadows: ShadowOutputs | None = None,
        every_n_epochs: int = 5,
        confidence: float = 0.95,
        attacks: Sequence[str | Attack] | None = None,
        key: Key | None = None,
        overlap: Overlap = "error",
        name: str = "mia",
    ) -> None:
        check_integer("every_n_epochs", every_n_epochs, low=0)
        check_confidence(confidence)
        check_choice("overlap", overlap, OVERLAPS)
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a text, such as 'mia', not {name!r}.")
        if shadows is not None and not isinstance(shadows, ShadowOutputs):
            raise TypeError(f"shadows must be what train_shadows returns, not {type(shadows).__name__}.")
        if attacks is not None:
            _check_attacks(attacks)
        self.nonmembers = nonmembers
        self.members = members
        self.shadows = shadows
        self.attacks = attacks
        self.every_n_epochs = every_n_epochs
        self.confidence = confidence
        self.key = key
        self.overlap = overlap
        self.name = name
        self.reset()

    @property
    def state_key(self) -> str:
        return type(self).__qualname__ if self.name == "mia" else self._generate_state_key(name=self.name)

    def reset(self) -> None:
        self.result: AuditResult | None = None
        self.history: list[dict[str, float]] = []
        self._final_step = -1
        self._expected = 0.0  # the share of the members that the training was to leave out
        self._audited: bytes | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the attacks once before training, so that bad data is an error before any time is spent."""
        if self.members is None:
            self._check_coverage(trainer)
        self._data(trainer, final=True).check(transfer_of(trainer))
        given = self._given(trainer, pl_module, final=True)
        attack_scores(**given, shadows=self.shadows, attacks=self.attacks)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = _is_last_epoch(trainer)
        due = self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if last and _averages(trainer):
            return  # the weights of this moment are not those that are left
        if not last and not due:
            return
        values = self._record(trainer, pl_module, final=last)
        for name, value in values.items():
            pl_module.log(f"{self.name}/{name}", value, on_step=False, on_epoch=True, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._final_step == trainer.global_step or _averages(trainer):
            return
        # Training was stopped from elsewhere: it is too late for self.log, not for the loggers.
        self._record_late(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Audit once more where other weights are left than those that were audited."""
        if stage != "fit" or trainer.interrupted or trainer.global_step == 0:
            return
        if self._final_step == trainer.global_step and self._audited == weights_digest(pl_module):
            return
        if self._final_step == trainer.global_step:
            self.history.pop()
        device = pl_module.device
        pl_module.to(trainer.strategy.root_device)  # the strategy has moved it away
        self._record_late(trainer, pl_module)
        pl_module.to(device)

    @saved_state
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history} if self.history else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def _record_late(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = self._record(trainer, pl_module, final=True)
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.name}/{n}": value for n, value in values.items()}, step=trainer.global_step)

    def _record(self, trainer: Trainer, pl_module: LightningModule, *, final: bool) -> dict[str, float]:
        self.result = audit_outputs(
            **self._given(trainer, pl_module, final=final),
            shadows=self.shadows if final else None,
            attacks=self.attacks if final else None,
            confidence=self.confidence,
            remarks=unlike_shadows(pl_module, self.shadows) if final else (),
        )
        if final:
            self._final_step = trainer.global_step
            self._audited = weights_digest(pl_module)
            self.result.remarks.extend(self._left_out(trainer))
            for remark in self.result.remarks:
                rank_zero_warn(remark)
        for name, why in self.result.failures.items():
            rank_zero_warn(f"the {name} attack failed and is left out: {why}")
        values = self.result.values()
        self.history.append({"epoch": float(trainer.current_epoch), **values})
        return values

    def _check_coverage(self, trainer: Trainer) -> None:
        """Members that the training never draws would make any attack look weak."""
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            rank_zero_warn(
                "the training loader is made anew every "
                f"{trainer.reload_dataloaders_every_n_epochs} epochs, and the members are "  # type: ignore[attr-defined]
                "those that the one in use at the audit can give. If an earlier one gives others, pass "
                "MIAAuditCallback(members=...)."
            )
        self._expected = unseen = unseen_share(trainer)
        if unseen <= 0.01:
            return
        said = (
            f"the training leaves out about {unseen:.0%} of the examples that its loader can give "
            "(limit_train_batches, a sampler that draws at random, or drop_last), and which ones cannot be known: "
            "taken for members, they make attacks look weak"
        )
        if unseen > 0.1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"{said}. Train on a Subset in place of a limit, or pass MIAAuditCallback(members=...)."
            )
        rank_zero_warn(f"{said}. Pass MIAAuditCallback(members=...).")

    def _left_out(self, trainer: Trainer) -> list[str]:
        """A remark where the training ended before it had drawn what it was to draw."""
        unseen = 0.0 if self.members is not None else unseen_share(trainer, so_far=True)
        if unseen <= max(0.01, self._expected + 0.001):
            return []
        return [
            f"the training ended before it had drawn about {unseen:.0%} of the examples that its loader can give, and "
            "which ones cannot be known: taken for members, they make attacks look weak. Pass "
            "MIAAuditCallback(members=...), or train longer."
        ]

    def _data(self, trainer: Trainer, *, final: bool) -> AuditedData:
        members = self.members if self.members is not None else training_data(trainer, self)
        population = self.shadows.population if final and self.shadows is not None else None
        return AuditedData(members, self.nonmembers, population, self.key, self.overlap)

    def _given(self, trainer: Trainer, pl_module: LightningModule, *, final: bool) -> dict[str, Any]:
        """The outputs on each side, and how they are compared."""
        with trainer.precision_plugin.forward_context():
            return self._data(trainer, final=final).outputs(pl_module, transfer_of(trainer))


def weights_digest(module: nn.Module) -> bytes:
    """A digest of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for value in module.state_dict().values():
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _check_attacks(attacks: Sequence[str | Attack]) -> None:
    for attack in create_attacks(attacks):
        beyond = sorted({"inputs", "views"}.intersection(attack.needs))
        if beyond:
            raise ValueError(
                f"the {attack.name} attack needs {' and '.join(beyond)}; run it by lightning_cwrf.auditing.audit "
                "on the finished model."
            )


def _averages(trainer: Trainer) -> bool:
    """Whether a callback puts averaged weights in the place of the last ones when the training ends."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(other, (StochasticWeightAveraging, WeightAveraging)) for other in callbacks)


def _is_last_epoch(trainer: Trainer) -> bool:
    reached_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    reached_epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    return trainer.should_stop or reached_steps or reached_epochs
