"""Rules about data: form, labels, overlap, samplers, augmentation and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_cwrf.auditing import FPR
from lightning_cwrf.auditing.audited import AuditedData
from lightning_cwrf.auditing.decision import TESTED, least_auc
from lightning_cwrf.callbacks.coverage import planned_share
from lightning_cwrf.classification import check_targets, split_batch
from lightning_cwrf.data import all_ids, check_disjoint, reads_alike
from lightning_cwrf.data.sampling import support
from lightning_cwrf.metrics.functional import fewest_nonmembers
from lightning_cwrf.preflight.findings import Finding, attempt
from lightning_cwrf.preflight.subject import Subject
from lightning_cwrf.weights.reading import read_saved


def batch_form(subject: Subject) -> list[Finding]:
    """What is taken as inputs and as targets."""

    def rule() -> str:
        batch = subject.batch
        if hasattr(subject.model, "classification_step"):
            return f"{described(batch)}, taken apart by the model's own classification_step"
        inputs, targets = split_batch(batch)
        return f"inputs {described(inputs)}, targets {described(targets)}"

    return attempt("batch form", rule)


def labels(subject: Subject, classes: int) -> list[Finding]:
    """Whether every label of every side is one of the model's classes."""

    def rule() -> str:
        ranges = []
        for name, ids in subject.ids.items():
            known = [label for _, label in ids or () if label is not None]
            if not known:
                continue
            found = torch.tensor(known)
            try:
                check_targets(torch.zeros(len(found), classes), found)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            ranges.append(f"{name} {int(found.min())} to {int(found.max())}")
        return f"{classes} classes; labels: {', '.join(ranges)}" if ranges else f"{classes} classes; labels unknown"

    return attempt("labels", rule)


def augmentation(subject: Subject) -> list[Finding]:
    """Whether an example is the same when read again."""
    found = []
    if subject.members is not None and not reads_alike(subject.loader):
        found.append(Finding("augmentation", "ok", "training data are augmented at random; members= are read instead."))
    nonmembers = subject.plain if subject.nonmembers is None else subject.nonmembers

    def rule() -> str:
        AuditedData(subject.plain, nonmembers).check()
        return "every example is the same when it is read again"

    return found + attempt("augmentation", rule)


def overlap(subject: Subject) -> list[Finding]:
    """Examples that are on two sides."""
    ids = {name: [digest for digest, _ in found] for name, found in subject.ids.items() if found is not None}
    pairs = [("members", "reference"), ("members", "nonmembers"), ("reference", "nonmembers")]
    compared = [(a, b) for a, b in pairs if a in ids and b in ids]
    missing = sorted({name for pair in pairs for name in pair} - set(ids))

    def rule() -> str:
        for first, second in compared:
            check_disjoint(ids[first], ids[second], second, first)
        if not compared:
            return ""
        return f"{', '.join(f'{a} and {b}' for a, b in compared)} share no example"

    found = attempt("overlap", rule)
    if missing:
        found.append(
            Finding(
                "overlap",
                "warning",
                f"not compared, because not given or not readable twice: {', '.join(missing)}.",
                "A hardening needs reference data that the model never saw, and an audit non-members.",
            )
        )
    return found


def selection(subject: Subject) -> list[Finding]:
    """Whether the reference data are the validation data, by which the finished model may have been chosen."""
    reference = subject.ids.get("reference")
    if subject.validation is None or reference is None:
        return []
    validation = set(all_ids(subject.validation) or ())
    shared = sum(each in validation for each in reference)
    if not shared:
        return []
    monitors = _chosen_by(subject.checkpoint)
    chosen = (
        f"the checkpoint was chosen by {' and '.join(map(repr, monitors))} (ModelCheckpoint)"
        if monitors
        else "whatever was chosen by them (the epoch, a setting)"
    )
    return [
        Finding(
            "reference",
            "warning",
            f"{shared} of the {len(reference)} reference examples are validation data, and {chosen}: "
            "the model fits them better than data that it never met, and the scoring takes them for such.",
            "Best is a split that nothing was chosen by.",
        )
    ]


def _chosen_by(checkpoint: Any) -> list[str]:
    """The metrics by which a Lightning checkpoint was the best when it was saved; none where it does not say so."""
    if checkpoint is None:
        return []
    try:
        loaded, _ = read_saved(Path(checkpoint), "the finished weights")
    except (OSError, ValueError):  # told where the weights are loaded
        return []
    states = loaded.get("callbacks", {}) if isinstance(loaded, Mapping) else {}
    monitors = []
    for name, state in states.items():
        if not name.startswith("ModelCheckpoint") or state.get("monitor") is None:
            continue
        best, current = state.get("best_model_score"), state.get("current_score")
        named = Path(state.get("best_model_path") or "").name == Path(checkpoint).name
        if named or (best is not None and current is not None and float(best) == float(current)):
            monitors.append(str(state["monitor"]))
    return monitors


def sampling(subject: Subject) -> list[Finding]:
    """The share of the examples that the training draws: those never drawn are no members."""
    loader, trainer = subject.loader, subject.trainer
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = type(loader).__name__
        return [Finding("sampler", "ok", f"a {kind}: every example that it gives counts as a member")]

    def rule() -> str:
        per_pass = support(loader).unseen(1)
        unseen = per_pass if trainer is None else planned_share(trainer, loader)
        told = f"an epoch draws about {1 - per_pass:.0%} of the {len(support(loader).places)} examples"
        if trainer is not None:
            told += f", the training of max_epochs={trainer.max_epochs} about {1 - unseen:.0%}"
        if unseen > 0.1 and subject.members is None:
            raise ValueError(
                f"{told}. The others count as members too, which makes attacks look weak: train on a Subset instead of "
                "setting a limit, or pass members=, the examples that it was trained on."
            )
        return told

    return attempt("sampler", rule)


def sizes(subject: Subject) -> list[Finding]:
    """What so many members and non-members can show."""
    members, nonmembers = (subject.ids.get(name) for name in ("members", "nonmembers"))
    if members is None or nonmembers is None:
        return []
    n = len(nonmembers)
    least = least_auc(len(members), n, 0.95, len(TESTED))  # of one attack
    auc = f"an AUC from {least:.3f} on is better than chance" if math.isfinite(least) else "no AUC is"
    told = f"{len(members)} members, {n} non-members: {auc}; the smallest FPR that can be seen is {1 / n:.2g}."
    enough = fewest_nonmembers(FPR)
    if n >= enough:
        return [Finding("sizes", "ok", told)]
    return [
        Finding(
            "sizes",
            "warning",
            told,
            f"The TPR at {FPR:.1%} FPR is bounded from below with {enough} non-members or more: audit with more if you "
            "have them.",
        )
    ]


def described(value: Any) -> str:
    """The form of a nest of tensors.

    >>> described({"pixels": torch.zeros(2, 3), "names": ["a", "b"]})
    '{pixels: float32 (2, 3), names: list of 2 str}'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {described(each)}" for name, each in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        if value and all(isinstance(each, (str, int, float)) for each in value):
            return f"{type(value).__name__} of {len(value)} {type(value[0]).__name__}"
        return "(" + ", ".join(map(described, value)) + ")"
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {tuple(shape)}"
