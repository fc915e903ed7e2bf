"""Classes made of a defense and a module: their constructor, and whether their training step is the defense's."""

from __future__ import annotations

import dataclasses
import inspect
from types import CodeType
from typing import Any, get_type_hints

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cwrf.lightning_private import COMPILED, drop_compiled_steps
from lightning_cwrf.trainers import refuse_pytorch_lightning

_ATTACHED: dict[tuple[type, type], Any] = {}


def attached_class(mixin: type, original: type) -> Any:
    """The class ``(mixin, original)``, one and the same for every module of that class."""
    if (mixin, original) not in _ATTACHED:
        body = {
            "__module__": original.__module__,
            "__doc__": f"{original.__name__} with {mixin.__name__} attached.",
            "__reduce__": _reduce_attached,
            "_attached_to": original,
        }
        name = mixin.__name__.removesuffix("Mixin") + original.__name__
        _ATTACHED[mixin, original] = type(name, (mixin, original), body)
    return _ATTACHED[mixin, original]


def _reduce_attached(module: Any) -> tuple[Any, ...]:
    # A class made at run time cannot be found by name: pickle (and deepcopy) make it again from its two parents.
    mixin, original = type(module).__bases__
    return _new_attached, (mixin, original), module.__getstate__()


def _new_attached(mixin: type, original: type) -> Any:
    made = attached_class(mixin, original)
    return made.__new__(made)


def is_module(cls: type) -> bool:
    """Whether a class is a LightningModule already, and no mixin for one."""
    return issubclass(cls, LightningModule)


def constructor_of(mixin: type, settings: type) -> Any:
    """An ``__init__`` for a mixin: it takes the settings by keyword and hands everything on.

    jsonargparse reads its signature, and ``save_hyperparameters`` the arguments in its frame, so it has to be a
    function with these very arguments.
    """
    fields = [f for f in dataclasses.fields(settings) if f.init]
    names = ["*args", *(f.name for f in fields), "**kwargs"]
    given = ["*args", *(f"{f.name}={f.name}" for f in fields), "**kwargs"]
    source = (
        "def make(__class__):\n"
        f"    def __init__(self, {', '.join(names)}):\n"
        f"        super().__init__({', '.join(given)})\n"
        "    return __init__\n"
    )
    space: dict[str, Any] = {"__name__": __name__}
    exec(source, space)
    init = space["make"](mixin)
    try:
        hints = get_type_hints(settings)
    except Exception:  # an annotation that is imported for type checkers alone
        hints = {}
    init.__kwdefaults__ = {f.name: _default(f) for f in fields if _default(f) is not dataclasses.MISSING}
    init.__annotations__ = {f.name: hints.get(f.name, Any) for f in fields} | {"return": None}
    init.__module__, init.__qualname__ = mixin.__module__, f"{mixin.__qualname__}.__init__"
    return init


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def check_names(cls: type, settings: type, root: type) -> None:
    """Raise a TypeError where the module's constructor has an argument of the same name as a setting."""
    modules = [base for base in cls.__mro__ if issubclass(base, LightningModule) and not issubclass(base, root)]
    if not modules or "_attached_to" in vars(cls) or not dataclasses.is_dataclass(settings):
        return
    theirs = inspect.signature(modules[0].__init__).parameters
    clash = sorted({f.name for f in dataclasses.fields(settings)} & set(theirs))
    if clash:
        raise TypeError(
            f"{modules[0].__name__}.__init__ and the defense of {cls.__name__} both take {', '.join(clash)}; use "
            "attach(module, ...), or rename the argument."
        )


def check_bases(cls: type, root: type) -> None:
    """Refuse a subclass of ``root`` whose ``training_step`` would not be the defense's, and one with two defenses.

    A subclass of a hardened class whose own ``training_step`` does not call the defense's is warned about.
    """
    refuse_pytorch_lightning(cls)
    if not issubclass(cls, LightningModule):
        return
    order = cls.__mro__
    mixins = [base for base in order if issubclass(base, root) and not issubclass(base, LightningModule)]
    # A defense that another one inherits from is part of it.
    leaves = [base for base in mixins if not any(other is not base and issubclass(other, base) for other in mixins)]
    if len(leaves) > 1:
        names = " and ".join(leaf.__name__ for leaf in leaves)
        raise TypeError(
            f"{cls.__name__} has {len(leaves)} defenses ({names}): they cannot all be its training loss. Keep one, or "
            "pass the other as on=, to a defense that adds to another one's loss; or write a DefenseMixin whose "
            "defense_loss combines their loss functions."
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
        if step is None or _calls_defense(step):
            continue
        if not issubclass(base, root):
            raise TypeError(
                f"{cls.__name__} would train without its defense: {base.__name__}.training_step comes before "
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
    """Remove the compiled steps of its old class from a module that was fitted as ``torch.compile(module)``.

    A ``training_step`` that the user has set on the object is an error.
    """
    own = vars(module)
    if drop_compiled_steps(module):
        rank_zero_warn(
            f"this {type(module).__name__} was compiled (torch.compile) with its old training step. It is no longer "
            "compiled; compile it again for the next fit."
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


def _calls_defense(step: Any) -> bool:
    """Whether the code of a training step mentions the defense's step or loss, as far as it can be read."""
    code = getattr(inspect.unwrap(step), "__code__", None) if callable(step) else None
    return code is None or bool(_mentioned(code) & {"super", "training_step", "defense_step", "defense_loss"})


def _mentioned(code: CodeType) -> set[str]:
    inner = [_mentioned(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
