"""A recipe for shadow models: module, Trainer, loader, defense and CWRF."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_cwrf._deprecated import renamed
from lightning_cwrf.checks import check_flag, check_integer
from lightning_cwrf.data import OverlapCheck, SeededOrder, isolated_rng
from lightning_cwrf.defenses import Defense
from lightning_cwrf.recipes.compare import check_no_models, check_rebuilt, differences
from lightning_cwrf.recipes.cwrf import CWRFConfig, rewound
from lightning_cwrf.recipes.fit import SILENT, Augmented, fit, quiet
from lightning_cwrf.recipes.like import read_training
from lightning_cwrf.recipes.stacking import StackedBatches, check_stackable, train_stack
from lightning_cwrf.shadows.jobs import seed_all
from lightning_cwrf.trainers import refuse_pytorch_lightning
from lightning_cwrf.weights.vanilla import capture

_CHECKED = {"defense": (Defense, "create_defense(name, ...)"), "cwrf": (CWRFConfig, "CWRFConfig(nonmembers)")}
"""Fields with a type of ours, and what makes one."""


@renamed(module="build_module", trainer="trainer_kwargs", collate="collate_fn")
@dataclass(frozen=True)
class ShadowRecipe:
    """Trains a shadow model as yours was trained; for :func:`~lightning_cwrf.train_shadows`.

    :meth:`like` reads it off a finished training. A store identifies shadow models by its fields;
    ``dataclasses.replace`` makes variants, such as other rates. What it trains is a function of the examples, the seed
    and the base model alone.

    Args:
        build_module: a function without arguments (a class, a ``functools.partial``) that builds the untrained module.
        trainer_kwargs: arguments of the Trainer, such as ``{"max_epochs": 40}``; plain values.
        batch_size: examples per step.
        drop_last: leave out a shorter last batch.
        shuffle: draw a new order each epoch, from the model's seed.
        collate_fn: as for a DataLoader.
        augment: a function of one example of the pool, as the data set gives it, called each time it is read.
        callbacks: a function that makes further callbacks that shape the training.
        defense: :func:`~lightning_cwrf.defenses.create_defense`.
        cwrf: rewind and freeze before fine-tuning; the models are then fine-tuned from base models
            (``train_shadows(base=...)``).
        examples: how many training examples the audited model has. Shadow models have half of the pool; a warning says
            so if these numbers are very different.

    Raises:
        TypeError: something that must be a function is not one.
        ValueError: unknown arguments of a Trainer, or arguments that would make it log or print.

    >>> from lightning_cwrf.defenses import create_defense
    >>> base = ShadowRecipe(LightningModule, {"max_epochs": 60}, batch_size=32)
    >>> from dataclasses import replace
    >>> tuned = replace(base, trainer_kwargs={"max_epochs": 40}, defense=create_defense("relaxloss", alpha=1.0))
    """

    # Stores know renamed fields by their old names, so that the models in them are found again.
    build_module: Callable[[], LightningModule] = field(metadata={"identity": "module"})
    trainer_kwargs: Mapping[str, Any] = field(metadata={"identity": "trainer"})
    batch_size: int
    drop_last: bool = False
    shuffle: bool = True
    collate_fn: Callable[[list[Any]], Any] | None = field(default=None, metadata={"identity": "collate"})
    augment: Callable[[Any], Any] | None = None
    callbacks: Callable[[], list[Callback]] | None = None
    defense: Defense | None = None
    cwrf: CWRFConfig | None = None
    examples: int | None = None

    def __post_init__(self) -> None:
        for name in ("build_module", "callbacks", "augment", "collate_fn"):
            value = getattr(self, name)
            if (value is not None and not callable(value)) or isinstance(value, nn.Module):
                raise TypeError(
                    f"{name} must be a function, not a {type(value).__name__}: it is called for each model."
                )
        if not isinstance(self.trainer_kwargs, Mapping):
            raise TypeError(
                f"trainer_kwargs must be a dict of a Trainer's arguments, not a {type(self.trainer_kwargs).__name__}."
            )
        for name, (kind, make) in _CHECKED.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                what = value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"
                raise TypeError(f"{name} must be what {make} returns, not {what}.")
        unknown = sorted(set(self.trainer_kwargs) - set(inspect.signature(Trainer.__init__).parameters))
        if unknown:
            raise ValueError(f"a Trainer has no argument {', '.join(unknown)}.")
        ours = sorted({"callbacks", *SILENT}.intersection(self.trainer_kwargs))
        if ours:
            raise ValueError(f"a shadow model's Trainer cannot be given {', '.join(ours)}: it trains silently.")
        check_integer("batch_size", self.batch_size, low=1)
        check_flag("drop_last", self.drop_last)
        check_flag("shuffle", self.shuffle)
        if self.examples is not None:
            check_integer("examples", self.examples, low=1)

    @classmethod
    @renamed(module="build_module")
    def like(
        cls,
        trainer: Trainer,
        model: LightningModule,
        *,
        build_module: Callable[[], LightningModule] | None = None,
        loader: DataLoader[Any] | None = None,
        augment: Callable[[Any], Any] | None = None,
        callbacks: Callable[[], list[Callback]] | None = None,
        defense: Defense | None = None,
    ) -> ShadowRecipe:
        """The recipe of a training that is set up or finished: ``trainer.fit(model, loader)``.

        Module and settings come from the model's saved hyper-parameters, the defense from the model, CWRF from its
        callbacks, epochs, clipping and precision from the Trainer, and batches from its training loader.

        Args:
            trainer: the Trainer of the training.
            model: its module.
            build_module: builds the module; None: its class with ``model.hparams`` (``save_hyperparameters()``).
            loader: the training loader; None: the Trainer's, once it has trained.
            augment: the random augmentation of the training data; it cannot be read from a loader.
            callbacks: makes the Trainer's further callbacks that shape the training.
            defense: the defense; None: the one attached to the model, if any.

        Raises:
            ValueError: something that shapes the training cannot be read; it says what to pass instead.
        """
        recipe = cls(**read_training(trainer, model, build_module, loader, augment, callbacks, defense))
        with isolated_rng():
            check_rebuilt(recipe.build(), model, may_freeze=callbacks is not None)
        return recipe

    @renamed(start="base")
    def __call__(self, members: Dataset[Any], seed: int, base: Mapping[str, Tensor] | None = None) -> LightningModule:
        """Train one model.

        Args:
            members: its training examples.
            seed: of weights, order and all other randomness; Python, NumPy and torch are seeded with it.
            base: state dict of the base model to fine-tune; required with ``cwrf``.
        """
        (model,), (vanilla,) = self._build([seed], [base])
        loader, callbacks = self._set_up(model, vanilla, members, seed)
        fit(model, loader, callbacks, self.trainer_kwargs, model)
        return model

    @renamed(starts="bases")
    def train_stack(
        self,
        pool: Dataset[Any],
        members: Sequence[Sequence[int]],
        seeds: Sequence[int],
        bases: Sequence[Mapping[str, Tensor]] = (),
    ) -> list[LightningModule]:
        """Train K models as one vectorised model; each result is that of training it alone, up to rounding.

        Args:
            pool: all examples.
            members: for each model the indices of its examples, equally many for each.
            seeds: of each model.
            bases: state dict of the base model of each, or empty.

        Raises:
            ValueError: the models cannot be stacked (with the reason).
        """
        models, vanilla = self._build(seeds, bases or [None] * len(seeds))
        check_stackable(self, models[0])
        orders, masks = [], []
        for model, initial, places, seed in zip(models, vanilla, members, seeds, strict=True):
            loader, callbacks = self._set_up(model, initial, Subset(pool, places), seed)
            orders.append(loader.sampler)
            if callbacks:
                mask = rewound(model, loader, callbacks, self.trainer_kwargs)
                masks += [] if mask is None else [mask]
        batches = StackedBatches(pool, members, orders, self.batch_size, self.drop_last)
        return train_stack(models, seeds, batches, masks, self.trainer_kwargs)

    def build(self) -> LightningModule:
        """The untrained module with its defense.

        Raises:
            TypeError: ``build_module`` does not build a LightningModule.
        """
        model = self.build_module()
        refuse_pytorch_lightning(model)
        if not isinstance(model, LightningModule):
            raise TypeError(f"build_module must build a LightningModule, not a {type(model).__name__}.")
        if self.defense is not None:
            with quiet():
                self.defense.attach(model)
        return model

    def differences(self, model: nn.Module) -> list[str]:
        """Visible differences between the training of ``model`` and this recipe: architecture, defense, CWRF.

        Many differences are invisible: a checkpoint that was loaded into the user's own class has lost its defense and
        its record of CWRF, and a model does not show its epochs or its data.

        >>> from lightning_cwrf import RelaxLossMixin
        >>> plain = ShadowRecipe(LightningModule, {"max_epochs": 1}, batch_size=32)
        >>> plain.differences(RelaxLossMixin.attach(LightningModule(), alpha=0.5))
        ['it was trained with RelaxLossMixin (alpha=0.5, upper=1.0), and they with no defense']
        """
        if not isinstance(model, LightningModule):  # a wrapper of one, or a module of another kind
            return []
        with isolated_rng():
            built = self.build()
        return differences(built, model, with_cwrf=self.cwrf is not None)

    @renamed(start="base")
    def check(
        self, pool: Dataset[Any], *, population: Dataset[Any] | None = None, base: bool = False, stack: int = 1
    ) -> None:
        """Check the arguments of ``train_shadows``, which calls this; ``base``: there are base models.

        Raises:
            TypeError: ``build_module`` does not build a LightningModule.
            ValueError: CWRF without base models, reference data or a defense's data that are in the pool or the
                population, a defense with models of the data (DMP, SELENA), or a stack that is impossible.
        """
        if self.cwrf is not None:
            _check_base(base)
        shaping = {} if self.cwrf is None else {"CWRF's nonmembers": self.cwrf.nonmembers}
        if self.defense is not None:
            mixin = self.defense.mixin.__name__
            shaping |= {f"{mixin}'s {name}": data for name, data in self.defense.data_settings.items()}
        for name, data in shaping.items():
            check_no_models(name, data)
            OverlapCheck(pool, data, name)
            if population is not None:
                OverlapCheck(population, data, name, "in the population, which no shadow model may see")
        with isolated_rng():
            model = self.build()
        if stack > 1:
            check_stackable(self, model)
        half = len(pool) // 2  # type: ignore[arg-type]
        if self.examples is not None and not 0.8 <= half / self.examples <= 1.25:
            warnings.warn(
                f"shadow models train on half of the pool, {half} examples, and the audited model on {self.examples}: "
                "the attack assumes equally many. A pool should hold the members and as many non-members.",
                stacklevel=5,
            )

    def _set_up(
        self, model: LightningModule, vanilla: Mapping[str, Tensor], members: Dataset[Any], seed: int
    ) -> tuple[DataLoader[Any], list[Callback]]:
        """Loader and callbacks of one model's training, and the random state at its start."""
        seed_all(seed)
        callbacks = [] if self.callbacks is None else self.callbacks()
        if self.cwrf is not None:
            plain = DataLoader(members, batch_size=self.batch_size, collate_fn=self.collate_fn)
            callbacks += self.cwrf.callbacks_for(model, vanilla, plain, seed)
        loader = DataLoader(
            members if self.augment is None else Augmented(members, self.augment),
            batch_size=self.batch_size,
            sampler=SeededOrder(len(members), seed) if self.shuffle else None,  # type: ignore[arg-type]
            drop_last=self.drop_last,
            collate_fn=self.collate_fn,
        )
        return loader, callbacks

    def _build(
        self, seeds: Sequence[int], bases: Sequence[Mapping[str, Tensor] | None]
    ) -> tuple[list[LightningModule], list[dict[str, Tensor]]]:
        """The models before this training, and their initial weights."""
        models, vanilla = [], []
        for seed, base in zip(seeds, bases, strict=True):
            if self.cwrf is not None:
                _check_base(base is not None)
            seed_all(seed)
            model = self.build()
            vanilla.append(capture(model))
            if base is not None:
                model.load_state_dict(base)
            models.append(model)
        return models, vanilla


def _check_base(given: bool) -> None:
    if not given:
        raise ValueError(
            "CWRF hardens finished models: train base models first (the recipe without cwrf, keep_weights=True), and "
            "pass them as base=."
        )
