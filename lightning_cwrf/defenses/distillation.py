"""Defenses that train on another model's outputs instead of the labels: DMP (a teacher) and SELENA (an ensemble)."""

# No postponed annotations here: jsonargparse evaluates them in the module of the subclass, whose names are others.

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.classification import classification_step
from lightning_cwrf.data import all_ids, example_digests, isolated_rng
from lightning_cwrf.data.seen import record_seen
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.registry import register_defense
from lightning_cwrf.defenses.settings import Defense
from lightning_cwrf.defenses.state import DefenseState
from lightning_cwrf.outputs import collect_outputs, evaluating
from lightning_cwrf.shadows import ShadowOutputs


def distillation_loss(logits: Tensor, soft: Tensor) -> Tensor:
    """``mean KL(soft ‖ p)``: cross-entropy with soft labels, but for their entropy, which has no gradient.

    Args:
        logits: shape ``(n, K)``; p is their softmax.
        soft: probabilities ``(n, K)``.

    Returns:
        A scalar, 0 where p is the soft label of every example.

    >>> distillation_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
    tensor(0.6931)
    """
    if soft.shape != logits.shape:
        raise ValueError(f"soft labels must have the logits' shape {tuple(logits.shape)}, not {tuple(soft.shape)}.")
    log_p = logits.log_softmax(-1)
    divergence = torch.xlogy(soft, soft) - soft * log_p
    return divergence.sum(-1).mean()


@register_defense("dmp")
@dataclass(frozen=True, kw_only=True)
class DMP(Defense):
    """Distillation for membership privacy (Shejwalkar & Houmansadr 2021): settings of :class:`DMPMixin`.

    Args:
        teacher: the finished model, trained without a defense on the data to protect.
        temperature: of the teacher's softmax; above 1 its labels are softer.
    """

    teacher: nn.Module | None = field(default=None, repr=False, metadata={"data": True})
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.teacher is None:
            raise MisconfigurationException(
                "DMP distils a finished model: pass teacher=, the model that was trained on the data to protect."
            )
        if not isinstance(self.teacher, nn.Module):
            raise TypeError(f"DMP: teacher must be a finished model, an nn.Module, not {type(self.teacher).__name__}.")
        check_number("temperature", self.temperature, low=0, low_open=True)


class DMPMixin(DefenseMixin, settings=DMP):
    """Trains a LightningModule on reference data, with a teacher's outputs as labels.

    Fit it on reference data, of which the teacher has seen none: ``trainer.fit(student, reference_loader)``. The labels
    in their batches are not used. The teacher's training data reach the student through its outputs alone: they are the
    ``members`` of an audit of the student. The loss is :func:`distillation_loss` with the softmax of the teacher's
    logits divided by the temperature.
    """

    more_than_loss = "it needs another model's outputs on each batch"

    def defense_step(self, batch: Any) -> tuple[Tensor, int]:
        """The divergence from the teacher's outputs on this batch."""
        logits, targets = classification_step(self, batch)
        teacher = self.defense.teacher
        with evaluating(teacher):
            others, _ = classification_step(teacher, batch)
        soft = (others.float() / self.defense.temperature).softmax(-1)
        return distillation_loss(logits.float(), soft), len(targets)

    def on_train_start(self) -> None:
        super().on_train_start()
        data = self.trainer.train_dataloader
        if isinstance(data, DataLoader):  # an audit refuses them as non-members: the student has seen them
            with isolated_rng():
                record_seen(self, "reference data that DMP distils on", all_ids(data) or ())

    def on_fit_start(self) -> None:
        super().on_fit_start()
        teacher = self.defense.teacher
        if teacher is self:
            raise MisconfigurationException("DMP: the teacher is the student: pass teacher=copy.deepcopy(model).")
        self.defense_state.home = next((p.device for p in teacher.parameters()), None)
        teacher.to(self.device)

    def on_fit_end(self) -> None:
        super().on_fit_end()
        if self.defense_state.home is not None:
            self.defense.teacher.to(self.defense_state.home)


def most_certain(teacher: nn.Module, reference: Dataset[Any], count: int) -> Subset[Any]:
    """The ``count`` examples of reference data on which the teacher's output has the lowest entropy.

    DMP's way of choosing data: these outputs depend the least on which examples the teacher was trained on.

    Args:
        teacher: a finished classifier.
        reference: a data set that it was not trained on.
        count: how many to choose.

    Raises:
        ValueError: ``count`` is not from 1 to the number of examples.

    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.tensor([[0.0, 0.0], [9.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0, 0]))
    >>> most_certain(nn.Identity(), data, 2).indices
    [1, 2]
    """
    outputs = collect_outputs(teacher, reference, name="reference")
    check_integer("count", count, low=1, high=len(outputs))
    log_p = outputs.logits.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return Subset(reference, entropy.argsort(stable=True)[:count].tolist())


@register_defense("selena")
@dataclass(frozen=True, kw_only=True)
class SELENA(Defense):
    """Self-distillation of a split ensemble (Tang et al. 2022): settings of :class:`SELENAMixin`.

    Args:
        ensemble: shadow models of the training data (:func:`~lightning_cwrf.train_shadows` with them as the pool).
    """

    ensemble: ShadowOutputs | None = field(default=None, repr=False, metadata={"data": True})

    def __post_init__(self) -> None:
        if self.ensemble is None:
            raise MisconfigurationException(
                "SELENA distils an ensemble: pass ensemble=, what train_shadows gives with the training data as its "
                "pool."
            )
        if not isinstance(self.ensemble, ShadowOutputs):
            raise TypeError(
                f"SELENA: ensemble must be what train_shadows returns, not a {type(self.ensemble).__name__}."
            )


def split_ai_labels(logits: Tensor, membership: Tensor) -> Tensor:
    """The output of a Split-AI ensemble on its own training data, float32 ``(n, K)``.

    For each example it is the mean softmax of the models that were not trained on it.

    Args:
        logits: of the k models, ``(k, n, K)``.
        membership: bool ``(k, n)``, True where the model was trained on the example.

    Raises:
        ValueError: an example that every model was trained on; shapes that do not fit.

    >>> logits = torch.tensor([[[9.0, 0.0]], [[0.0, 0.0]]])
    >>> split_ai_labels(logits, torch.tensor([[True], [False]]))
    tensor([[0.5000, 0.5000]])
    """
    if logits.ndim != 3 or membership.shape != logits.shape[:2] or membership.dtype != torch.bool:
        raise ValueError(
            f"split_ai_labels needs logits (k, n, K) and bool membership (k, n), not {tuple(logits.shape)} and "
            f"{membership.dtype} {tuple(membership.shape)}."
        )
    outside = ~membership
    seen = (~outside.any(0)).nonzero().flatten().tolist()
    if seen:
        raise ValueError(f"every model of the ensemble was trained on {len(seen)} of the examples (first {seen[:5]}).")
    total = torch.zeros(logits.shape[1:])
    for model, rows in zip(logits, outside, strict=True):  # model by model, so that no copy of all is made
        total[rows] += model[rows].float().softmax(-1)
    return total / outside.sum(0)[:, None]


class SELENAState(DefenseState):
    """The soft label of each training example, by its content."""

    def __init__(self, module: LightningModule, defense: Any) -> None:
        super().__init__(module, defense)
        ensemble: ShadowOutputs = defense.ensemble
        self.labels = split_ai_labels(ensemble.logits, ensemble.membership)
        self.places = {digest: place for place, digest in enumerate(ensemble.digests)}

    def of(self, digests: Sequence[bytes]) -> Tensor:
        """The soft labels of these examples."""
        missing = [row for row, digest in enumerate(digests) if digest not in self.places]
        if missing:
            raise ValueError(
                f"SELENA: {len(missing)} of the {len(digests)} examples of this batch are not in the ensemble's pool "
                f"(first at {missing[:5]}). Train the ensemble on the training data, and give them here as they are "
                "there: random augmentation belongs in the module's forward."
            )
        return self.labels[[self.places[digest] for digest in digests]]


class SELENAMixin(DefenseMixin, settings=SELENA):
    """Trains a LightningModule on its training data, with the outputs of models that had not seen them as labels.

    Split-AI's models are shadow models: each is trained on half of the data, and the label of an example is the mean
    output of the half of the models that were trained without it. The loss is :func:`distillation_loss` with that
    label, which is recognised by the example's content; the true labels are not used.

    The published ensemble has 25 models, of which 10 are trained without each example; shadow models come in
    complementary pairs, so with k of them k / 2 are.
    """

    state_class = SELENAState
    more_than_loss = "each model needs an ensemble of its own"

    def defense_step(self, batch: Any) -> tuple[Tensor, int]:
        """The divergence from the ensemble's outputs on this batch."""
        logits, targets = classification_step(self, batch)
        soft = self.defense_state.of(example_digests(batch)).to(logits.device)
        if soft.shape != logits.shape:
            raise ValueError(
                f"SELENA: the ensemble has {soft.shape[1]} classes, and this model {logits.shape[1]}: train the "
                "ensemble by the model's own recipe."
            )
        return distillation_loss(logits.float(), soft), len(targets)
