"""Time and memory, measured on a few batches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_cwrf.classification import classification_step
from lightning_cwrf.data.examples import example_digests
from lightning_cwrf.outputs import evaluating
from lightning_cwrf.preflight.findings import Finding, attempt
from lightning_cwrf.preflight.subject import Subject
from lightning_cwrf.weights.scores import learnability_scores, privacy_vulnerability_scores

_SCORED = 256
"""Examples in a batch of the scoring, as published."""


def cost(subject: Subject) -> list[Finding]:
    """What an audit, the scoring and a fine-tuning take, from the time of a few batches of each."""

    def audit() -> str:
        examples = len(example_digests(subject.batch))
        with evaluating(subject.model):
            seconds = _best(lambda: classification_step(subject.model, subject.batch), subject)
        total = sum(len(ids) for name, ids in subject.ids.items() if ids is not None and name != "reference")
        return f"an audit takes {_shown(seconds * total / examples)} ({total} examples; reading them excluded)"

    def scoring() -> str:
        reference, vanilla = subject.reference, subject.vanilla
        if reference is None or vanilla is None:
            return ""
        given: Any = {"lam": subject.lam, "batch_size": _SCORED}
        before = _peak(subject)

        def score(steps: int) -> float:
            return _timed(
                lambda: privacy_vulnerability_scores(
                    subject.model, vanilla, subject.plain, reference, steps=steps, **given
                ),
                subject,
            )

        one, two = score(1), score(2)
        seconds = one + max(0.0, two - one) * (subject.steps - 1)
        after = _peak(subject)
        memory = ""
        if before is not None and after is not None:
            memory = f"; peak memory of this process {after / 1e9:.2f} GB"
            memory += f", {(after - before) / 1e6:.0f} MB of it by scoring" if after > before else ""
        return f"scoring takes {_shown(seconds)} ({subject.steps} steps of {_SCORED} examples){memory}"

    def tuning() -> str:
        trainer, loader = subject.trainer, subject.loader
        if trainer is None or not isinstance(loader, DataLoader) or not isinstance(loader, Sized):
            return ""
        epochs = trainer.max_epochs
        if epochs is None or epochs < 1:
            return ""
        batch = [subject.batch]
        one, three = (
            _timed(lambda n=n: learnability_scores(subject.model, batch, steps=n), subject)  # type: ignore[misc]
            for n in (1, 3)
        )
        seconds = max(0.0, three - one) / 2 * len(loader) * epochs
        return (
            f"fine-tuning takes {_shown(seconds)} ({epochs} epochs of {len(loader)} steps; without the "
            "optimizer's own time)"
        )

    found = []
    for rule in (audit, scoring, tuning):
        found += attempt("cost", rule)
    # What scoring warns of (redrawn weights) has been told by the rules about it.
    return [finding for finding in found if finding.level != "warning"]


def _best(call: Callable[[], Any], subject: Subject) -> float:
    return min(_timed(call, subject) for _ in range(2))


def _timed(call: Callable[[], Any], subject: Subject) -> float:
    began = time.perf_counter()
    call()
    if _on_gpu(subject):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _on_gpu(subject: Subject) -> bool:
    return any(p.is_cuda for p in subject.model.parameters())


def _peak(subject: Subject) -> int | None:
    """The most bytes that this process has held so far, on the model's device; None where that is unknown."""
    if _on_gpu(subject):
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _shown(seconds: float) -> str:
    """A time in words.

    >>> _shown(0.2), _shown(75), _shown(9000)
    ('less than a second', 'about 75 s', 'about 2.5 h')
    """
    if seconds < 1:
        return "less than a second"
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
