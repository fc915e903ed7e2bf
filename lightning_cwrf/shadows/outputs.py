"""What trained shadow models give: their outputs on the pool and the population."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_cwrf.arrays import read_logits, read_targets, read_tensor
from lightning_cwrf.data import isolated_rng
from lightning_cwrf.shadows.jobs import Recipe, View
from lightning_cwrf.shadows.pool import read_once
from lightning_cwrf.shadows.store import ShadowStore


@dataclass(frozen=True)
class ShadowOutputs:
    """Outputs of k shadow models on a pool of n examples, and on a population of m that none of them was trained on.

    Attributes:
        logits: ``(k, n, K)``, in float32 or the dtype they were stored in.
        membership: bool ``(k, n)``, True where the model was trained on the example.
        targets: ``(n,)``.
        digests: a digest of the content of each example, by which an audit finds its column.
        population: the population data set itself, for the audited model's outputs on it; or None.
        population_logits: ``(k, m, K)``, or None.
        store: the models' files, under the key of pool, population, views, recipe and seed; None where the outputs
            are those of another engine (:meth:`from_arrays`).
        views: functions of a batch of inputs, for the audited model's outputs on these views; or empty.
        view_logits: on q augmented views of the pool, ``(k, q, n, K)``, or None.
        recipe: how the models were trained, or None.
        population_read: what :meth:`read_population` gives, where the population has been read before; or None.
    """

    logits: Tensor = field(repr=False)
    membership: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    digests: list[bytes] = field(repr=False)
    population: Dataset[Any] | None = field(repr=False)
    population_logits: Tensor | None = field(repr=False)
    store: ShadowStore | None
    views: tuple[View, ...] = field(default=(), repr=False)
    view_logits: Tensor | None = field(default=None, repr=False)
    recipe: Recipe | None = field(default=None, repr=False)
    population_read: tuple[Tensor, list[bytes]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.logits)

    def __repr__(self) -> str:
        others = 0 if self.population_logits is None else self.population_logits.shape[1]
        return (
            f"ShadowOutputs({len(self)} models, pool of {len(self.targets)}, population of {others}, {len(self.views)} "
            f"views, {self.logits.dtype}, {'from arrays' if self.store is None else self.store.folder})"
        )

    @classmethod
    def from_arrays(cls, logits: Any, membership: Any, targets: Any, population: Any = None) -> ShadowOutputs:
        """Outputs of shadow models of any engine: scikit-learn, XGBoost, a remote API.

        For :func:`~lightning_cwrf.auditing.audit_logits` and :func:`~lightning_cwrf.auditing.audit_recipe`. Tensors,
        NumPy arrays and what NumPy can read are taken; float64 becomes float32, other floats stay, without a copy where
        the memory can be shared (memory maps too).

        Args:
            logits: of k models on a pool of n examples, ``(k, n, K)``; one logit for each example, ``(k, n)``, is that
                of class 1 of two. Of probabilities: :func:`~lightning_cwrf.arrays.probabilities_to_logits`.
            membership: bool ``(k, n)``, True where the model was trained on the example
                (:func:`~lightning_cwrf.shadows.balanced_membership`).
            targets: class indices ``(n,)``.
            population: a pair of logits ``(k, m, K)`` and targets ``(m,)`` on examples that no model was trained on.

        Raises:
            TypeError: no numbers; a membership that is not bool; a population that is no pair.
            ValueError: shapes that do not fit; logits that are not finite, or are probabilities; multi-label targets; a
                membership that is the same everywhere; the same logits of all models.

        >>> from lightning_cwrf.shadows import balanced_membership
        >>> ShadowOutputs.from_arrays(torch.randn(4, 6, 3), balanced_membership(4, 6), [0, 1, 2, 0, 1, 2])
        ShadowOutputs(4 models, pool of 6, population of 0, 0 views, torch.float32, from arrays)
        """
        z = read_logits(logits, "the shadow models", models=True)
        y = read_targets(targets, "the shadow models", *z.shape[1:])
        members = read_tensor(membership, "membership")
        if members.dtype != torch.bool:
            raise TypeError(f"membership must be bool, not {members.dtype}: True where the model was trained on it.")
        if members.shape != z.shape[:2]:
            raise ValueError(
                f"membership must have shape {tuple(z.shape[:2])}, as the logits of {len(z)} models on {z.shape[1]} "
                f"examples have, not {tuple(members.shape)}."
            )
        if members.all() or not members.any():
            raise ValueError(
                "all models were trained on the whole pool, or all on none of it: shadow models are trained on halves "
                "that are drawn at random (balanced_membership)."
            )
        _check_different(z)
        outside, outside_logits = None, None
        if population is not None:
            if not isinstance(population, (tuple, list)) or len(population) != 2:
                raise TypeError(f"population must be a pair (logits, targets), not a {type(population).__name__}.")
            outside_logits = read_logits(population[0], "the population", models=True)
            if (len(outside_logits), outside_logits.shape[2]) != (len(z), z.shape[2]):
                raise ValueError(
                    f"the population's logits are of {len(outside_logits)} models with {outside_logits.shape[2]} "
                    f"classes, those of the pool of {len(z)} with {z.shape[2]}."
                )
            known = read_targets(population[1], "the population", *outside_logits.shape[1:])
            outside = TensorDataset(torch.arange(len(known)), known)
        digests = [f"example {i}".encode() for i in range(len(y))]
        return cls(z, members.cpu(), y, digests, outside, outside_logits, store=None)

    def check_inputs(self) -> None:
        """Raise a ValueError if it is not known which inputs the examples have, as with :meth:`from_arrays`."""
        if self.store is None:
            raise ValueError(
                "these shadow models were made from arrays of outputs, which do not say which inputs the examples "
                "have. Pass the audited model's own outputs to audit_logits; train_shadows makes shadow models for "
                "audit, callbacks and base=."
            )

    def part(self, examples: Tensor, population: Tensor | None = None) -> ShadowOutputs:
        """The outputs on some examples of the pool, and on some of the population (None: all), by their indices.

        Raises:
            TypeError: indices that are not a tensor of integers.
            ValueError: an index that is out of range or given twice.
        """
        examples = _check_places("examples", examples, len(self.targets))
        given, outside, read = self.population, self.population_logits, self.population_read
        if population is not None:
            if given is None or outside is None:
                raise ValueError("these shadow models have no population; leave population out.")
            population = _check_places("population", population, outside.shape[1])
            places = population.tolist()
            given, outside = Subset(given, places), outside[:, population]
            read = None if read is None else (read[0][population], [read[1][i] for i in places])
        return replace(
            self,
            logits=self.logits[:, examples],
            membership=self.membership[:, examples],
            targets=self.targets[examples],
            digests=[self.digests[i] for i in examples.tolist()],
            population=given,
            population_logits=outside,
            population_read=read,
            view_logits=None if self.view_logits is None else self.view_logits[:, :, examples],
        )

    def read_population(self) -> tuple[Tensor, list[bytes]]:
        """The class indices ``(m,)`` and the digests of the population's examples; empty if there is none."""
        if self.population_read is not None:
            return self.population_read
        if self.population is None:
            return torch.empty(0, dtype=torch.long), []
        with isolated_rng():
            digests, targets = read_once(self.population, "population")
        return targets, digests

    def weights(self, model: int) -> dict[str, Tensor]:
        """The state dict of one shadow model; :func:`train_shadows` must have run with ``keep_weights=True``."""
        if self.store is None:
            raise ValueError("shadow models from arrays of outputs have no weights.")
        return self.store.weights(model)

    def differences(self, model: nn.Module) -> list[str]:
        """Visible differences between the training of ``model`` and that of these models.

        See :meth:`ShadowRecipe.differences`; with a recipe that is a function of your own, none can be seen.
        """
        compare = getattr(self.recipe, "differences", None)
        return [] if compare is None else list(compare(model))


def _check_different(logits: Tensor) -> None:
    """Raise a ValueError if all models are one, and warn of two that are: no attack finds anything with them."""
    first: dict[bytes, int] = {}
    same = []
    for i, each in enumerate(logits):
        j = first.setdefault(each[:1000].contiguous().view(torch.uint8).numpy().tobytes(), i)
        if j < i and torch.equal(each, logits[j]):
            same.append((j, i))
    if len(same) == len(logits) - 1 > 0:
        raise ValueError(f"the logits of all {len(logits)} models are the same: pass each model's own outputs.")
    if same:
        warnings.warn(
            f"models {same[0][0]} and {same[0][1]} have the same logits on every example, and so have {len(same)} of "
            "the models with an earlier one. Models that were trained on different halves differ: check that no output "
            "was stored twice.",
            stacklevel=3,
        )


def _check_places(name: str, places: Any, size: int) -> Tensor:
    if not isinstance(places, Tensor) or places.ndim != 1 or places.dtype != torch.long:
        raise TypeError(f"{name} must be indices, an int64 tensor of one dimension.")
    if (
        len(places) == 0
        or int(places.min()) < 0
        or int(places.max()) >= size
        or len(set(places.tolist())) < len(places)
    ):
        raise ValueError(f"{name} must be different indices from 0 to {size - 1}, at least one.")
    return places
