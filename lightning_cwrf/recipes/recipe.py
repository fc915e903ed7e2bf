"""A recipe for shadow models: module, Trainer, loader, defense and CWRF."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_cwrf.callbacks.defense import defense_of
from lightning_cwrf.checks import check_flag, check_integer
from lightning_cwrf.data import Batches, OverlapCheck, SeededOrder, all_digests, isolated_rng
from lightning_cwrf.data.seen import SCORED, seen_by
from lightning_cwrf.defenses import Defense
from lightning_cwrf.recipes.cwrf import CWRF
from lightning_cwrf.recipes.stacked import check_stackable, train_stack
from lightning_cwrf.shadows.jobs import seed_all
from lightning_cwrf.weights.vanilla import capture, redraw

_QUIET = {
    "accelerator": "auto",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@dataclass(frozen=True)
class ShadowRecipe:
    """Trains a shadow model as yours was trained; for :func:`~lightning_cwrf.train_shadows`.

    :meth:`like` reads it from a finished training. Its fields are what shadow models are known by in a store;
    ``dataclasses.replace`` makes variants, such as other rates. What it trains depends on the examples, the seed and
    the start alone.

    Args:
        module: a function without arguments (a class, a ``functools.partial``) that builds the untrained module.
        trainer: arguments of the Trainer, such as ``{"max_epochs": 40}``; plain values.
        batch_size: examples in a step.
        drop_last: leave a shorter last batch out.
        shuffle: draw another order each epoch, from the model's seed.
        collate: as DataLoader's ``collate_fn``.
        augment: a function of one example of the pool, as the data set gives it, called anew each time it is read.
        callbacks: a function that makes further callbacks that shape the training.
        defense: :func:`~lightning_cwrf.defenses.create_defense`.
        cwrf: rewind and freeze before fine-tuning; the models then go on from base models, ``start=``.
        examples: how many training examples the audited model has. Shadow models of a very different number, which is
            half of the pool, are another training: a warning says so.

    Raises:
        TypeError: something that must be a function is none.
        ValueError: unknown arguments of a Trainer, or such as make it speak.

    >>> from lightning_cwrf.defenses import create_defense
    >>> base = ShadowRecipe(LightningModule, {"max_epochs": 60}, batch_size=32)
    >>> from dataclasses import replace
    >>> tuned = replace(base, trainer={"max_epochs": 40}, defense=create_defense("relaxloss", alpha=1.0))
    """

    module: Callable[[], LightningModule]
    trainer: Mapping[str, Any]
    batch_size: int
    drop_last: bool = False
    shuffle: bool = True
    collate: Callable[[list[Any]], Any] | None = None
    augment: Callable[[Any], Any] | None = None
    callbacks: Callable[[], list[Callback]] | None = None
    defense: Defense | None = None
    cwrf: CWRF | None = None
    examples: int | None = None

    def __post_init__(self) -> None:
        for name in ("module", "callbacks", "augment", "collate"):
            value = getattr(self, name)
            if (value is not None and not callable(value)) or isinstance(value, nn.Module):
                raise TypeError(
                    f"{name} must be a function, not a {type(value).__name__}: it is called for each model."
                )
        if not isinstance(self.trainer, Mapping):
            raise TypeError(f"trainer must be a dict of a Trainer's arguments, not a {type(self.trainer).__name__}.")
        for name, kind, make in (("defense", Defense, "create_defense(name, ...)"), ("cwrf", CWRF, "CWRF(nonmembers)")):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                what = value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"
                raise TypeError(f"{name} must be what {make} gives, not {what}.")
        unknown = sorted(set(self.trainer) - set(inspect.signature(Trainer.__init__).parameters))
        if unknown:
            raise ValueError(f"a Trainer has no argument {', '.join(unknown)}.")
        ours = sorted({"callbacks", *_QUIET}.intersection(self.trainer) - {"accelerator", "devices"})
        if ours:
            raise ValueError(
                f"a shadow model's Trainer cannot be given {', '.join(ours)}: it trains quietly, by itself."
            )
        check_integer("batch_size", self.batch_size, low=1)
        check_flag("drop_last", self.drop_last)
        check_flag("shuffle", self.shuffle)
        if self.examples is not None:
            check_integer("examples", self.examples, low=1)

    @classmethod
    def like(
        cls,
        trainer: Trainer,
        model: LightningModule,
        *,
        module: Callable[[], LightningModule] | None = None,
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
            module: builds the module; None: its class with ``model.hparams`` (``save_hyperparameters()``).
            loader: the training loader; None: the Trainer's, once it has trained.
            augment: what the training data's random augmentation does; it cannot be read from a loader.
            callbacks: makes those further callbacks of the Trainer that shape the training.
            defense: the defense; None: the one attached to the model, if any.

        Raises:
            ValueError: something that shapes the training cannot be read, with what to pass instead.
        """
        from lightning_cwrf.recipes.like import read_recipe

        return read_recipe(cls, trainer, model, module, loader, augment, callbacks, defense)

    def __call__(self, members: Dataset[Any], seed: int, start: Mapping[str, Tensor] | None = None) -> LightningModule:
        """Train one model.

        Args:
            members: its training examples.
            seed: of weights, order and whatever the training draws; Python, NumPy and torch are seeded with it.
            start: state dict of the base model to go on from; with ``cwrf`` it is needed.
        """
        (model,), (vanilla,) = self._build([seed], [start])
        seed_all(seed)
        callbacks = [] if self.callbacks is None else self.callbacks()
        callbacks += [] if self.cwrf is None else self._hardening(self.cwrf, model, members, vanilla, seed)
        loader = DataLoader(
            members if self.augment is None else _Augmented(members, self.augment),
            batch_size=self.batch_size,
            sampler=SeededOrder(len(members), seed) if self.shuffle else None,  # type: ignore[arg-type]
            drop_last=self.drop_last,
            collate_fn=self.collate,
        )
        self._fit(model, loader, callbacks, model)
        return model

    def _hardening(
        self, cwrf: CWRF, model: LightningModule, members: Dataset[Any], own: Mapping[str, Tensor], seed: int
    ) -> list[Callback]:
        """The callbacks of CWRF for one model; ``own`` are its initial weights."""
        vanilla = own
        if cwrf.vanilla == "redraw":
            # Under a seed of its own: the model's would draw the model's initial weights again.
            with isolated_rng(), _quiet():
                seed_all(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))
                vanilla = redraw(model)
        plain = DataLoader(members, batch_size=self.batch_size, collate_fn=self.collate)
        return cwrf.callbacks(vanilla, plain if cwrf.members == "plain" else None)

    def train_stack(
        self,
        pool: Dataset[Any],
        members: Sequence[Sequence[int]],
        seeds: Sequence[int],
        starts: Sequence[Mapping[str, Tensor]] = (),
    ) -> list[LightningModule]:
        """Train K models as one vectorised model; each comes out as it would alone, but for rounding.

        Args:
            pool: all examples.
            members: for each model the places of its examples; as many for each.
            seeds: of each model.
            starts: state dict of the base model of each, or empty.

        Raises:
            ValueError: the models cannot be trained so (why).
        """
        self._check_stack()
        models, _ = self._build(seeds, starts or [None] * len(seeds))
        check_stackable(models[0])
        orders = [SeededOrder(len(members[0]), seed) if self.shuffle else range(len(members[0])) for seed in seeds]
        return train_stack(models, pool, members, orders, self.batch_size, self.drop_last, self._fit)

    def build(self) -> LightningModule:
        """The untrained module with its defense.

        Raises:
            TypeError: ``module`` builds no LightningModule.
        """
        model = self.module()
        if not isinstance(model, LightningModule):
            raise TypeError(f"module must build a LightningModule, not a {type(model).__name__}.")
        if self.defense is not None:
            with _quiet():
                self.defense.attach(model)
        return model

    def differences(self, model: nn.Module) -> list[str]:
        """How ``model`` was visibly not trained by this recipe: another architecture, another defense, or CWRF.

        Much cannot be seen: a checkpoint that was loaded into the user's own class has lost its defense and its record
        of CWRF, and nothing in a model tells its epochs or its data.

        >>> from lightning_cwrf import RelaxLossMixin
        >>> plain = ShadowRecipe(LightningModule, {"max_epochs": 1}, batch_size=32)
        >>> plain.differences(RelaxLossMixin.attach(LightningModule(), alpha=0.5))
        ['it was trained with RelaxLossMixin (alpha=0.5, upper=1.0), and they with no defense']
        """
        if not isinstance(model, LightningModule):  # a wrapper of one, or a module of another kind
            return []
        with isolated_rng():
            own = self.build()
        found = []
        shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (own, model)]
        if shapes[0] != shapes[1]:
            found.append("its weights have other names or shapes than theirs")
        trained, theirs = defense_of(model), defense_of(own)
        if trained is not None and _named(trained) != _named(theirs):
            found.append(f"it was trained with {_named(trained)}, and they with {_named(theirs)}")
        if self.cwrf is None and SCORED in seen_by(model):
            found.append("it was hardened by CWRF, and they were not")
        return found

    def check(
        self, pool: Dataset[Any], *, population: Dataset[Any] | None = None, start: bool = False, stack: int = 1
    ) -> None:
        """What can be known to be wrong before any shadow model is trained; ``train_shadows`` asks for it.

        Raises:
            TypeError: ``module`` builds no LightningModule.
            ValueError: CWRF without base models, reference data or a defense's data that are in the pool or the
                population, a stack that cannot be.
        """
        if self.cwrf is not None:
            _check_start(start)
        for name, data in self._data().items():
            OverlapCheck(pool, data, name)
            if population is not None:
                _check_apart(population, data, name)
        with isolated_rng():
            model = self.build()
        if stack > 1:
            self._check_stack()
            check_stackable(model)
        half = len(pool) // 2  # type: ignore[arg-type]
        if self.examples is not None and not 0.8 <= half / self.examples <= 1.25:
            warnings.warn(
                f"shadow models train on half of the pool, {half} examples, and the audited model on {self.examples}: "
                "the attack assumes they were trained on equally many. A pool should hold the members and as many "
                "non-members.",
                stacklevel=3,
            )

    def _data(self) -> dict[str, Batches]:
        """Data that shape the models beside their training examples, by what to call them."""
        found = {} if self.cwrf is None else {"CWRF's nonmembers": self.cwrf.nonmembers}
        if self.defense is not None:
            for name, value in self.defense.data_settings.items():
                found[f"{self.defense.mixin.__name__}'s {name}"] = value
        return found

    def _check_stack(self) -> None:
        for name, what in (
            ("cwrf", "CWRF's callbacks score and freeze one model at a time"),
            ("callbacks", "further callbacks look at one model"),
            ("augment", "augmentation draws for one model at a time"),
            ("collate", "batches are cut from one tensor"),
        ):
            if getattr(self, name) is not None:
                raise ValueError(f"a recipe with {name} cannot be stacked: {what}. Leave stack=1.")

    def _build(
        self, seeds: Sequence[int], starts: Sequence[Mapping[str, Tensor] | None]
    ) -> tuple[list[LightningModule], list[dict[str, Tensor]]]:
        """The models before this training, and the weights that they had before any."""
        models, vanilla = [], []
        for seed, start in zip(seeds, starts, strict=True):
            if self.cwrf is not None:
                _check_start(start is not None)
            seed_all(seed)
            model = self.build()
            vanilla.append(capture(model))
            if start is not None:
                model.load_state_dict(start)
            models.append(model)
        return models, vanilla

    def _fit(self, module: LightningModule, batches: Any, callbacks: list[Callback], *models: nn.Module) -> None:
        """Run one quiet ``Trainer.fit``, and leave ``models`` on the device it ran on."""
        with _quiet():
            trainer = Trainer(**{**_QUIET, **self.trainer, "callbacks": callbacks})
            trainer.fit(module, batches)
        for model in models:
            model.to(trainer.strategy.root_device)


def _named(defense: Defense | None) -> str:
    if defense is None:
        return "no defense"
    settings = defense.named()
    name = settings.pop("name")
    return f"{name} ({', '.join(f'{key}={value}' for key, value in settings.items())})" if settings else str(name)


def _check_start(given: bool) -> None:
    if not given:
        raise ValueError(
            "CWRF hardens finished models: train base models first (the recipe without cwrf, keep_weights=True), and "
            "pass them as start=."
        )


def _check_apart(population: Dataset[Any], data: Batches, name: str) -> None:
    inside, outside = all_digests(population), all_digests(data)
    common = len(inside & outside) if inside is not None and outside is not None else 0
    if common:
        raise ValueError(
            f"{common} examples of the population are among {name}, which shape the models, and no shadow model may "
            "see the population. Take them out of one of the two."
        )


class _Augmented(Dataset[Any]):
    def __init__(self, data: Dataset[Any], augment: Callable[[Any], Any]) -> None:
        self.data = data
        self.augment = augment

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.augment(self.data[index])


@contextmanager
def _quiet() -> Iterator[None]:
    """Many trainings in a row: Lightning's advice on devices and loaders would be said for each."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            said = "many workers|number of training batches|treespec|validation_step|fix=True replaced|vanilla='redraw'"
            warnings.filterwarnings("ignore", f".*({said}).*")
            yield
    finally:
        logger.setLevel(level)
