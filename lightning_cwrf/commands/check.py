"""``cwrf check``: the preflight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from lightning_cwrf.commands.base import DONE, FAILED, Command, Job
from lightning_cwrf.commands.loading import MODEL_OBJECTS, Loaded, add_model_options, load, vanilla_of
from lightning_cwrf.commands.training import add_training_options, defense_of, make_trainer, trainer_arguments
from lightning_cwrf.defenses import Defense
from lightning_cwrf.preflight import Preflight, check

_EXPLAINED = """What it looks at: how a batch is read, logits or probabilities, labels, what is trainable, vanilla
weights, layers that DP-SGD refuses, random augmentation, samplers, examples on two sides, what so many examples
can show, and the time of scoring, fine-tuning and audit, measured on a few batches. Nothing is changed or written.

example:
  cwrf check --model mine.Net --data mine.Data --checkpoint finished.ckpt --reference val --vanilla init.safetensors"""


@dataclass
class CheckJob(Job):
    loaded: Loaded
    vanilla: Any
    defense: Defense | None
    trainer: Trainer

    def plan(self) -> list[str]:
        return ["read all data once, run the model on a few batches, and print what was found; nothing is written"]

    def run(self) -> int:
        report = self.preflight()
        print(report)
        return DONE if report.ok else FAILED

    def preflight(self) -> Preflight:
        options = self.loaded.options
        return check(
            self.loaded.model.to(self.loaded.device),
            self.loaded.members,
            reference=self.loaded.data("reference"),
            nonmembers=self.loaded.nonmembers,
            members=self.loaded.plain,
            vanilla=self.vanilla,
            defense=self.defense,
            trainer=self.trainer,
            steps=options.steps,
            lam=options.lam,
            validation=self.loaded.source.validation(),
            checkpoint=options.checkpoint,
        )


class CheckCommand(Command):
    name = "check"
    summary = "Look for what would go wrong in a hardening and its audit, before time is spent on them."
    objects = (*MODEL_OBJECTS, "reference", "defense")

    def explain(self) -> str:
        return _EXPLAINED

    def add_options(self, parser: Any) -> None:
        add_model_options(parser, finished=False)
        add_training_options(parser)

    def prepare(self, options: Any) -> CheckJob:
        return check_job(options)


def check_job(options: Any) -> CheckJob:
    """The preflight of these options."""
    loaded = load(options)
    trainer = make_trainer(trainer_arguments(options), [])
    return CheckJob(loaded, vanilla_of(options.vanilla), defense_of(options, loaded), trainer)
