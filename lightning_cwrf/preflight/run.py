"""The preflight of a hardening and its audit."""

from __future__ import annotations

from os import PathLike
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from lightning_cwrf.data import Batches, check_batches, isolated_rng
from lightning_cwrf.defenses import Defense
from lightning_cwrf.preflight import data as data_rules
from lightning_cwrf.preflight import model as model_rules
from lightning_cwrf.preflight.cost import cost
from lightning_cwrf.preflight.findings import Finding, Preflight, attempt
from lightning_cwrf.preflight.subject import Subject
from lightning_cwrf.weights.scores import check_scoring
from lightning_cwrf.weights.vanilla import VanillaSource, check_source


def check(
    model: nn.Module,
    loader: Batches,
    *,
    reference: Batches | None = None,
    nonmembers: Batches | None = None,
    members: Batches | None = None,
    vanilla: VanillaSource | None = None,
    defense: Defense | None = None,
    trainer: Trainer | None = None,
    steps: int = 30,
    lam: float = 0.7,
    validation: Batches | None = None,
    checkpoint: str | PathLike[str] | None = None,
) -> Preflight:
    """Look for what would go wrong in a hardening and its audits, before time is spent on them.

    It reads all data once, runs the model on a few batches, and takes two scoring steps on a copy. The model, its
    gradients and modes, and the caller's random state are not changed.

    Args:
        model: the finished model.
        loader: its training loader, as ``trainer.fit`` gets it.
        reference: data that it never saw, for ``PrivacyScoringCallback(nonmembers=...)``.
        nonmembers: further data that it never saw, for the audit.
        members: the training examples without random augmentation, for the audit; None: those of the loader.
        vanilla: the weights from before training, as for ``PrivacyScoringCallback``.
        defense: the defense to train with.
        trainer: the Trainer of the hardening: its strategy, epochs and limits are checked too.
        steps: of the scoring, for the estimated time.
        lam: of the scoring.
        validation: the validation data of the first training: they should not be the reference data.
        checkpoint: the file of the finished weights, whose record of a ``ModelCheckpoint`` says what it was chosen by.

    Returns:
        The findings. ``print`` shows them; :meth:`~lightning_cwrf.preflight.Preflight.raise_for_errors` raises.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of range.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> examples = TensorDataset(torch.randn(40, 4), torch.arange(40) % 3)
    >>> report = check(nn.Linear(4, 3), DataLoader(examples, batch_size=8))
    >>> report.ok, report.findings[0].found
    (True, 'inputs float32 (8, 4), targets int64 (8,)')
    """
    _check_arguments(model, loader, reference, nonmembers, members, vanilla, defense, trainer, validation)
    check_scoring(lam, steps, 1e-3)
    subject = Subject(
        model, loader, reference, nonmembers, members, vanilla, defense, trainer, steps, lam, validation, checkpoint
    )
    device = next((p.device for p in model.parameters()), None)
    with isolated_rng(device):
        return Preflight(tuple(_findings(subject)))


def _findings(subject: Subject) -> list[Finding]:
    found = data_rules.batch_form(subject)
    if any(finding.level == "error" for finding in found):
        return found  # nothing else can be read
    seen, classes = model_rules.outputs(subject)
    found += seen
    unread = attempt("data", lambda: _read_all(subject))
    if unread:
        return found + unread
    if classes is not None:
        found += data_rules.labels(subject, classes) + model_rules.trainable(subject)
    for rule in (
        model_rules.vanilla,
        model_rules.trained,
        model_rules.own_loss,
        model_rules.layers,
        model_rules.transfer_hooks,
        model_rules.strategy,
        data_rules.augmentation,
        data_rules.sampling,
        data_rules.overlap,
        data_rules.selection,
        data_rules.sizes,
    ):
        found += rule(subject)
    if classes is not None and all(finding.level != "error" for finding in found):
        found += cost(subject)
    return found


def _check_arguments(model: Any, loader: Any, *others: Any) -> None:
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}; make one" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"check needs the finished module, not {what}.")
    reference, nonmembers, members, vanilla, defense, trainer, validation = others
    named = {"loader": loader, "reference": reference, "nonmembers": nonmembers, "members": members}
    named["validation"] = validation
    for name, given in named.items():
        if given is not None or name == "loader":
            check_batches(given, name)
    if vanilla is not None:
        check_source(vanilla)
    if defense is not None and not isinstance(defense, Defense):
        raise TypeError(f"defense must be what create_defense(name, ...) returns, not a {type(defense).__name__}.")
    if trainer is not None and not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a Trainer of lightning.pytorch, not a {type(trainer).__name__}.")


def _read_all(subject: Subject) -> str:
    """Read every side to its end, where data may still fail."""
    _ = subject.ids
    return ""
