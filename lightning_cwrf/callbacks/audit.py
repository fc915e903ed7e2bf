"""Auditing a model during and after training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from os import PathLike
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cwrf.attacks import Attack, create_attacks
from lightning_cwrf.auditing import AuditResult, attack_scores, audit_outputs
from lightning_cwrf.auditing.audited import AuditedData
from lightning_cwrf.auditing.names import failure_note
from lightning_cwrf.auditing.run import unlike_shadows
from lightning_cwrf.auditing.saved import check_json_path
from lightning_cwrf.callbacks.common import averaging_in, saved_state
from lightning_cwrf.callbacks.coverage import check_coverage, undrawn
from lightning_cwrf.callbacks.exponential import ExponentialMechanismCallback
from lightning_cwrf.callbacks.loggers import log_figure
from lightning_cwrf.callbacks.reading import SavesResult, training_data
from lightning_cwrf.callbacks.rewind import CriticalRewindCallback
from lightning_cwrf.checks import check_choice, check_confidence, check_integer
from lightning_cwrf.data import Batches, Key, Overlap
from lightning_cwrf.data.overlap import OVERLAPS
from lightning_cwrf.report.plots import roc_figure
from lightning_cwrf.shadows import ShadowOutputs
from lightning_cwrf.trainers import Split, callbacks_of, transfer_of
from lightning_cwrf.weights.copies import weights_digest


class MIAAuditCallback(SavesResult):
    """Runs membership inference attacks on the model during training, and logs their results.

    The loss attack runs every few epochs; at the end also LiRA and RMIA where shadow models are given. Every value is
    logged as ``mia/<attack>/<metric>`` (``mia/lira/auroc``), those of the model itself as ``mia/<name>``
    (``mia/loss_gap``), and the bounds of their intervals beside them (``mia/lira/auroc_low``, ``mia/lira/auroc_high``).
    The ROCs of the last audit go to loggers that take figures: TensorBoard, MLflow, Weights & Biases. The last audit,
    with intervals and raw scores, is in :attr:`result`; the values of all audits are in :attr:`history`.

    The last audit is of the final weights. Where weights are averaged (``WeightAveraging``,
    ``StochasticWeightAveraging``) or otherwise changed after the last epoch, it runs when the fit ends, and its values
    go to the loggers alone.

    Args:
        nonmembers: examples that the model never saw: a loader or a dataset, read without augmentation; the name of a
            split (``"test"``: the ``test_dataloader`` of the fit's DataModule, or of the module); or a DataModule,
            whose test split is read.
        members: training examples, likewise. Default: those that the trainer's own loader can give in the batches that
            are used, in order.
        shadows: outputs of shadow models trained on members and non-members by the same recipe
            (:func:`~lightning_cwrf.shadows.train_shadows`).
        every_n_epochs: how often to run the loss attack; 0: only at the end.
        attacks: of the audit at the end, by name or from :func:`~lightning_cwrf.attacks.create_attack`. Default: the
            loss attack, LiRA and RMIA. For those that need inputs or augmented views, use
            :func:`~lightning_cwrf.auditing.audit` on the finished model.
        confidence: level of the intervals.
        key: gives the id of one example, as for :func:`~lightning_cwrf.auditing.audit`.
        overlap: what to do with non-members that are members, or reference data of the scoring or the defense:
            ``"error"``, ``"drop"`` or ``"allow"``, as for :func:`~lightning_cwrf.auditing.audit`.
        name: prefix of the logged values. Two audits in one Trainer need two names.
        save: a file for the last audit (:meth:`AuditResult.save`), for runs from YAML, and for strategies whose
            processes do not return :attr:`result` to the caller: ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook``.
        overwrite: replace a file of an earlier run; otherwise it is an error before the training.

    >>> callback = MIAAuditCallback(nonmembers=[], every_n_epochs=10)
    """

    several = ", or give each another name="
    why_lost = "the audit runs in processes that the strategy starts, which do not return its result"
    reads = "AuditResult.load"
    why_not_sharded = (
        "each process runs the model by itself here, which only all of them together can. Save a full checkpoint, load "
        "it on one device after the fit, and pass it to lightning_cwrf.audit"
    )

    def __init__(
        self,
        nonmembers: Split | LightningDataModule | Batches,
        members: Split | LightningDataModule | Batches | None = None,
        shadows: ShadowOutputs | None = None,
        every_n_epochs: int = 5,
        confidence: float = 0.95,
        attacks: Sequence[str | Attack] | None = None,
        key: Key | None = None,
        overlap: Overlap = "error",
        name: str = "mia",
        save: str | PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        check_integer("every_n_epochs", every_n_epochs, low=0)
        check_confidence(confidence)
        check_choice("overlap", overlap, OVERLAPS)
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a non-empty string, such as 'mia', not {name!r}.")
        if shadows is not None and not isinstance(shadows, ShadowOutputs):
            raise TypeError(f"shadows must be what train_shadows returns, not {type(shadows).__name__}.")
        if shadows is not None:
            shadows.check_inputs()
        if attacks is not None:
            _check_attacks(attacks)
        self.take_data(nonmembers=nonmembers, members=members)
        self.shadows = shadows
        self.attacks = attacks
        self.every_n_epochs = every_n_epochs
        self.confidence = confidence
        self.key = key
        self.overlap = overlap
        self.name = name
        self.take_file(None if save is None else check_json_path(save), overwrite)
        self.reset()

    @property
    def state_key(self) -> str:
        return type(self).__qualname__ if self.name == "mia" else self._generate_state_key(name=self.name)

    def reset(self) -> None:
        self.result: AuditResult | None = None
        self.history: list[dict[str, float]] = []
        self._final_step = -1
        self._expected = 0.0  # the share of the members that the planned training leaves out

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the attacks once before training, so that bad data is an error before any time is spent."""
        if self.members is None:
            self._expected = check_coverage(trainer)
        self._data(trainer, final=True).check(transfer_of(trainer))
        sides = self._sides(trainer, pl_module, final=True)
        attack_scores(**sides, shadows=self.shadows, attacks=self.attacks)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = is_last_epoch(trainer)
        due = self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if last and averaging_in(trainer):
            return  # these are not the final weights
        if not last and not due:
            return
        values = self._record(trainer, pl_module, final=last)
        for name, value in values.items():
            pl_module.log(f"{self.name}/{name}", value, on_step=False, on_epoch=True, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._final_step == trainer.global_step or averaging_in(trainer):
            return
        # Something else stopped the training: it is too late for self.log, but not for the loggers.
        self._record_late(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Audit again where the final weights are not those that were audited."""
        if stage != "fit" or trainer.interrupted or trainer.global_step == 0:
            return
        if self._final_step == trainer.global_step:
            if self.result is not None and self.result.weights == weights_digest(pl_module) != "":
                return
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
            **self._sides(trainer, pl_module, final=final),
            shadows=self.shadows if final else None,
            attacks=self.attacks if final else None,
            confidence=self.confidence,
            remarks=unlike_shadows(pl_module, self.shadows) if final else (),
            weights=weights_digest(pl_module),
        )
        if final:
            self._final_step = trainer.global_step
            if self.members is None and not callbacks_of(trainer, ExponentialMechanismCallback):  # it reads all
                self.result.remarks.extend(undrawn(trainer, self._expected))
            for rewind in callbacks_of(trainer, CriticalRewindCallback):
                self.result.remarks.extend(rewind.remarks())
            for remark in self.result.remarks:
                rank_zero_warn(remark)
        for name, why in self.result.failures.items():
            rank_zero_warn(failure_note(name, why))
        if final and self.save is not None and trainer.is_global_zero:
            self.result.save(self.save)
        values = self.result.values()
        self.history.append({"epoch": float(trainer.current_epoch), **values})
        if final:
            self._log_figures(trainer, self.result)
        return {**values, **self.result.bounds()}

    def _log_figures(self, trainer: Trainer, result: AuditResult) -> None:
        for attack in result.estimates:
            log_figure(
                trainer, f"{self.name}/roc/{attack}", functools.partial(roc_figure, {"this model": result}, attack)
            )

    def _data(self, trainer: Trainer, *, final: bool) -> AuditedData:
        members = self.members if self.members is not None else training_data(trainer, self)
        population = self.shadows.population if final and self.shadows is not None else None
        return AuditedData(members, self.nonmembers, population, self.key, self.overlap)

    def _sides(self, trainer: Trainer, pl_module: LightningModule, *, final: bool) -> dict[str, Any]:
        """The model's outputs on each side, and how to compare them."""
        with trainer.precision_plugin.forward_context():
            return self._data(trainer, final=final).outputs(pl_module, transfer_of(trainer))


def _check_attacks(attacks: Sequence[str | Attack]) -> None:
    for attack in create_attacks(attacks):
        beyond = sorted({"inputs", "views"}.intersection(attack.needs))
        if beyond:
            raise ValueError(
                f"the {attack.name} attack needs {' and '.join(beyond)}; run it with lightning_cwrf.audit on "
                "the finished model."
            )


def is_last_epoch(trainer: Trainer) -> bool:
    """Whether training ends after the current epoch."""
    reached_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    reached_epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    return trainer.should_stop or reached_steps or reached_epochs
