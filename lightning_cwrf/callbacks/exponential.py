"""Private fine-tuning by draws of the quadratic exponential mechanism, in the place of training steps."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_cwrf.callbacks.common import HoldsWeights, RewindsWeights, averaging_in, saved_state
from lightning_cwrf.callbacks.reading import ReadsData
from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.data import Batches
from lightning_cwrf.data.poisson import users_loader
from lightning_cwrf.mechanism.checks import check_parts, check_settings
from lightning_cwrf.mechanism.curvature import MOST_DIMENSIONS, public_curvature
from lightning_cwrf.mechanism.draw import exponential_mechanism
from lightning_cwrf.mechanism.parameters import Parameters, check_chosen
from lightning_cwrf.mechanism.private import PrivateExamples
from lightning_cwrf.mechanism.spent import Adjacency, PrivacySpent, draws_of, ledger_of
from lightning_cwrf.trainers import Split, callbacks_of, transfer_of


class ExponentialMechanismCallback(ReadsData):
    """Fine-tunes a pretrained classifier privately, by a few Gaussian draws with the curvature of public data.

    Before the first training step, the curvature of the model is computed on public data. Then each of T draws takes
    one pass over the whole training data in eval mode, adds the examples' whitened, clipped gradients of the
    cross-entropy, and draws new parameters around a damped Newton step
    (:func:`~lightning_cwrf.mechanism.quadratic_draw`). Then the fit ends: no training step runs, and neither the
    optimizer nor ``training_step`` is used.

    The draws are (ε, δ)-differentially private for the training data alone, exactly accounted
    (:attr:`privacy_spent`, in checkpoints too). **Tuning from weights that have seen these data does not make the
    result differentially private**: ε covers the fine-tuning phase alone. It assumes that nothing of the training data
    is in the public data, in how either is normalised, or in how settings were chosen.

    A resumed run takes no further draw. Another fit of the same module does, and they add up: with ``target_epsilon``,
    which is for all draws together, it is an error if nothing of it is left.

    After the idea of Tran et al. (2026, arXiv 2605.20521), of which only the abstract was at hand.

    Args:
        public: data of which nothing is private: a loader or a dataset, the name of a split, or a DataModule (its test
            split). Labels are not used.
        target_epsilon: ε of all draws of the module together, at ``target_delta``. Either this
        mu: or μ of Gaussian DP of this fit's draws together.
        target_delta: δ; below 1 / (number of training examples).
        draws: T, passes over the training data.
        eta: η, the share of a Newton step.
        damping: λ in mean eigenvalues of the curvature.
        clip: C, the largest norm of a whitened gradient; None: half the median on the public data.
        parameters: what is trained: ``"head"`` (the last ``nn.Linear``), ``"all"`` that is trainable, or names.
        subspace: train in this many random directions; None: in all, at most 4096.
        adjacency: ``"add_remove"``, as for DP-SGD, or ``"replace_one"``, with twice the noise at the same ε.
        seed: of the random directions and of what ``clip=None`` draws; not of the noise.
        noise_seed: for tests alone: makes the noise reproducible, and the guarantee hold only while it is secret. None:
            256 random bits of the operating system.

    Raises:
        TypeError: data that are none of these, or a setting of the wrong type.
        ValueError: a setting out of range. When the fit starts: an example that is in both data; a training loader that
            leaves examples out, draws them or holds one twice; training data that read differently each time; hooks
            that keep something of the examples on the module.
        MisconfigurationException: when the fit starts: more than one device, 16-mixed precision, a defense on the
            module, or callbacks that hold or average weights.

    >>> ExponentialMechanismCallback(public=[], target_epsilon=1.0).draws
    10
    """

    public: Any
    why_not_sharded = "the curvature and the draws are of whole weights. Use one device"

    def __init__(
        self,
        public: Split | LightningDataModule | Batches,
        target_epsilon: float | None = None,
        mu: float | None = None,
        target_delta: float = 1e-5,
        draws: int = 10,
        eta: float = 0.5,
        damping: float = 3e-3,
        clip: float | None = None,
        parameters: Parameters = "head",
        subspace: int | None = None,
        adjacency: Adjacency = "add_remove",
        seed: int = 0,
        noise_seed: int | None = None,
    ) -> None:
        check_settings(target_epsilon, mu, target_delta, draws, eta, adjacency)
        check_number("damping", damping, low=0, low_open=True)
        if clip is not None:
            check_number("clip", clip, low=0, low_open=True)
        if subspace is not None:
            check_integer("subspace", subspace, low=1, high=MOST_DIMENSIONS)
        check_chosen(parameters)
        check_integer("seed", seed)
        if noise_seed is not None:
            check_integer("noise_seed", noise_seed, low=0)
        self.take_data(public=public)
        self.target_epsilon = target_epsilon
        self.mu = mu
        self.target_delta = target_delta
        self.draws = draws
        self.eta = eta
        self.damping = damping
        self.clip = clip
        self.parameters = parameters
        self.subspace = subspace
        self.adjacency: Adjacency = adjacency
        self.seed = seed
        self.noise_seed = noise_seed  # not in settings(), which checkpoints show
        self.reset()

    @property
    def state_key(self) -> str:
        """The same for subclasses, so that each counts the draws of a checkpoint of another."""
        return "ExponentialMechanismCallback"

    def reset(self) -> None:
        self.privacy_spent: PrivacySpent | None = None
        """What all draws of the module have spent, also those of a fit that broke off; None before the first one."""
        self._resumed = False
        self._ended = False

    def settings(self) -> dict[str, Any]:
        names = ("target_epsilon", "mu", "target_delta", "draws", "eta", "damping", "clip", "subspace", "adjacency")
        chosen = self.parameters if isinstance(self.parameters, str) else list(self.parameters)
        return {**{name: getattr(self, name) for name in names}, "parameters": chosen, "seed": self.seed}

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().prepare(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._ended = False
        self._resumed = False  # a checkpoint may have been loaded for a test before; that of this fit comes later
        _check_trainer(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the draws, unless the checkpoint that this run resumes has them, and end the fit."""
        _refuse_defense(pl_module)  # DefenseCallback may come after this one
        try:
            if not self._resumed:
                self.done_with = None
                self._draw(trainer, pl_module)
                self.done_with = self.settings()
        finally:  # draws of a fit that breaks off count
            self._count(pl_module)
        self._ended = trainer.should_stop = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Raise: a training step is not private."""
        raise MisconfigurationException(
            "the Trainer was about to take a training step after the private draws, which would not be private: "
            "another callback or the module set trainer.should_stop back to False."
        )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was spent; raise where the fit ended before it could draw."""
        if not self._ended:
            raise MisconfigurationException(
                f"the fit ended before {type(self).__name__} could take a draw: the checkpoint that it resumed is of a "
                "finished training, or there are no training batches. Load the weights (load_from_checkpoint) and fit "
                "them without ckpt_path."
            )
        saved = any(each.best_model_path or each.last_model_path for each in trainer.checkpoint_callbacks)  # type: ignore[attr-defined]
        hint = "" if saved else " No epoch ended, so no checkpoint was saved: call trainer.save_checkpoint(path)."
        rank_zero_info(f"{self.privacy_spent}{hint}")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count the draws that the loaded weights come from, also where they are loaded for a test."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state:
            ledger_of(pl_module, None).load_state_dict(state["ledger"])
            self._count(pl_module)

    @saved_state
    def state_dict(self) -> dict[str, Any]:
        module = None if self._module is None else self._module()
        if module is None or (self.done_with is None and not draws_of(module)):
            return {}
        return {"settings": self.done_with, "ledger": ledger_of(module).state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done_with = state_dict["settings"]
        self._resumed = self.done_with is not None

    def _count(self, module: LightningModule) -> None:
        if draws_of(module):
            self.privacy_spent = ledger_of(module).spent(self.target_delta, self.adjacency)

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        private = _private_data(trainer)
        transfer = transfer_of(trainer)
        PrivateExamples(private)
        check_parts(private, self.public)
        curvature = public_curvature(
            module,
            self.public,
            parameters=self.parameters,
            damping=self.damping,
            clip=self.clip,
            subspace=self.subspace,
            seed=self.seed,
            transfer=transfer,
        )
        exponential_mechanism(
            module,
            private,
            curvature,
            target_epsilon=self.target_epsilon,
            mu=self.mu,
            target_delta=self.target_delta,
            draws=self.draws,
            eta=self.eta,
            adjacency=self.adjacency,
            transfer=transfer,
            noise_seed=self.noise_seed,
        )


def _check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """Raise a MisconfigurationException where the draws would be wrong, or undone."""
    name = ExponentialMechanismCallback.__name__
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy) or trainer.world_size > 1:
        raise MisconfigurationException(f"{name} works on one device, not with {type(strategy).__name__}.")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(f"{name} clips gradients of its own; use bf16-mixed or 32, not 16-mixed.")
    _refuse_defense(module)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        rank_zero_warn("under fast_dev_run the private draws are taken, and counted, as in any fit.")
    others = [averaging_in(trainer), *callbacks_of(trainer, HoldsWeights, RewindsWeights)]
    for other in others:
        if other is not None:
            raise MisconfigurationException(
                f"{name} writes all trained parameters at once, after which {type(other).__name__} would change or "
                "average them: use them in Trainers of their own."
            )
    limit, overfit = trainer.limit_train_batches, trainer.overfit_batches  # type: ignore[attr-defined]
    whole = isinstance(limit, float) and limit == 1.0 and not overfit  # 1 is one batch
    if not trainer.fast_dev_run and not whole:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            f"{name} takes every training example once for each draw; leave out limit_train_batches and "
            "overfit_batches, and train on a Subset."
        )
    if trainer.min_epochs or trainer.min_steps:
        raise MisconfigurationException(
            f"min_epochs and min_steps would make the Trainer take training steps, which are not private: {name} ends "
            "the fit by itself. Leave them out."
        )
    if trainer.max_epochs == 0 or trainer.max_steps == 0:
        raise MisconfigurationException(f"with max_epochs=0 or max_steps=0 the fit ends before {name}; use 1.")


def _refuse_defense(module: LightningModule) -> None:
    if hasattr(module, "defense_settings"):
        raise MisconfigurationException(
            f"{ExponentialMechanismCallback.__name__} takes no training step, so the defense on the module would do "
            "nothing; detach it, or leave out its DefenseCallback."
        )


def _private_data(trainer: Trainer) -> Any:
    loader = users_loader(trainer.train_dataloader)
    if loader is None:
        raise MisconfigurationException("ExponentialMechanismCallback found no training data.")
    return loader
