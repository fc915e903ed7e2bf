"""Rules about the model: outputs, what is trainable, vanilla weights, layers, strategy."""

from __future__ import annotations

import inspect
import warnings
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_cwrf.callbacks import GradientMaskCallback
from lightning_cwrf.callbacks.common import refuse_moved_weights, refuse_sharding
from lightning_cwrf.classification import check_no_probabilities, classification_step
from lightning_cwrf.data import isolated_rng
from lightning_cwrf.defenses import DPSGD
from lightning_cwrf.defenses.dpsgd.layers import unsupported_layers
from lightning_cwrf.outputs import evaluating
from lightning_cwrf.preflight.findings import Finding, attempt
from lightning_cwrf.preflight.subject import Subject
from lightning_cwrf.weights.copies import copied
from lightning_cwrf.weights.descent import trainable_parameters
from lightning_cwrf.weights.scores import learnability_scores
from lightning_cwrf.weights.trained import check_trained
from lightning_cwrf.weights.vanilla import is_redraw, load_vanilla

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def outputs(subject: Subject) -> tuple[list[Finding], int | None]:
    """Whether the outputs are logits, and the number of classes; None where there are no valid outputs."""
    seen: dict[str, Tensor] = {}

    def rule() -> str:
        with evaluating(subject.model):
            logits, _ = classification_step(subject.model, subject.batch)
            again, _ = classification_step(subject.model, subject.batch)
        check_no_probabilities(logits, "the first batch")
        seen["logits"] = logits
        if not torch.equal(logits, again):
            raise ValueError(
                "the model gives other outputs each time for the same inputs, in eval mode too: attacks look weaker "
                "than they are. Is there a dropout without training=self.training?"
            )
        if logits.shape[1] == 2 and not logits[:, 0].any():  # as as_classes makes them
            z = logits[:, 1]
            told = f"one logit for each example, {tuple(z.shape)}, read as that of class 1 of two"
            return f"{told}, from {float(z.min()):.3g} to {float(z.max()):.3g}"
        return f"logits {tuple(logits.shape)}, from {float(logits.min()):.3g} to {float(logits.max()):.3g}"

    found = attempt("outputs", rule)
    return found, int(seen["logits"].shape[1]) if seen else None


def trainable(subject: Subject) -> list[Finding]:
    """How many weights count, and whether the loss reaches them."""

    def rule() -> str:
        weights = trainable_parameters(subject.model)
        every = sum(p.numel() for p in subject.model.parameters())
        scores = learnability_scores(subject.model, [subject.batch], steps=1)
        reached = sum(score.numel() for score in scores.values())
        count = sum(p.numel() for p in weights.values())
        return f"{count:,} of {every:,} weights are trainable, and the loss reaches {reached:,}"

    return attempt("trainable", rule)


def vanilla(subject: Subject) -> list[Finding]:
    """Whether the vanilla weights fit the model, and differ from its own."""
    source = subject.vanilla
    if source is None:
        return [
            Finding(
                "vanilla",
                "warning",
                "no vanilla weights (those from before training) are given.",
                'Pass vanilla=, the file of VanillaSnapshotCallback, or "redraw".',
            )
        ]

    def rule() -> str:
        weights = load_vanilla(source, subject.model)
        own = {n: p for n, p in trainable_parameters(subject.model).items() if n in weights}
        moved = sum(int((p.detach().cpu() != weights[n].to(p.dtype)).sum()) for n, p in own.items())
        if not moved:
            raise ValueError(
                "the vanilla weights are the model's own current weights: the model is untrained, or its finished "
                "weights were not loaded. Load them, or pass the weights from before training."
            )
        return f"they fit; {moved:,} of {sum(p.numel() for p in own.values()):,} trainable weights have moved"

    return attempt("vanilla", rule)


def trained(subject: Subject) -> list[Finding]:
    """Whether the model does better on its training data than an untrained one."""
    source = subject.vanilla
    try:
        weights = None if source is None or is_redraw(source) else load_vanilla(source, subject.model)
    except Exception:  # told by the rule about them
        weights = None

    def rule() -> str:
        check_trained(subject.model, subject.plain, weights)
        return "the model does not look untrained"

    return attempt("trained", rule)


def own_loss(subject: Subject) -> list[Finding]:
    """Weights in the model's own loss, which the loss of a defense has not."""
    weighted = {
        f"{path} has {name}"
        for path, module in subject.model.named_modules()
        if isinstance(module, nn.modules.loss._Loss)
        for name in ("weight", "pos_weight")
        if isinstance(getattr(module, name, None), Tensor)
    }
    weighted |= _weighted_calls(subject)
    if not weighted:
        return []
    return [
        Finding(
            "loss",
            "warning",
            f"the model's own loss is weighted ({', '.join(sorted(weighted))}), and the loss of a defense, which takes "
            "its place, is not: rare classes may suffer.",
            "Compare the accuracy of each class before and after, or write a defense of your own with weights.",
        )
    ]


def _weighted_calls(subject: Subject) -> set[str]:
    """Losses that one training step on a copy of the model calls with weights; none where it does not run there."""
    seen: set[str] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "")
            given = {"pos_weight", "weight"} if "cross_entropy" in name or name == "nll_loss" else set()
            seen.update(f"{name} with {each}" for each in given if isinstance((kwargs or {}).get(each), Tensor))
            return func(*args, **(kwargs or {}))

    with suppress(Exception), warnings.catch_warnings(), isolated_rng(), torch.no_grad():
        warnings.simplefilter("ignore")
        step = copied(subject.model).training_step
        with Watch():
            step(*(subject.batch, 0)[: len(inspect.signature(step).parameters)])
    return seen


def layers(subject: Subject) -> list[Finding]:
    """Layers that DP-SGD refuses: an error where it is the defense."""
    wrong = unsupported_layers(subject.model)
    private = isinstance(subject.defense, DPSGD)
    if not wrong:
        return [Finding("layers", "ok", "every layer can be trained with DP-SGD")]
    listed = "; ".join(f"{name} ({reason})" for name, reason in list(wrong.items())[:3])
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    told = f"DP-SGD refuses {len(wrong)} layers: {listed}{more}."
    if private and not (subject.defense is not None and subject.defense.settings.get("fix")):
        return [Finding("layers", "error", told, "Replace them (BatchNorm by GroupNorm), or pass fix=True.")]
    return [Finding("layers", "ok", f"{told} Other defenses take them.")]


def transfer_hooks(subject: Subject) -> list[Finding]:
    """Hooks of the module that change batches: the Trainer runs them, ``audit`` does not."""
    kind = type(subject.model)
    own = [name for name in _HOOKS if getattr(kind, name, None) is not getattr(LightningModule, name)]
    if not own or not isinstance(subject.model, LightningModule):
        return []
    return [
        Finding(
            "transfer hooks",
            "warning",
            f"{kind.__name__} has {', '.join(own)}: callbacks apply such hooks, but an audit of a finished model reads "
            "the data without them.",
            "Do the same in forward, or in classification_step.",
        )
    ]


def strategy(subject: Subject) -> list[Finding]:
    """Whether masks can follow the weights under this Trainer's strategy."""
    trainer: Any = subject.trainer
    if trainer is None:
        return []

    def rule() -> str:
        callback = GradientMaskCallback()
        refuse_sharding(trainer, callback)
        refuse_moved_weights(trainer, callback)
        return _devices(trainer)

    return attempt("devices", rule)


def _devices(trainer: Trainer) -> str:
    kind = type(trainer.strategy).__name__
    return f"{kind} on {trainer.num_devices} x {trainer.strategy.root_device.type}, precision {trainer.precision}"
