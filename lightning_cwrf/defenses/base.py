"""How a defense meets a user's LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cwrf.classification import classification_step, deferred_checks
from lightning_cwrf.data.seen import SEEN_KEY, load_seen_state, seen_state
from lightning_cwrf.defenses._legacy import Configured, ConfigureDefense, configured_settings
from lightning_cwrf.defenses.classes import (
    attached_class,
    check_bases,
    check_names,
    constructor_of,
    free_step,
    is_module,
)
from lightning_cwrf.defenses.monitors import OURS, check_monitors, replaced_step_named
from lightning_cwrf.defenses.settings import Defense, M, build, derived, is_settings, setting_names
from lightning_cwrf.defenses.state import DefenseState
from lightning_cwrf.lightning_private import initial_hparams, logs_hparams, set_initial_hparams, set_logs_hparams
from lightning_cwrf.trainers import refuse_pytorch_lightning
from lightning_cwrf.weights.masks import WeightMask

if TYPE_CHECKING:
    _Base = LightningModule
else:
    _Base = object


class DefenseMixin(ConfigureDefense, _Base):
    """Base of the defense mixins: it replaces ``training_step``, and nothing else of the module.

    Use a defense as a class, ``class Hardened(RelaxLossMixin, MyModule)``; give it to a finished module with
    :meth:`attach`; or, for the length of a fit, with :class:`~lightning_cwrf.DefenseCallback`. Logits and targets come
    from :func:`~lightning_cwrf.classification.classification_step`. The loss is logged as ``train_loss``. Settings are
    hyper-parameters: they are in ``hparams["defense"]``, go to the loggers, and are saved in checkpoints.

    A defense of your own needs one method, :meth:`defense_loss`. If it has settings, these are a frozen dataclass::

        @dataclass(frozen=True)
        class Smoothed(Defense):
            smoothing: float = 0.1

        class SmoothedMixin(DefenseMixin, settings=Smoothed):
            def defense_loss(self, logits, targets):
                return F.cross_entropy(logits, targets, label_smoothing=self.defense.smoothing)

    Its constructor and ``attach`` then take ``smoothing``, and ``Smoothed`` is ``SmoothedMixin.defense_class``.
    """

    defense_class: ClassVar[type[Defense]]
    state_class: ClassVar[type[DefenseState]] = DefenseState
    more_than_loss: ClassVar[str] = "its step is more than a loss of logits and targets"
    """What a defense that overrides :meth:`defense_step` does there: why its models are trained one by one."""
    defense_state: Any
    """The :class:`DefenseState`, of this defense's own kind."""

    def __init_subclass__(cls, *, settings: type[Defense] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_bases(cls, DefenseMixin)
        if not is_module(cls):
            _take_settings(cls, settings)
        elif settings is not None:
            raise TypeError(f"{cls.__name__} is a module: give settings= to a mixin, and inherit from it.")
        else:
            check_names(cls, cls.defense_class, DefenseMixin)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cls = type(self).defense_class
        defense = build(cls, {name: kwargs.pop(name) for name in setting_names(cls) if name in kwargs})
        super().__init__(*args, **kwargs)
        # Data and defenses are no hyper-parameters, but a module that saves all its arguments has them there.
        others = [name for name, value in defense.settings.items() if isinstance(value, Defense)]
        for name in (*defense.data_settings, *others):
            for hparams in (self.hparams, initial_hparams(self)):
                hparams.pop(name, None)
        self._begin_defense(defense)

    @property
    def defense(self) -> Any:
        """The settings: an instance of :attr:`defense_class`."""
        return self.defense_state.defense

    @property
    def defense_settings(self) -> dict[str, Any]:
        """The settings as plain values, without data."""
        settings: dict[str, Any] = self.defense.plain()
        return settings

    @classmethod
    def attach(cls, module: M, **settings: Any) -> M:
        """Give this defense to a module, in place, and return the same object.

        Its class becomes a subclass of its own, ``(cls, type(module))``: hooks, hyper-parameters and state-dict keys
        stay, and a checkpoint of it loads into the original class.

        Args:
            module: a LightningModule with automatic optimization.
            settings: those of the defense.

        Raises:
            TypeError: ``module`` is no LightningModule, or a setting is unknown or of the wrong type.
            MisconfigurationException: the module has a defense already, uses manual optimization, has a
                ``training_step`` set on the object, or an attribute that the defense would hide.
            ValueError: a setting is out of range.
        """
        return cls.attach_defense(module, build(cls.defense_class, settings))

    @classmethod
    def attach_defense(cls, module: M, defense: Defense) -> M:
        """:meth:`attach` with the settings as one object, which :meth:`Defense.attach` calls."""
        _check_module(cls, module)
        original: Any = type(module)
        free_step(module)
        attached: Any = module
        attached.__class__ = attached_class(cls, original)
        try:
            attached._begin_defense(defense)
        except BaseException:
            vars(module).pop("defense_state", None)
            attached.__class__ = original
            raise
        return module

    @staticmethod
    def detach(module: M) -> M:
        """Remove an attached defense, in place, and return the same object."""
        original: Any = getattr(type(module), "_attached_to", None)
        if original is None:
            raise MisconfigurationException(f"no defense was attached to {type(module).__name__}.")
        attached: Any = module
        free_step(module)
        state = attached.defense_state
        state.end()
        for hparams in (module.hparams, initial_hparams(module)):
            hparams.pop(state.hparam, None)
        set_logs_hparams(module, state.logged)
        del attached.defense_state
        attached.__class__ = original
        return module

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

    @classmethod
    def why_not_stacked(cls) -> str | None:
        """Why models with this defense cannot be trained as one vectorised model; None where its loss alone decides."""
        return None if cls.defense_step is DefenseMixin.defense_step else cls.more_than_loss

    def on_weights_frozen(self, mask: WeightMask) -> None:
        """Called by GradientMaskCallback before the first step; for a defense that handles gradients itself."""

    def on_train_start(self) -> None:
        check_monitors(self, DefenseMixin, self.defense.mixin.__name__)
        super().on_train_start()

    def on_train_epoch_end(self) -> None:
        with replaced_step_named(self):
            super().on_train_epoch_end()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _check_automatic(self, type(self).__name__)
        where = f"epoch {self.current_epoch}, batch {batch_idx}"
        with deferred_checks() as checks:
            try:
                loss, size = self.defense_step(batch)
                _check_scalar(loss, type(self).__name__)
                finite = checks.passed(loss)
            except ValueError as error:
                found = checks.error() or error  # wrong labels may be why
                raise ValueError(
                    f"{found} (In {type(self).__name__}, {where}; its settings are {self.defense_settings}.)"
                ) from error
        if not finite:
            raise ValueError(
                f"the loss of {type(self).__name__} is {loss.item()} at {where}; its settings are "
                f"{self.defense_settings}. Lower the learning rate, or clip gradients."
            )
        logged = {"prog_bar": True, "on_step": True, "on_epoch": True, "sync_dist": True, "batch_size": size}
        self.log(OURS, loss.detach(), **logged)  # type: ignore[arg-type]
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        save_defense(self, self.defense_state, checkpoint)
        # Under "hyper_parameters" they would be passed to the __init__ of a class that takes **kwargs.
        hparams = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if isinstance(hparams, dict):
            hparams.pop(self.defense_state.hparam, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        load_seen_state(self, checkpoint.get(SEEN_KEY, {}))
        self.defense_state.load(checkpoint)

    def _begin_defense(self, defense: Defense) -> None:
        self.defense_state = self.state_class(self, defense)
        if isinstance(defense, Configured):
            defense.configure(self)
        self._show_defense()

    def _show_defense(self) -> None:
        """Show the settings among the hyper-parameters."""
        hparams, name = self.hparams, self.defense_state.hparam
        if not isinstance(hparams, dict):  # an OmegaConf container of the user's; the checkpoint still has the settings
            return
        # A module that chose to log no hyper-parameters still logs none.
        set_logs_hparams(self, logs_hparams(self) or not hparams)
        initial = self.hparams_initial
        initial[name] = hparams[name] = self.defense.named()
        set_initial_hparams(self, initial)


def _check_scalar(loss: Any, name: str) -> None:
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"the loss of {name} must be a scalar tensor, not {what}; take its mean.")


def save_defense(module: LightningModule, state: DefenseState, checkpoint: dict[str, Any]) -> None:
    """Put into a checkpoint what a defense keeps, and the non-members that the module has seen."""
    state.save(checkpoint)
    if seen := seen_state(module):
        checkpoint[SEEN_KEY] = seen


def own_hparams(module: LightningModule) -> dict[str, Any]:
    """The module's hyper-parameters without those of its defense."""
    ours = module.defense_state.hparam if isinstance(module, DefenseMixin) else None
    return {name: value for name, value in module.hparams.items() if name != ours}


def _take_settings(cls: type[DefenseMixin], settings: type[Defense] | None) -> None:
    """Give a mixin its settings class and constructor."""
    if "per_example" in vars(cls):
        raise TypeError(f"per_example of {cls.__name__} belongs into its settings class, the frozen dataclass.")
    if settings is not None and not is_settings(settings):
        raise TypeError(f"settings of {cls.__name__} must be a frozen dataclass that inherits Defense, not {settings}.")
    if "configure_defense" in vars(cls):
        settings = configured_settings(cls, cls.defense_class)
    elif settings is None or "mixin" in vars(settings):
        settings = derived(cls.defense_class if settings is None else settings, cls)
    settings.mixin = cls
    cls.defense_class = settings
    if "__init__" not in vars(cls):
        cls.__init__ = constructor_of(cls, settings)  # type: ignore[method-assign]


DefenseMixin.defense_class = derived(Defense, DefenseMixin)
DefenseMixin.defense_class.mixin = DefenseMixin


def _check_module(cls: type[DefenseMixin], module: Any) -> None:
    """Raise unless the defense can be attached to ``module``."""
    name = type(module).__name__
    refuse_pytorch_lightning(module)
    if not isinstance(module, LightningModule):
        what = f"the class {module.__name__} itself: make an instance" if isinstance(module, type) else name
        if hasattr(module, "_orig_mod"):
            what += f" (torch.compile): compile it afterwards, torch.compile({cls.__name__}.attach(module))"
        raise TypeError(f"{cls.__name__}.attach needs a LightningModule, not {what}.")
    if isinstance(module, DefenseMixin):
        raise MisconfigurationException(
            f"{getattr(type(module), '_attached_to', type(module)).__name__} has a defense already "
            f"({type(module.defense).mixin.__name__}): two cannot both be its training loss. Remove one (of two "
            "DefenseCallbacks, or by DefenseMixin.detach(module)), or pass one to the other as on=, where that adds to "
            "another loss."
        )
    _check_automatic(module, cls.__name__)
    ours = [each for each in dir(cls) if not each.startswith("_") and not hasattr(LightningModule, each)]
    hidden = [each for each in ours if hasattr(module, each)]
    if hidden:
        raise MisconfigurationException(
            f"{cls.__name__} would hide {name}.{hidden[0]}: rename that attribute of the module."
        )


def _check_automatic(module: LightningModule, defense: str) -> None:
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{defense} replaces training_step, but this module uses manual optimization: its own training_step steps "
            "the optimizer. Call the defense's loss function there instead."
        )
