"""CWRF's settings in a recipe: read off a training's callbacks, and made callbacks again for each shadow model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cwrf._deprecated import renamed
from lightning_cwrf.callbacks import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback
from lightning_cwrf.callbacks.rewind_settings import OLD_WORDS
from lightning_cwrf.checks import check_choice, check_integer
from lightning_cwrf.data import Batches, all_digests, isolated_rng
from lightning_cwrf.recipes.fit import fit, quiet
from lightning_cwrf.shadows.jobs import seed_all
from lightning_cwrf.weights.masks import WeightMask
from lightning_cwrf.weights.vanilla import VanillaSource, is_redraw, redraw

CALLBACKS = (PrivacyScoringCallback, CriticalRewindCallback, GradientMaskCallback)
"""The callbacks of CWRF, in the order in which a Trainer needs them."""


# Stores know a field by its old name, and one that came later not at all at its default: their models are found again.
_WAS_TO = {"identity": "to", "identity_values": {new: old for old, new in OLD_WORDS.items()}}
_CAME_LATER = {"identity_without_default": True}


@renamed(OLD_WORDS, to="values")
@dataclass(frozen=True)
class CWRFConfig:
    """How shadow models are hardened: the settings of the three CWRF callbacks, under their names there.

    Args:
        nonmembers: reference data, as for :class:`~lightning_cwrf.PrivacyScoringCallback`.
        vanilla: ``"own"``: each shadow model's initial weights, from before its training; ``"redraw"``: new ones, as by
            ``PrivacyScoringCallback(vanilla="redraw")``.
        members: what each shadow model is scored on: ``"training"``: its training batches, augmented if the training
            is; ``"plain"``: its own members as the pool gives them, for an audited model whose PrivacyScoringCallback
            was given its plain training data as ``members=``.
        values: as for :class:`~lightning_cwrf.CriticalRewindCallback`; fresh values are drawn from each shadow model's
            own seed.

    >>> CWRFConfig(nonmembers=[], rate=0.05).rate
    0.05
    """

    _identity_name = "CWRF"  # its name in the keys of stores, from before it was renamed

    nonmembers: Batches = field(repr=False)
    rate: float = 0.03
    lam: float = 0.7
    steps: int = 30
    lr: float = 1e-3
    kind: Literal["privacy", "learnability", "random"] = "privacy"
    per_layer: bool = False
    values: Literal["initial", "fresh", "trained", "zero"] = field(default="initial", metadata=_WAS_TO)
    tune: Literal["rest", "masked"] = "rest"
    batch_size: int = 256
    vanilla: Literal["own", "redraw"] = "own"
    members: Literal["training", "plain"] = "training"
    hold: bool = field(default=True, metadata=_CAME_LATER)
    batchnorm: Literal["keep", "reset", "estimate"] = field(default="keep", metadata=_CAME_LATER)
    structured: bool | Literal["heads"] = field(default=False, metadata=_CAME_LATER)
    mode: Literal["eval", "train"] = field(default="eval", metadata=_CAME_LATER)

    def __post_init__(self) -> None:
        check_choice("vanilla", self.vanilla, ("own", "redraw"))
        check_choice("members", self.members, ("training", "plain"))
        check_integer("batch_size", self.batch_size, low=1)
        self._callbacks(_ShadowScoring, {})  # they check their settings
        if not self.hold and self.tune != "rest":
            raise ValueError("tune says which weights are held, and hold=False holds none: leave one of them out.")

    def callbacks(
        self, vanilla: VanillaSource, members: Batches | None = None, *, augmented: bool = False, seed: int = 0
    ) -> list[Callback]:
        """The callbacks that harden your own finished model with these settings.

        Args:
            vanilla: the weights from before its training, as for :class:`~lightning_cwrf.PrivacyScoringCallback`.
            members: its plain training data; needed where ``members="plain"`` and its training is augmented.
            augmented: whether it is.
            seed: of fresh values.

        Raises:
            ValueError: such data are missing, or would have no effect; vanilla weights of another kind than these
                settings say, by which shadow models are hardened.
        """
        if is_redraw(vanilla) != (self.vanilla == "redraw"):
            given = "redraws" if is_redraw(vanilla) else "takes saved weights"
            wanted = "the weights from before its training" if is_redraw(vanilla) else 'vanilla="redraw"'
            raise ValueError(
                f"shadow models of these settings have vanilla={self.vanilla!r}, and your own hardening {given}, which "
                f"is another recipe: pass {wanted} here, or measure a CWRFConfig with the other vanilla=."
            )
        if self.members == "plain" and augmented and members is None:
            raise ValueError(
                'with CWRFConfig(members="plain") and augmentation, pass the plain training data: members=.'
            )
        if self.members == "training" and members is not None:
            raise ValueError('members= has no effect: CWRFConfig(members="training") scores on the training batches.')
        return self._callbacks(PrivacyScoringCallback, vanilla, members, seed)

    def _callbacks(
        self,
        scoring: type[PrivacyScoringCallback],
        vanilla: Any,
        members: Batches | None = None,
        seed: int | None = None,
    ) -> list[Callback]:
        names = ("lam", "steps", "lr", "kind", "batch_size", "mode")
        settings = {name: getattr(self, name) for name in names}
        rewind = CriticalRewindCallback(
            self.rate,
            per_layer=self.per_layer,
            structured=self.structured,
            values=self.values,
            hold=self.hold,
            batchnorm=self.batchnorm,
            seed=seed if self.values == "fresh" else None,
        )
        found: list[Callback] = [scoring(self.nonmembers, vanilla, members=members, **settings), rewind]
        return [*found, GradientMaskCallback(tune=self.tune)] if self.hold else found

    def callbacks_for(
        self, model: LightningModule, initial: Mapping[str, Tensor], members: Batches, seed: int
    ) -> list[Callback]:
        """The callbacks that harden one finished model, with its initial weights, its plain members and its seed."""
        if self.vanilla == "redraw":
            # The model's own seed would draw its initial weights again.
            with isolated_rng(), quiet():
                seed_all(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))
                initial = redraw(model)
        return self._callbacks(_ShadowScoring, dict(initial), members if self.members == "plain" else None, seed)


def rewound(
    model: LightningModule, loader: DataLoader[Any], callbacks: list[Callback], trainer_kwargs: Mapping[str, Any]
) -> WeightMask | None:
    """The mask of the weights to hold, after CWRF's callbacks have scored and rewound a model in a fit without steps.

    None: they are not held.

    A stack then trains the models further as one, and holds the weights of all of them.
    """
    ends = {"min_epochs", "min_steps"}  # before which a Trainer does not stop
    fit(model, loader, [*callbacks, _Stop()], {k: v for k, v in trainer_kwargs.items() if k not in ends}, model)
    chosen = [each.mask for each in callbacks if isinstance(each, (CriticalRewindCallback, GradientMaskCallback))]
    if None in chosen:
        raise RuntimeError("the fit ended before its training started, so nothing was scored or rewound.")
    return chosen[1] if len(chosen) > 1 else None


class _Stop(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


class _ShadowScoring(PrivacyScoringCallback):
    """Scoring of a shadow model, which is trained however little its recipe trains it."""

    def check_model(self, *given: Any) -> None:
        pass


def config_of(callbacks: Sequence[Callback], loader: Any, *, augmented: bool) -> CWRFConfig | None:
    """The settings of the CWRF callbacks among a Trainer's, with the loader of its training; None: there are none."""
    ours = {kind: each for kind in CALLBACKS for each in callbacks if isinstance(each, kind)}
    if not ours:
        return None
    _check_wiring(ours)
    settings = {name: value for kind, each in ours.items() for name, value in _settings_of(kind, each).items()}
    scoring: Any = ours[PrivacyScoringCallback]
    redrawn = is_redraw(scoring.vanilla)
    for name in ("nonmembers", "members"):
        if isinstance(getattr(scoring, name), (str, LightningDataModule)):
            raise ValueError(
                f"PrivacyScoringCallback({name}=...) names a split, whose loader is known once its Trainer has fitted: "
                "read the recipe after the fit, or pass the loader instead."
            )
    members = _members_of(scoring.members, loader, augmented)
    return CWRFConfig(**settings, vanilla="redraw" if redrawn else "own", members=members)


def _check_wiring(ours: Mapping[Any, Any]) -> None:
    rewind = ours.get(CriticalRewindCallback)
    hold = rewind is None or rewind.hold
    lacking = [kind for kind in CALLBACKS if kind not in ours and (hold or kind is not GradientMaskCallback)]
    if lacking:
        raise ValueError(
            "shadow models score, rewind and freeze their own weights: the Trainer needs PrivacyScoringCallback, "
            "CriticalRewindCallback and, unless hold=False, GradientMaskCallback."
        )
    if not hold and GradientMaskCallback in ours:
        raise ValueError(
            "CriticalRewindCallback(hold=False) trains the rewound weights on, and GradientMaskCallback holds weights: "
            "the Trainer must have one of them without the other."
        )


_READ_APART = {
    (PrivacyScoringCallback, "vanilla"),
    (PrivacyScoringCallback, "members"),
    (PrivacyScoringCallback, "keep_scores"),  # for the user to save; it shapes nothing
    (CriticalRewindCallback, "seed"),  # each shadow model's own
}

_HELD_AS = {"mask": "given_mask"}
"""Parameters of callbacks whose attribute has another name."""

_OF_ONE_MODEL: dict[tuple[type, str], str] = {
    (CriticalRewindCallback, "scores"): "each shadow model scores its own weights, on its own members",
    (CriticalRewindCallback, "mask"): "each shadow model chooses its own weights, by its own scores",
    (CriticalRewindCallback, "vanilla"): "each shadow model is rewound to the weights that it is scored against",
    (GradientMaskCallback, "mask"): "each shadow model chooses its own weights, by its own scores",
}
"""Settings of a callback that belong to one model, and why."""


def _settings_of(kind: type[Callback], callback: Callback) -> dict[str, Any]:
    """A callback's settings that :class:`CWRFConfig` has too; any other that was given is an error."""
    known = {each.name for each in fields(CWRFConfig)}
    settings = {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if (kind, name) in _READ_APART:
            continue
        value = getattr(callback, _HELD_AS.get(name, name))
        if name in known and (kind, name) not in _OF_ONE_MODEL:
            settings[name] = value
        elif value is not parameter.default:
            why = _OF_ONE_MODEL.get((kind, name), "CWRFConfig has no such setting")
            raise ValueError(
                f"{kind.__name__}({name}=...) cannot be carried to shadow models: {why}. Leave it out, or write the "
                "recipe as a function of your own."
            )
    return settings


def _members_of(given: Batches | None, loader: Any, augmented: bool) -> Literal["training", "plain"]:
    """Whether a model was scored on its training batches or on its members as the data set gives them."""
    if given is None:
        return "training"
    source = given.dataset if isinstance(given, DataLoader) else given
    if augmented:  # their content differs each time
        same = isinstance(source, Sized) and len(source) == len(loader.dataset)
    else:
        trained = DataLoader(loader.dataset, batch_size=256, collate_fn=loader.collate_fn)
        with isolated_rng():
            found = all_digests(given)
            same = found is not None and found == all_digests(trained)
    if not same:
        raise ValueError(
            "PrivacyScoringCallback(members=...) are other data than the training data, so it is unknown what a shadow "
            "model should be scored on instead. Pass the plain training data, leave members out, or write the recipe "
            "as a function of your own."
        )
    return "plain"
