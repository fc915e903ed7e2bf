"""Holding the rewound weights still through fine-tuning."""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_cwrf.callbacks.common import OncePerModule, earlier, refuse_averaging
from lightning_cwrf.callbacks.rewind import CriticalRewindCallback
from lightning_cwrf.masks import WeightMask


class GradientMaskCallback(OncePerModule):
    """Keeps the masked weights bit-identical through every optimizer step (Eq. 7, Algorithm 1, line 20).

    Their gradients are zero before clipping sees them, so the clipped norm is that of the live weights; and after each
    optimizer's step their values are written back, so that weight decay, momentum, Adam's moments or added noise do
    not move them. It works with every torch optimizer, with several of them, and with manual optimization.

    Args:
        mask: a mask, or a file of one; its weights are held at the values they have when training starts. None: the
            mask of the :class:`CriticalRewindCallback` before.
        tune: ``"rest"``: the masked weights are held and all others tuned (CWRF). ``"masked"``: the masked weights
            alone are tuned and all others held (ablation A2 of §4.4).

    >>> callback = GradientMaskCallback()
    """

    def __init__(
        self, mask: str | PathLike[str] | WeightMask | None = None, tune: Literal["rest", "masked"] = "rest"
    ) -> None:
        if tune not in ("rest", "masked"):
            raise ValueError(f"tune must be 'rest' or 'masked', not {tune!r}.")
        self.tune = tune
        self.given_mask = mask
        self._hooks: list[RemovableHandle] = []
        self.reset()

    def reset(self) -> None:
        self.mask: WeightMask | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_averaging(trainer, self)
        rewind = earlier(trainer, self, CriticalRewindCallback, "the mask")
        if rewind is None and self.given_mask is None:
            raise MisconfigurationException(
                "GradientMaskCallback needs a mask: put CriticalRewindCallback before it, or pass mask=..."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mask is None:
            self.mask = self._find(trainer, pl_module)
        mask = self.mask

        def hold(*_: Any) -> None:
            mask.restore_(pl_module)

        tell = getattr(pl_module, "on_weights_frozen", None)
        if tell is not None:
            tell(mask)
        self._release()
        for optimizer in trainer.optimizers:
            # Opacus' DPOptimizer takes no hooks itself; the optimizer inside it does.
            inner = getattr(optimizer, "original_optimizer", optimizer)
            self._hooks.append(inner.register_step_post_hook(hold))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.mask is not None:
            self.mask.zero_grad_(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mask is None:
            return
        moved = self.mask.moved(pl_module)
        if moved:
            self.mask.restore_(pl_module)
            rank_zero_warn(
                f"something other than the optimizers' steps moved {sum(moved.values())} frozen weights in epoch "
                f"{trainer.current_epoch} (in {', '.join(list(moved)[:3])}); they were put back. Look for code that "
                "writes to the parameters: clamping, weight averaging, another callback."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def state_dict(self) -> dict[str, Any]:
        # A mask of CriticalRewindCallback is in that callback's state.
        return self.mask.state_dict() if self.mask is not None and self.given_mask is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mask = WeightMask.from_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_hooks": []}

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> WeightMask:
        if self.given_mask is None:
            rewind = earlier(trainer, self, CriticalRewindCallback, "the mask")
            if rewind is None or rewind.mask is None:
                raise MisconfigurationException("CriticalRewindCallback has no mask yet; put it before this one.")
            if self.tune == "rest":
                return rewind.mask
            mask = ~rewind.mask
        else:
            given = self.given_mask if isinstance(self.given_mask, WeightMask) else WeightMask.load(self.given_mask)
            mask = given if self.tune == "rest" else ~given
        mask.freeze(pl_module)
        return mask

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
