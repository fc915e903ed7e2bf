"""Checks of a class that is put together from a defense and a module: would its training step be the defense's?"""

from __future__ import annotations

import inspect
from types import CodeType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cwrf.weights.copies import COMPILED


def check_bases(cls: type, root: type) -> None:
    """Refuse a class whose ``training_step`` would not be the defense's.

    Args:
        cls: a new subclass of ``root``.
        root: the base of all defenses, whose ``training_step`` is to be the one that trains.

    Raises:
        TypeError: the module stands before the defense, or there are two defenses.

    Warns:
        A subclass of a hardened class has a ``training_step`` of its own that does not call the defense's.
    """
    if not issubclass(cls, LightningModule):
        return
    order = cls.__mro__
    mixins = [base for base in order if issubclass(base, root) and not issubclass(base, LightningModule)]
    # A defense that another one builds on is part of it.
    leaves = [base for base in mixins if not any(other is not base and issubclass(other, base) for other in mixins)]
    if len(leaves) > 1:
        names = " and ".join(leaf.__name__ for leaf in leaves)
        raise TypeError(
            f"{cls.__name__} has {len(leaves)} defenses ({names}): they cannot all be its training loss. Keep one, or "
            "write a DefenseMixin whose defense_loss combines their loss functions."
        )
    defense, first = leaves[0], order.index(root)
    modules = [base for base in order if issubclass(base, LightningModule) and not issubclass(base, root)]
    if modules and order.index(LightningModule) < first:
        raise TypeError(
            f"{cls.__name__} would train without its defense: Python finds {modules[0].__name__}.training_step before "
            f"{defense.__name__}'s. Put the defense first: class {cls.__name__}({_names(defense, cls.__bases__)})."
        )
    for base in order[:first]:
        step = vars(base).get("training_step")
        if step is None or _goes_on(step):
            continue
        if not issubclass(base, root):
            raise TypeError(
                f"{cls.__name__} would train without its defense: {base.__name__}.training_step stands before "
                f"{defense.__name__}'s and does not call it. Put the defense first: class "
                f"{cls.__name__}({_names(defense, cls.__bases__)}); or have it call super().training_step(batch, "
                "batch_idx)."
            )
        if base is cls:
            rank_zero_warn(
                f"{cls.__name__}.training_step takes the place of {defense.__name__}'s, so {cls.__name__} trains "
                "without the defense. Have it call super().training_step(batch, batch_idx), or override "
                "defense_loss(logits, targets) or classification_step(batch) instead."
            )


def free_step(module: LightningModule) -> None:
    """Have a module's training step be that of its class; before a defense comes or goes, which changes the class.

    A module that was fitted as ``torch.compile(module)`` has compiled steps of its old class as attributes.

    Raises:
        MisconfigurationException: the user has set a ``training_step`` on the object.
    """
    own = vars(module)
    if own.get("_compiler_ctx") is not None:
        module._compiler_ctx = None
        for name in COMPILED:
            own.pop(name, None)
        rank_zero_warn(
            f"this {type(module).__name__} was compiled (torch.compile) with its old training step. It is not compiled "
            "any more; compile it again for the next fit."
        )
    for name in COMPILED:  # bound methods of the class, which to_uncompiled leaves there
        if name in own and getattr(own[name], "__func__", None) is getattr(type(module), name):
            del own[name]
    if "training_step" in own:
        raise MisconfigurationException(
            f"this {type(module).__name__} has a training_step set on the object, which would train it instead of the "
            "one of its class. Delete it (del module.training_step), or define it in a class."
        )


def _names(defense: type, bases: tuple[type, ...]) -> str:
    others = [base.__name__ for base in bases if base is not defense]
    return ", ".join([defense.__name__, *others])


def _goes_on(step: Any) -> bool:
    """Whether the code of a training step speaks of the defense's, as far as it can be read."""
    code = getattr(inspect.unwrap(step), "__code__", None) if callable(step) else None
    return code is None or bool(_spoken(code) & {"super", "training_step", "defense_step", "defense_loss"})


def _spoken(code: CodeType) -> set[str]:
    inner = [_spoken(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
