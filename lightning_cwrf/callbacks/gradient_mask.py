"""Keeping the rewound weights fixed through fine-tuning."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cwrf.callbacks.common import HoldsWeights, earlier, refuse_moved_weights, saved_state
from lightning_cwrf.callbacks.rewind import CriticalRewindCallback
from lightning_cwrf.callbacks.rewind_settings import check_mask, mask_identity
from lightning_cwrf.checks import check_choice
from lightning_cwrf.weights.masks import WeightMask

_CHECK_EVERY = 10  # steps; a comparison takes as long as holding the weights does


class GradientMaskCallback(HoldsWeights):
    """Keeps the masked weights bit-identical through every optimizer step (Eq. 7, Algorithm 1, line 20).

    Their gradients are set to zero before clipping, so the clipped norm is that of the trained weights; and after each
    optimizer's step their values are written back, so that weight decay, momentum, Adam's moments or added noise do
    not move them. It works with every torch optimizer, with schedule-free ones, with several of them, and with manual
    optimization, where gradients are cleared as soon as a backward pass accumulates them.

    Other code that writes to the parameters is detected: the weights are compared with the held values before each of
    the first ten steps and every tenth step after that, whenever the module's ``state_dict`` is taken (so before every
    checkpoint), and after the last hook of the fit. Moved weights are put back, at the latest after the next step, and
    a warning says how many there were.

    Args:
        mask: a mask, or a file of one; its weights are held at the values they have when training starts. Default: the
            mask of the :class:`CriticalRewindCallback` before this one.
        tune: ``"rest"``: hold the masked weights and tune all others (CWRF). ``"masked"``: tune only the masked weights
            and hold all others (ablation A2 of §4.4).

    Raises:
        TypeError: ``mask`` is neither a mask nor a path.
        ValueError: an unknown ``tune``.

    >>> callback = GradientMaskCallback()
    """

    def __init__(
        self, mask: str | PathLike[str] | WeightMask | None = None, tune: Literal["rest", "masked"] = "rest"
    ) -> None:
        check_choice("tune", tune, ("rest", "masked"))
        check_mask(mask)
        self.tune = tune
        self.given_mask = mask
        self._hooks: list[Any] = []
        self.reset()

    def reset(self) -> None:
        self.mask: WeightMask | None = None
        self._trained: set[str] = set()
        self._unhooked = False
        self._gradients_are_used = False
        # The most weights found moved before any one step, by parameter; on the weights' device.
        self._moved: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        return {"tune": self.tune, "mask": None if self.given_mask is None else mask_identity(self.given_mask)}

    def prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().prepare(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_moved_weights(trainer, self)
        rewind = earlier(trainer, self, CriticalRewindCallback, "the mask")
        if rewind is None and self.given_mask is None:
            raise MisconfigurationException(
                "GradientMaskCallback needs a mask: put CriticalRewindCallback before it, or pass mask=..."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mask is None:
            self.mask = self._make_mask(trainer, pl_module)
            self.done_with = self.settings()
        mask = self.mask
        on_weights_frozen = getattr(pl_module, "on_weights_frozen", None)
        if on_weights_frozen is not None:
            on_weights_frozen(mask)
        self._remove_hooks()
        self._check(trainer, pl_module, "before the training went on")
        self._trained = _trained(pl_module)
        users = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]
        self._gradients_are_used = pl_module.automatic_optimization and any(
            is_overridden("on_after_backward", user) for user in users if user is not self
        )

        def hold(optimizer: Any, *_: Any) -> None:
            mask.restore_(pl_module, optimizer)

        steps = itertools.count()

        def count_moved(optimizer: Any, *_: Any) -> None:
            step = next(steps)
            if step >= _CHECK_EVERY and step % _CHECK_EVERY:  # the values are written back after the step in any case
                return
            for name, count in mask.moved_counts(pl_module).items():
                self._moved[name] = torch.maximum(self._moved.get(name, count), count)

        for optimizer in trainer.optimizers:
            # Opacus' DPOptimizer takes no hooks itself; the optimizer inside it does.
            inner = getattr(optimizer, "original_optimizer", optimizer)
            hold(inner)  # a resumed optimizer's state may hold copies of the weights
            if hasattr(inner, "register_step_post_hook"):
                self._hooks += [inner.register_step_pre_hook(count_moved), inner.register_step_post_hook(hold)]
            else:
                self._unhooked = True
        if not pl_module.automatic_optimization:
            self._hooks += mask.clear_gradients_of(pl_module)
        before_saving = _BeforeSaving(self, trainer, pl_module)
        self._hooks.append(pl_module.register_state_dict_pre_hook(before_saving))  # type: ignore[no-untyped-call]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear the gradients before the module's own ``on_after_backward``, which may clip them."""
        if self.mask is not None and self._gradients_are_used:
            self.mask.zero_grad_(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.mask is not None:
            self.mask.zero_grad_(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._unhooked and self.mask is not None:
            self.mask.restore_(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module, f"before epoch {trainer.current_epoch}")
        self._tell_of_unfrozen(pl_module)

    def _tell_of_unfrozen(self, pl_module: LightningModule) -> None:
        unfrozen = _trained(pl_module) - self._trained
        if unfrozen:
            self._trained |= unfrozen
            unknown = unfrozen - set(self.mask.masks if self.mask is not None else ())
            total = sum(pl_module.get_parameter(name).numel() for name in unknown)
            if unknown:
                rank_zero_warn(
                    f"{total:,} weights became trainable after the mask was chosen (in {', '.join(sorted(unknown)[:3])}"
                    "): they are neither rewound nor held. To include them, have them trainable from the start."
                )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module, f"in epoch {trainer.current_epoch}")
        self._tell_of_unfrozen(pl_module)  # the module's own on_train_epoch_start comes after that of callbacks

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module, "when the training ended")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Schedule the last check for after the module's own ``teardown``, the last hook of a fit."""
        own = vars(pl_module).get("teardown")
        teardown = pl_module.teardown

        def reset_teardown() -> None:
            if own is None:
                vars(pl_module).pop("teardown", None)
            else:
                vars(pl_module)["teardown"] = own

        def then_check(stage: str) -> None:
            reset_teardown()
            teardown(stage)
            self._check(trainer, pl_module, "at the end of the fit")
            self._remove_hooks()

        vars(pl_module)["teardown"] = then_check
        self._hooks.append(_Undo(reset_teardown))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the weights that are saved: other callbacks may have swapped them, and the fit may be over."""
        if self.mask is None:
            return
        moved = self.mask.restore_in_(checkpoint["state_dict"])
        if moved:
            _warn(moved, "in a checkpoint")

    def on_exception(self, *given: Any) -> None:
        holder: Any = self  # the trainer, where the Trainer was given the class instead of an instance
        if isinstance(holder, GradientMaskCallback):
            trainer, pl_module, _ = given
            self._check(trainer, pl_module, "when the fit was interrupted")
            self._remove_hooks()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            self._remove_hooks()

    @saved_state
    def state_dict(self) -> dict[str, Any]:
        if self.mask is None:
            return {}
        # A mask of CriticalRewindCallback is in that callback's state.
        mask: Mapping[str, Any] = self.mask.state_dict() if self.given_mask is not None else {}
        return {**mask, "settings": self.done_with}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.done_with = state.pop("settings", None) or {}
        if state:
            self.mask = WeightMask.from_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_hooks": []}

    def _make_mask(self, trainer: Trainer, pl_module: LightningModule) -> WeightMask:
        if self.given_mask is None:
            rewind = earlier(trainer, self, CriticalRewindCallback, "the mask")
            if rewind is None or rewind.mask is None:
                raise MisconfigurationException("CriticalRewindCallback has no mask yet; put it before this one.")
            if self.tune == "rest":
                return rewind.mask
            mask = rewind.mask.rest_of(pl_module)
        else:
            given = self.given_mask if isinstance(self.given_mask, WeightMask) else WeightMask.load(self.given_mask)
            # A new object: the caller's mask is not changed.
            mask = WeightMask(given.masks) if self.tune == "rest" else given.rest_of(pl_module)
        mask.freeze(pl_module)
        return mask

    def _check(self, trainer: Trainer, pl_module: LightningModule, when: str) -> None:
        """Put back weights that anything but the optimizers' steps has moved, with a warning."""
        if self.mask is None or not self.mask.is_frozen:
            return
        between_steps = {name: int(count) for name, count in self._moved.items() if count}
        self._moved = {}
        moved = dict(Counter(between_steps) | Counter(self.mask.moved(pl_module)))
        if moved:
            self.mask.restore_(pl_module)
            for optimizer in trainer.optimizers:
                self.mask.restore_(pl_module, optimizer)
            _warn(moved, when)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _BeforeSaving:
    """A hook that checks the weights before a module's state dict is taken. On copies of the module it does nothing."""

    def __init__(
        self,
        callback: GradientMaskCallback | None = None,
        trainer: Trainer | None = None,
        pl_module: LightningModule | None = None,
    ) -> None:
        self._callback = callback
        self._of = trainer
        self._module = None if pl_module is None else weakref.ref(pl_module)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if self._callback is None or self._of is None or self._module is None or self._module() is not module:
            return
        self._callback._check(self._of, self._of.lightning_module, "before the weights were read")

    def __deepcopy__(self, memo: dict[int, Any]) -> _BeforeSaving:
        return _BeforeSaving()

    def __reduce__(self) -> tuple[type[_BeforeSaving], tuple[()]]:
        return _BeforeSaving, ()


class _Undo:
    """A function with the interface of a hook's handle."""

    def __init__(self, remove: Any) -> None:
        self.remove = remove


def _trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def _warn(moved: Mapping[str, int], when: str) -> None:
    rank_zero_warn(
        f"something other than the optimizers' steps moved {sum(moved.values())} frozen weights {when} (in "
        f"{', '.join(list(moved)[:3])}); they were put back. Look for code that writes to the parameters: clamping, "
        "weight averaging, another callback, the module's own hooks."
    )
