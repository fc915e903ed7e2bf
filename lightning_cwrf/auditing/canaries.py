"""Canaries: training examples that are included with probability 1/2, to audit the privacy of one training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset

from lightning_cwrf.attacks import Attack, Evidence, create_attacks
from lightning_cwrf.checks import check_flag, check_integer
from lightning_cwrf.classification import TARGET_KEYS, split_batch
from lightning_cwrf.data import isolated_rng
from lightning_cwrf.metrics.functional import exposure, one_run_epsilon, one_run_mu
from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.targets import class_indices


@dataclass(frozen=True)
class Canaries:
    """A training set with canaries in it, and what an audit of the one model that is trained on it needs.

    Attributes:
        train: what to train on: every example that is not a canary, and the included canaries, in their old order.
        examples: all m canaries, included or not, with the labels for training.
        included: bool ``(m,)``.
        places: ``(m,)``, the index of each canary in the original training set.
    """

    train: Dataset[Any] = field(repr=False)
    examples: Dataset[Any] = field(repr=False)
    included: Tensor = field(repr=False)
    places: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.included)

    def __repr__(self) -> str:
        return f"Canaries({len(self)} of which {int(self.included.sum())} are included)"

    def epsilon(
        self,
        model: nn.Module,
        *,
        guesses: int | None = None,
        delta: float = 0.0,
        confidence: float = 0.95,
        attack: str | Attack = "loss",
    ) -> Tensor:
        """A lower bound on the ε of the training of ``model`` on :attr:`train`: an attack guesses which were included.

        For scores of your own: :func:`~lightning_cwrf.metrics.functional.one_run_epsilon` with :attr:`included`.

        Args:
            model: trained on :attr:`train`, once; it is not changed.
            guesses: as for :func:`~lightning_cwrf.metrics.functional.one_run_epsilon`; choose it in advance, or None.
            delta: δ.
            confidence: of the bound.
            attack: by name or from :func:`~lightning_cwrf.attacks.create_attack`; it may only need the model's
                outputs.

        Returns:
            A scalar float64 tensor; 0 if nothing can be shown.

        Raises:
            ValueError: an attack that needs more than outputs; settings out of range; outputs that are not logits.
        """
        scores = self._scores(model, attack)
        return one_run_epsilon(scores, self.included, guesses=guesses, delta=delta, confidence=confidence)

    def mu(
        self, model: nn.Module, *, guesses: int | None = None, confidence: float = 0.95, attack: str | Attack = "loss"
    ) -> Tensor:
        """A lower bound on the μ for which the training can be μ-GDP; arguments and errors as for :meth:`epsilon`.

        :func:`~lightning_cwrf.metrics.functional.gaussian_epsilon` gives the ε of a μ at a δ.
        """
        return one_run_mu(self._scores(model, attack), self.included, guesses=guesses, confidence=confidence)

    def exposure(self, model: nn.Module, *, attack: str | Attack = "loss") -> Tensor:
        """How far each included canary stands out from those that were left out, in bits: ``(included,)``, in order.

        :func:`~lightning_cwrf.metrics.functional.exposure`, with the canaries that were not included as references; at
        most log2(1 + their number). About 1.44 on average if nothing is memorised. Arguments and errors are those of
        :meth:`epsilon`; ValueError too where no canary is included, or none is left out.
        """
        scores = self._scores(model, attack)
        if not 0 < int(self.included.sum()) < len(self):
            raise ValueError("an exposure needs canaries that are included and some that are not; insert more.")
        return exposure(scores[self.included], scores[~self.included])

    def _scores(self, model: nn.Module, attack: str | Attack) -> Tensor:
        (chosen,) = create_attacks([attack])
        if chosen.needs:
            raise ValueError(
                f"the {chosen.name} attack needs {', '.join(chosen.needs)}; compute its scores of the examples, and "
                "pass them with included to lightning_cwrf.metrics.functional.one_run_epsilon."
            )
        outputs = collect_outputs(model, self.examples, name="canaries")
        return chosen(Evidence(outputs.logits, outputs.targets))


def insert_canaries(
    train: Dataset[Any], m: int, *, classes: int | None = None, mislabel: bool = True, seed: int = 0
) -> Canaries:
    """Make m examples of a training set canaries, for auditing with one training run (Steinke et al. 2023).

    Each canary is included independently with probability 1/2. Wrong labels can only be memorised, so they reveal most;
    they cost accuracy. Canaries are identified by their index, so random augmentation does no harm.

    Args:
        train: a data set of ``(input, target)`` or of mappings with the target under one of ``labels``, ``label``,
            ``targets``, ``target``, ``y``. Items keep their form.
        m: how many; the largest ε that can be shown grows with m.
        classes: K. None: one more than the largest label; all of ``train`` is read for it.
        mislabel: give each canary a label drawn uniformly from the K − 1 wrong ones.
        seed: of the choice, the labels and the inclusion; the caller's random state is not touched.

    Raises:
        TypeError: ``train`` cannot be read by index, or its items have another form.
        ValueError: m out of range, fewer than 2 classes, or labels that are not class indices below K.

    >>> from torch.utils.data import TensorDataset
    >>> canaries = insert_canaries(TensorDataset(torch.randn(100, 4), torch.arange(100) % 3), m=20)
    >>> len(canaries), len(canaries.train) == 80 + int(canaries.included.sum())
    (20, True)
    >>> float(canaries.epsilon(nn.Linear(4, 3)))  # it was not trained
    0.0
    """
    if not isinstance(train, Dataset) or isinstance(train, IterableDataset) or not hasattr(train, "__len__"):
        raise TypeError(f"canaries need a data set with a length that is read by index, not {type(train).__name__}.")
    total = len(train)
    check_integer("m", m, low=2, high=total, hint=f"There are {total} training examples.")
    check_integer("seed", seed, low=0)
    check_flag("mislabel", mislabel)
    if classes is not None:
        check_integer("classes", classes, low=2, hint="There must be a wrong label.")
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(total, generator=generator)[:m]
    included = torch.randint(2, (m,), generator=generator).bool()
    draws = torch.rand(m, generator=generator, dtype=torch.float64)
    labels = _wrong_labels(train, places.tolist(), draws, classes) if mislabel else {}
    out = set(places[~included].tolist())
    return Canaries(
        train=_Relabelled(train, [i for i in range(total) if i not in out], labels),
        examples=_Relabelled(train, places.tolist(), labels),
        included=included,
        places=places,
    )


class _Relabelled(Subset[Any]):
    """Some examples of a data set, some of them with other labels."""

    def __init__(self, data: Dataset[Any], places: list[int], labels: dict[int, int]) -> None:
        super().__init__(data, places)
        self.labels = labels

    def __getitem__(self, index: Any) -> Any:
        place = self.indices[index]
        item = self.dataset[place]
        return _with_target(item, self.labels[place]) if place in self.labels else item

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def _wrong_labels(train: Dataset[Any], places: list[int], draws: Tensor, classes: int | None) -> dict[int, int]:
    """For each place a label drawn uniformly from all but its own; ``draws`` are uniform on [0, 1)."""
    read = range(len(train)) if classes is None else places  # type: ignore[arg-type]
    with isolated_rng():  # reading may augment at random
        own = {place: _label(train[place], place) for place in read}
    classes = 1 + max(own.values()) if classes is None else classes
    if classes < 2:
        raise ValueError("a wrong label needs at least 2 classes, and every label is 0; pass classes=.")
    high = next((place for place in own if own[place] >= classes), None)
    if high is not None:
        raise ValueError(f"label {own[high]} of example {high} is out of range: labels go from 0 to {classes - 1}.")
    others = (draws * (classes - 1)).long().tolist()
    return {place: other + (other >= own[place]) for place, other in zip(places, others, strict=True)}


def _label(item: Any, place: int) -> int:
    target = class_indices(torch.as_tensor(split_batch(item)[1]))
    if target.numel() != 1 or target.is_floating_point() or target.dtype == torch.bool or int(target) < 0:
        raise ValueError(
            f"the target of example {place} is not a class index: {target.dtype} of shape {tuple(target.shape)}"
            f"{f' and value {target.item()}' if target.numel() == 1 else '; turn one-hot targets into indices'}."
        )
    return int(target)


def _with_target(item: Any, label: int) -> Any:
    """The item with another target, in the old one's type."""
    target: Any = split_batch(item)[1]
    new: Any
    if isinstance(target, Tensor):
        new = torch.full_like(target, label)
    else:
        new = np.full_like(target, label) if isinstance(target, np.ndarray) else type(target)(label)
    if isinstance(item, Mapping):
        key = next(key for key in TARGET_KEYS if key in item)
        return {**item, key: new}
    if hasattr(item, "_fields"):
        return type(item)(item[0], new)
    return type(item)((item[0], new))
