"""Auditing a model while it trains and when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cwrf.attacks import Attack, create_attacks
from lightning_cwrf.audit import AuditResult, attack_scores, audit_outputs
from lightning_cwrf.callbacks.common import OncePerModule, training_data
from lightning_cwrf.callbacks.scoring import PrivacyScoringCallback
from lightning_cwrf.data import Batches, all_digests, isolated_rng
from lightning_cwrf.outputs import ModelOutputs, collect_outputs
from lightning_cwrf.shadows.train import ShadowSignals
from lightning_cwrf.transfer import transfer_of


class MIAAuditCallback(OncePerModule):
    """Runs membership inference attacks on the model in training, and logs what they find.

    The loss attack runs every few epochs; at the end also LiRA and RMIA where shadow models are given. Every value is
    logged as ``mia/<attack>/<metric>`` (``mia/lira/auroc``), the model's own as ``mia/<name>`` (``mia/loss_gap``). The
    last audit, with intervals and raw scores, is in :attr:`result`; the values of all audits are in :attr:`history`.

    Args:
        nonmembers: examples the model never saw: a loader or a dataset.
        members: training examples; None: the trainer's own, read in order. Where training data are augmented at random,
            pass them plain.
        shadows: signals of shadow models trained on members and non-members by the same recipe
            (:func:`~lightning_cwrf.shadows.train_shadows`).
        every_n_epochs: how often to run the loss attack; 0: only at the end.
        attacks: of the audit at the end, by name or from :func:`~lightning_cwrf.attacks.create_attack`; None: the loss
            attack, LiRA and RMIA. Those that need inputs or augmented views run by
            :func:`~lightning_cwrf.audit.audit`, on the finished model.
        confidence: of the intervals.

    >>> callback = MIAAuditCallback(nonmembers=[], every_n_epochs=10)
    """

    def __init__(
        self,
        nonmembers: Batches,
        members: Batches | None = None,
        shadows: ShadowSignals | None = None,
        every_n_epochs: int = 5,
        confidence: float = 0.95,
        attacks: Sequence[str | Attack] | None = None,
    ) -> None:
        if every_n_epochs < 0:
            raise ValueError(f"every_n_epochs must not be negative, not {every_n_epochs}.")
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence must lie between 0 and 1, not {confidence}.")
        self.nonmembers = nonmembers
        self.members = members
        if shadows is not None and not isinstance(shadows, ShadowSignals):
            raise TypeError(f"shadows must be what train_shadows returns, not {type(shadows).__name__}.")
        self.shadows = shadows
        if attacks is not None:
            for attack in create_attacks(attacks):
                beyond = sorted({"inputs", "views"}.intersection(attack.needs))
                if beyond:
                    raise ValueError(
                        f"the {attack.name} attack needs {' and '.join(beyond)}; run it by lightning_cwrf.audit.audit "
                        "on the finished model."
                    )
        self.attacks = attacks
        self.every_n_epochs = every_n_epochs
        self.confidence = confidence
        self.reset()

    def reset(self) -> None:
        self.result: AuditResult | None = None
        self.history: list[dict[str, float]] = []
        self._final_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the attacks once before training, so that bad data is an error before any time is spent."""
        members, nonmembers, population = self._outputs(trainer, pl_module, final=True)
        self._compare_with_reference(trainer, nonmembers)
        attack_scores(members, nonmembers, shadows=self.shadows, population=population, attacks=self.attacks)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = _is_last_epoch(trainer)
        due = self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if not last and not due:
            return
        values = self._record(trainer, pl_module, final=last)
        for name, value in values.items():
            pl_module.log(f"mia/{name}", value, on_step=False, on_epoch=True, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._final_step == trainer.global_step:
            return
        # Training was stopped from elsewhere: it is too late for self.log, not for the loggers.
        values = self._record(trainer, pl_module, final=True)
        for logger in trainer.loggers:
            logger.log_metrics({f"mia/{name}": value for name, value in values.items()}, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history} if self.history else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def _record(self, trainer: Trainer, pl_module: LightningModule, *, final: bool) -> dict[str, float]:
        members, nonmembers, population = self._outputs(trainer, pl_module, final=final)
        shadows = self.shadows if final else None
        self.result = audit_outputs(
            members,
            nonmembers,
            shadows=shadows,
            population=population,
            attacks=self.attacks if final else None,
            confidence=self.confidence,
        )
        if final:
            self._final_step = trainer.global_step
        for name, why in self.result.failures.items():
            rank_zero_warn(f"the {name} attack failed and is left out: {why}")
        values = self.result.values()
        self.history.append({"epoch": float(trainer.current_epoch), **values})
        return values

    def _compare_with_reference(self, trainer: Trainer, nonmembers: ModelOutputs) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks:
            if not isinstance(other, PrivacyScoringCallback):
                continue
            with isolated_rng():
                reference = all_digests(other.nonmembers) or set()
            common = len(reference.intersection(nonmembers.digests))
            if common:
                rank_zero_warn(
                    f"{common} of the audit's {len(nonmembers)} non-members are reference data of the scoring too; "
                    "reference data must be apart from what the model is tested on, or the audit flatters it."
                )

    def _outputs(
        self, trainer: Trainer, pl_module: LightningModule, *, final: bool
    ) -> tuple[ModelOutputs, ModelOutputs, ModelOutputs | None]:
        transfer = transfer_of(trainer)

        def outputs(data: Batches, name: str) -> ModelOutputs:
            with trainer.precision_plugin.forward_context():
                return collect_outputs(pl_module, data, name=name, transfer=transfer)

        members = self.members if self.members is not None else training_data(trainer, self)
        population = self.shadows.population if final and self.shadows is not None else None
        return (
            outputs(members, "members"),
            outputs(self.nonmembers, "nonmembers"),
            None if population is None else outputs(population, "population"),
        )


def _is_last_epoch(trainer: Trainer) -> bool:
    reached_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    reached_epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    return trainer.should_stop or reached_steps or reached_epochs
