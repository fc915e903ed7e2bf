"""Reconstructing training examples from the weights at the end of a training."""

from __future__ import annotations

from os import PathLike
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import SGD, Adam

from lightning_cwrf.auditing.audited import AuditedData
from lightning_cwrf.auditing.saved import check_json_path
from lightning_cwrf.callbacks.common import averaging_in
from lightning_cwrf.callbacks.coverage import check_coverage
from lightning_cwrf.callbacks.reading import SavesResult, training_data
from lightning_cwrf.checks import check_number
from lightning_cwrf.data import Batches
from lightning_cwrf.reconstruction import ReconstructionPrior, ReconstructionResult
from lightning_cwrf.reconstruction.audit import ReconstructionSettings, attacked, why_inhomogeneous
from lightning_cwrf.reconstruction.kkt import Equation
from lightning_cwrf.reconstruction.pool import ReconstructionData, reconstruction_data
from lightning_cwrf.trainers import Split, transfer_of
from lightning_cwrf.weights.copies import weights_digest


class ReconstructionAuditCallback(SavesResult):
    """Reconstructs training examples of a small ReLU network from its final weights, and counts them against chance.

    :func:`~lightning_cwrf.audit_reconstruction` at the end of a training. Data and network are checked before the first
    step. Every number is logged as ``reconstruction/<name>``, to the loggers alone; :attr:`result` has the rest.
    **A failed attack shows nothing about another prior.**

    The module, its buffers, modes and the random state are untouched. Where weights are averaged or otherwise changed
    after the training's end, the attack runs on the final ones when the fit ends. With several processes each runs the
    same attack.

    Args:
        nonmembers: at least as many examples as there are members, which the model never saw: a loader or a dataset,
            without augmentation; the name of a split; or a DataModule, whose test split is read.
        members: all training examples, likewise. Default: those that the trainer's own loader gives.
        prior: what the attacker knows of the inputs. Default: :class:`ReconstructionPrior` with its own defaults.
        candidates: for each member.
        steps: of the attack's Adam.
        lr: of the attack, in units of the input.
        sharpness: of the attack's gates, per unit of distance in the input.
        margin: a guess of the members' logit gaps.
        ratio: a reconstruction claims its nearest example if that is nearer than this share of the distance to the
            second nearest.
        restarts: runs of the attack, of which the one with the smallest residual counts.
        weight_decay: of the training, coupled as in SGD. None: read off the groups of a single optimizer, SGD or Adam.
            With 0, the network must be homogeneous in its weights.
        confidence: of the intervals and the finding.
        seed: of the attack.
        name: prefix of the logged values. Several audits in one Trainer, such as with several priors, need several
            names.
        save: a file for the result (:meth:`ReconstructionResult.save`), which holds the members' inputs; for runs from
            YAML, and for strategies whose processes do not return :attr:`result` to the caller.
        overwrite: replace a file of an earlier run; otherwise it is an error before the training.

    Raises:
        TypeError: data that are none of these, settings of the wrong type. When the fit starts: inputs that are not one
            float tensor.
        ValueError: a setting out of range. When the fit starts: fewer non-members than members, or members among them.
        MisconfigurationException: when the fit starts: a network that is not homogeneous without weight decay (which
            layer); weights that are sharded, or in no optimizer; an optimizer whose weight decay cannot be read.

    Warns:
        UserWarning: when the fit starts, what :func:`~lightning_cwrf.audit_reconstruction` warns of, and an optimizer
            whose stationary points are not those of SGD.

    >>> ReconstructionAuditCallback([], prior=ReconstructionPrior(scale=1.0)).candidates
    2.0
    """

    several = ", or give each another name="
    why_lost = "the attack runs in processes that the strategy starts, which do not return its result"
    reads = "ReconstructionResult.load"
    why_not_sharded = (
        "each process runs the model by itself here, which only all of them together can. Save a full checkpoint, load "
        "it on one device after the fit, and pass it to lightning_cwrf.audit_reconstruction"
    )

    def __init__(
        self,
        nonmembers: Split | LightningDataModule | Batches,
        members: Split | LightningDataModule | Batches | None = None,
        prior: ReconstructionPrior | None = None,
        candidates: float = 2.0,
        steps: int = 2000,
        lr: float = 0.02,
        sharpness: float = 30.0,
        margin: float = 5.0,
        ratio: float = 0.5,
        restarts: int = 1,
        weight_decay: float | None = None,
        confidence: float = 0.95,
        seed: int = 0,
        name: str = "reconstruction",
        save: str | PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.take_data(nonmembers=nonmembers, members=members)
        self.attack = ReconstructionSettings(
            ReconstructionPrior() if prior is None else prior,
            candidates=candidates,
            steps=steps,
            lr=lr,
            sharpness=sharpness,
            margin=margin,
            ratio=ratio,
            restarts=restarts,
            confidence=confidence,
            seed=seed,
        )
        if weight_decay is not None:
            check_number("weight_decay", weight_decay, low=0)
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a non-empty string, such as 'reconstruction', not {name!r}.")
        self.weight_decay = weight_decay
        self.name = name
        self.take_file(None if save is None else check_json_path(save), overwrite)
        self.reset()

    @property
    def candidates(self) -> float:
        """For each member."""
        return self.attack.candidates

    @property
    def state_key(self) -> str:
        return type(self).__qualname__ if self.name == "reconstruction" else self._generate_state_key(name=self.name)

    def reset(self) -> None:
        self.result: ReconstructionResult | None = None
        self._attacked = ""  # the digest of the weights
        self._of_optimizer: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check data and network, so that what is wrong is an error before any time is spent."""
        if self.members is None:
            check_coverage(trainer, type(self).__name__)
        data = reconstruction_data(pl_module, self._data(trainer), self.attack.prior, transfer_of(trainer))
        self.attack.count(data)
        decay = _weight_decay(trainer) if self.weight_decay is None else self.weight_decay
        if decay == 0 and data.degree.degree is None:
            raise MisconfigurationException(why_inhomogeneous(data.degree))
        _check_trained(trainer, pl_module, data)
        self._of_optimizer = _of_optimizers(trainer, decay)
        for remark in [*data.remarks, *self._of_optimizer]:
            rank_zero_warn(remark)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if averaging_in(trainer) is None:
            self._run(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attack again where the final weights are not those that were attacked."""
        if stage != "fit" or trainer.interrupted or trainer.global_step == 0:
            return
        if self.result is not None and self._attacked == weights_digest(pl_module) != "":
            return
        device = pl_module.device
        pl_module.to(trainer.strategy.root_device)  # the strategy has moved it away
        self._run(trainer, pl_module)
        pl_module.to(device)

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = reconstruction_data(pl_module, self._data(trainer), self.attack.prior, transfer_of(trainer))
        data.remarks.extend(self._of_optimizer)
        self.result = attacked(pl_module, data, self.attack)
        self._attacked = weights_digest(pl_module)
        values = {f"{self.name}/{name}": value for name, value in self.result.values().items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if self.save is not None and trainer.is_global_zero:
            self.result.save(self.save)

    def _data(self, trainer: Trainer) -> AuditedData:
        members: Any = self.members if self.members is not None else training_data(trainer, self)
        return AuditedData(members, self.nonmembers)


def _weight_decay(trainer: Trainer) -> float:
    """The coupled weight decay of the training."""
    fix = "Pass weight_decay=, the coefficient of the squared norm in the loss, times two."
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"the training has {len(trainer.optimizers)} optimizers, so its weight decay is not one number. {fix}"
        )
    (optimizer,) = _optimizers(trainer)
    found = {float(group["weight_decay"]) for group in optimizer.param_groups if "weight_decay" in group}
    if len(found) != 1 and found:
        raise MisconfigurationException(
            f"the groups of {type(optimizer).__name__} have different weight decays "
            f"({', '.join(f'{w:g}' for w in sorted(found))}), and the attack's equation has one. {fix}"
        )
    (decay,) = found or {0.0}
    return decay


def _of_optimizers(trainer: Trainer, decay: float) -> list[str]:
    """Remarks on optimizers whose stationary points are not those of SGD with this weight decay."""
    remarks = []
    for optimizer in _optimizers(trainer):
        decoupled = any(group.get("decoupled_weight_decay", False) for group in optimizer.param_groups)
        if isinstance(optimizer, SGD) or (isinstance(optimizer, Adam) and decay > 0 and not decoupled):
            continue
        how = " with a decoupled weight decay" if decoupled else " without weight decay" if decay == 0 else ""
        remarks.append(
            f"the attack's equation is that of SGD; a training by {type(optimizer).__name__}{how} ends elsewhere. That "
            "the attack finds nothing then shows even less."
        )
    return remarks


def _optimizers(trainer: Trainer) -> list[Any]:
    """The optimizers of the training, without what wraps them."""
    return [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]


def _check_trained(trainer: Trainer, pl_module: LightningModule, data: ReconstructionData) -> None:
    """Raise for weights that count as trained, by their ``requires_grad``, and are in no optimizer."""
    stepped = {id(p) for optimizer in _optimizers(trainer) for group in optimizer.param_groups for p in group["params"]}
    trained = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad]
    if all(id(p) in stepped for _, p in trained):
        return
    equation = Equation(pl_module)
    unused = equation.unused(data.inputs[:2].to(equation.device), data.targets[:2].to(equation.device))
    left = [name for (name, p), idle in zip(trained, unused, strict=True) if id(p) not in stepped and not idle]
    if left:
        listed = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        raise MisconfigurationException(
            f"no optimizer has the parameters {listed}, which require gradients: they count as trained, and the "
            "attack's equation does not hold for weights that are not. Freeze them with requires_grad_(False), or "
            "give them to the optimizer in configure_optimizers."
        )
