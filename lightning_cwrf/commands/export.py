"""``cwrf export``: a model to give away."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from lightning_cwrf.auditing import AuditResult
from lightning_cwrf.commands.base import DONE, Command, Job, UsageError, check_outputs
from lightning_cwrf.commands.finished import load_model
from lightning_cwrf.commands.loading import add_weights_options
from lightning_cwrf.exporting import export

_EXPLAINED = """A checkpoint of a hardening also holds the optimizer's state, the mask of the rewound weights and
digests of the reference data; an export does not. Beside the weights it writes a model card in Markdown, with --audit
the table of that audit (no scores of single members). The audit must be of these weights.

examples:
  cwrf export --model mine.Net --checkpoint hardened/hardened.ckpt --audit hardened/hardened.json --out model.ckpt
  cwrf export --model mine.Net --checkpoint hardened/hardened.ckpt --out model.safetensors"""
_SUFFIXES = (".safetensors", ".ckpt")


@dataclass
class ExportJob(Job):
    model: LightningModule
    audit: AuditResult | None
    title: str | None
    out: Path

    def plan(self) -> list[str]:
        return [f"write {self.out}, the weights alone", f"write {self.out.with_suffix('.md')}, the model card"]

    def run(self) -> int:
        try:
            export(self.model, self.out, audit=self.audit, title=self.title, overwrite=True)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error
        print(f"saved {self.out}, {self.out.with_suffix('.md')}")
        return DONE


class ExportCommand(Command):
    name = "export"
    summary = "Write a model to give away: its weights alone, and a model card."
    objects = ("model",)

    def explain(self) -> str:
        return _EXPLAINED

    def add_options(self, parser: Any) -> None:
        add_weights_options(parser)
        parser.add_argument("--audit", type=str, help="a saved audit of these weights, for the card")
        parser.add_argument("--title", type=str, help="of the card; default: the name of the class")
        parser.add_argument(
            "--out",
            type=str,
            help="the file to write: model.safetensors, or model.ckpt for load_from_checkpoint; the card is beside it",
        )

    def prepare(self, options: Any) -> ExportJob:
        if options.model is None:
            raise UsageError("--model is missing: pass the import path of your class, such as mine.Net.")
        if options.checkpoint is None:
            raise UsageError("--checkpoint is missing: pass the file of the finished weights.")
        if options.out is None:
            raise UsageError("--out is missing: name the file to write, such as model.safetensors.")
        out = Path(options.out)
        if out.suffix not in _SUFFIXES:
            raise UsageError(f"--out {out}: its name must end in {' or '.join(_SUFFIXES)}.")
        inputs = [options.checkpoint, options.audit, *map(str, options.config or ())]
        check_outputs([out, out.with_suffix(".md")], options.overwrite, inputs)
        audit = None if options.audit is None else AuditResult.load(options.audit)
        return ExportJob(load_model(options), audit, options.title, out)
