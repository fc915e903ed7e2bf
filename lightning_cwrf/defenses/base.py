"""How a defense meets a user's LightningModule."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_cwrf.classification import classification_step
from lightning_cwrf.data.seen import load_seen_state, seen_state
from lightning_cwrf.defenses.bases import check_bases, free_step
from lightning_cwrf.weights.masks import WeightMask

if TYPE_CHECKING:
    _Base = LightningModule
else:
    _Base = object
_HPARAMS_KEY = "defense"
_SEEN_KEY = "lightning_cwrf_seen"


class DefenseMixin(_Base):
    """Base of the defense mixins: it replaces ``training_step``, and nothing else of the module.

    Use a defense as a class, ``class Hardened(RelaxLossMixin, MyModule)``, or give it to a finished module with
    :meth:`attach`. Logits and targets come from :func:`~lightning_cwrf.classification.classification_step`. The loss is
    logged as ``train_loss``. Settings are hyper-parameters: they stand in ``hparams["defense"]``, go to the loggers,
    and are saved in checkpoints under ``"defense"``.

    A defense of your own needs one method, :meth:`defense_loss`::

        class Smoothed(DefenseMixin):
            def defense_loss(self, logits, targets):
                return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)

    One with settings also defines ``configure_defense(self, *, name=default, ...)``, which checks them and hands them
    to ``self._set_defense(name=name, ...)``; they are then in ``self.defense_settings``, and arguments of the class.
    """

    defense_settings: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_bases(cls, DefenseMixin)
        _check_names(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        mixin = _mixin_of(type(self))
        own = {name: kwargs.pop(name) for name in _settings_of(mixin) if name in kwargs}
        super().__init__(*args, **kwargs)
        if not own and any("__init__" in vars(base) for base in _mixins_of(type(self))):
            self._set_defense()  # its own __init__ goes on to configure
        else:
            check_settings(mixin, own)
            self.configure_defense(**own)

    @classmethod
    def attach(cls, module: LightningModule, **settings: Any) -> Any:
        """Give this defense to a module, in place, and return the same object.

        Its class becomes a subclass of its own, ``(cls, type(module))``: hooks, hyper-parameters and state-dict keys
        stay, and a checkpoint of it loads into the original class.

        Args:
            module: a LightningModule with automatic optimization.
            settings: the defense's arguments, as in its ``configure_defense``.

        Raises:
            TypeError: ``module`` is no LightningModule, or a setting is unknown.
            MisconfigurationException: it has a defense already, uses manual optimization, or has a ``training_step``
                set on the object.
            ValueError: a setting is out of range.
        """
        if not isinstance(module, LightningModule):
            raise TypeError(f"{cls.__name__}.attach needs a LightningModule, not {_kind_of(module)}.")
        if isinstance(module, DefenseMixin):
            raise MisconfigurationException(
                f"{type(module).__name__} has a defense already ({_mixin_of(type(module)).__name__}): two cannot both "
                f"be its training loss. Call {type(module).__name__}.detach(module) first."
            )
        _check_automatic(module, cls.__name__)
        original = type(module)
        check_settings(cls, settings)
        free_step(module)
        attached: Any = module
        attached.__class__ = _attached_class(cls, original)
        try:
            attached.configure_defense(**settings)
            if "defense_settings" not in vars(attached):
                attached._set_defense()
        except BaseException:
            attached.__class__ = original
            raise
        return attached

    @staticmethod
    def detach(module: Any) -> Any:
        """Take an attached defense off again, in place, and return the same object."""
        original = getattr(type(module), "_attached_to", None)
        if original is None:
            raise MisconfigurationException(f"no defense was attached to {type(module).__name__}.")
        free_step(module)
        module.hparams.pop(_HPARAMS_KEY, None)
        module._hparams_initial = copy.deepcopy(module.hparams)
        del module.defense_settings
        module.__class__ = original
        return module

    def configure_defense(self) -> None:
        """Check and take the settings; a defense with settings overrides this with keyword arguments."""
        self._set_defense()

    def defense_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The training loss of a batch, a scalar. Every defense defines it.

        Args:
            logits: shape ``(n, K)``.
            targets: class indices ``(n,)``.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no defense_loss(logits, targets).")

    def defense_step(self, batch: Any) -> tuple[Tensor, int]:
        """The training loss of a batch, and its number of examples; a defense that needs more overrides this."""
        logits, targets = classification_step(self, batch)
        return self.defense_loss(logits, targets), len(targets)

    def on_weights_frozen(self, mask: WeightMask) -> None:
        """Called by GradientMaskCallback before the first step; for a defense that handles gradients itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _check_automatic(self, type(self).__name__)
        try:
            loss, size = self.defense_step(batch)
        except ValueError as error:
            where = f"epoch {self.current_epoch}, batch {batch_idx}; its settings are {self.defense_settings}"
            raise ValueError(f"{error} (In {type(self).__name__}, {where}.)") from error
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"the loss of {type(self).__name__} must be a scalar tensor, not {what}; take its mean.")
        if not torch.isfinite(loss.detach()):
            raise ValueError(
                f"the loss of {type(self).__name__} is {loss.item()} at epoch {self.current_epoch}, batch {batch_idx}; "
                f"its settings are {self.defense_settings}. Lower the learning rate, or clip gradients."
            )
        self.log(
            "train_loss",
            loss.detach(),
            prog_bar=True,
            on_step=True,
            on_epoch=True,
            sync_dist=True,
            batch_size=size,
        )
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_HPARAMS_KEY] = self._named_settings()
        if seen := seen_state(self):
            checkpoint[_SEEN_KEY] = seen
        # Under "hyper_parameters" they would be passed to the __init__ of a class that takes **kwargs.
        hparams = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if isinstance(hparams, dict):
            hparams.pop(_HPARAMS_KEY, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        load_seen_state(self, checkpoint.get(_SEEN_KEY, {}))
        saved = checkpoint.get(_HPARAMS_KEY)
        if saved is not None and saved != self._named_settings():
            rank_zero_warn(f"the checkpoint was trained with the defense {saved}; now it is {self._named_settings()}.")

    def _set_defense(self, **settings: Any) -> None:
        self.defense_settings = settings
        hparams = self.hparams
        # Data are no hyper-parameters, though a module that saves all its arguments takes them for some.
        if settings:
            for name in set(_settings_of(_mixin_of(type(self)))) - set(settings):
                hparams.pop(name, None)
        if not isinstance(hparams, dict):  # an OmegaConf container of the user's: the checkpoint has them all the same
            return
        # A module that logs no hyper-parameters by its own choice goes on logging none.
        self._log_hyperparams: bool = self._log_hyperparams or not hparams
        hparams[_HPARAMS_KEY] = self._named_settings()
        self._hparams_initial = copy.deepcopy(hparams)

    def _named_settings(self) -> dict[str, Any]:
        return {"name": _mixin_of(type(self)).__name__, **self.defense_settings}


def check_settings(mixin: type[DefenseMixin], settings: Mapping[str, Any]) -> None:
    """Raise a TypeError that names a setting the defense does not have, or one of the wrong type.

    The types are those of ``configure_defense``'s annotations, where these are made of float, int, bool, str, None and
    Literal. A float must not be NaN (ValueError).
    """
    known = _settings_of(mixin)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise TypeError(f"{mixin.__name__} has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}.")
    for name, value in settings.items():
        kinds = _kinds(known[name].annotation)
        if kinds is None:
            continue
        if not any(_is_a(kind, value) for kind in kinds):
            wanted = " or ".join(kind.__name__ if isinstance(kind, type) else repr(kind) for kind in kinds)
            wanted = wanted.replace("NoneType", "None")
            # Another choice of the right type is a wrong value.
            error = ValueError if any(type(kind) is type(value) for kind in kinds) else TypeError
            raise error(f"{mixin.__name__}: {name} must be {wanted}, not {value!r}.")
        if isinstance(value, Real) and math.isnan(value):
            raise ValueError(f"{mixin.__name__}: {name} must be a number, not nan.")


def _kinds(annotation: Any) -> list[Any] | None:
    """The types and literal values that an annotation names; None where it names others too."""
    if isinstance(annotation, str):  # one that signature() could not evaluate, or a quoted one
        try:
            annotation = eval(annotation, {"Literal": Literal, "Union": Union})
        except Exception:
            return None
    if annotation is None:
        return [NoneType]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        parts = [_kinds(part) for part in get_args(annotation)]
        return None if None in parts else [kind for part in parts for kind in part or []]
    return [annotation] if annotation in (float, int, bool, str, NoneType) else None


def _kind_of(thing: Any) -> str:
    return f"the class {thing.__name__} itself: make one first" if isinstance(thing, type) else type(thing).__name__


def _is_a(kind: Any, value: Any) -> bool:
    if not isinstance(kind, type):
        return type(kind) is type(value) and bool(kind == value)
    if kind in (float, int):
        return isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)
    return isinstance(value, kind)


def _settings_of(mixin: type) -> dict[str, inspect.Parameter]:
    configure = mixin.configure_defense  # type: ignore[attr-defined]
    try:
        signature = inspect.signature(configure, eval_str=True)
    except Exception:  # an annotation that is imported for type checkers alone
        signature = inspect.signature(configure)
    parameters = dict(signature.parameters)
    parameters.pop("self", None)
    return parameters


def _mixin_of(cls: type) -> type:
    """The defense among the bases of a class: the first that is not yet a LightningModule."""
    return next(base for base in (*_mixins_of(cls), DefenseMixin))


def _mixins_of(cls: type) -> list[type]:
    """The defenses among the bases of a class that are no LightningModules; without DefenseMixin itself."""
    defenses = [base for base in cls.__mro__ if issubclass(base, DefenseMixin) and base is not DefenseMixin]
    return [base for base in defenses if not issubclass(base, LightningModule)]


def _is_module(cls: type) -> bool:
    return issubclass(cls, LightningModule)


_ATTACHED: dict[tuple[type, type], Any] = {}


def _attached_class(mixin: type, original: type) -> Any:
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
    # A class made at run time is found by nobody's name: pickle (and deepcopy) make it again from its two parents.
    mixin, original = type(module).__bases__
    return _new_attached, (mixin, original), module.__getstate__()


def _new_attached(mixin: type, original: type) -> Any:
    made = _attached_class(mixin, original)
    return made.__new__(made)


def _check_automatic(module: LightningModule, defense: str) -> None:
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{defense} replaces training_step, but this module uses manual optimization: its own training_step steps "
            "the optimizer. Call the defense's loss function there instead."
        )


def _check_names(cls: type[DefenseMixin]) -> None:
    """Refuse a class whose module takes a constructor argument of the defense's own name: one would hide the other."""
    modules = [base for base in cls.__mro__ if _is_module(base) and not issubclass(base, DefenseMixin)]
    if not modules or "_attached_to" in vars(cls):
        return
    ours = inspect.signature(cls.configure_defense).parameters
    theirs = inspect.signature(modules[0].__init__).parameters
    clash = sorted(set(ours) & set(theirs) - {"self"})
    if clash:
        raise TypeError(
            f"{modules[0].__name__}.__init__ and the defense of {cls.__name__} both take {', '.join(clash)}; use "
            "attach(module, ...), or rename the argument."
        )
