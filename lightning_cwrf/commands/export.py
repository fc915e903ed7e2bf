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
from lightning_cwrf.commands.record import HARDENED, RECORD, Record, read_record
from lightning_cwrf.exporting import export
from lightning_cwrf.weights.copies import weights_digest

_EXPLAINED = """A checkpoint of a hardening also holds the optimizer's state, the mask of the rewound weights and
digests of the reference data; an export does not. Beside the weights it writes a model card in Markdown, with --audit
the table of that audit (no scores of single members). The audit must be of these weights. Where `cwrf harden` wrote the
checkpoint, its settings.json beside it tells the card how: defense, strength, share of rewound weights, epochs.

examples:
  cwrf export --model mine.Net --checkpoint hardened/hardened.ckpt --audit hardened/hardened.json --out model.ckpt
  cwrf export --model mine.Net --checkpoint hardened/hardened.ckpt --out model.safetensors"""
_SUFFIXES = (".safetensors", ".ckpt")
_FILES = ("checkpoint", "vanilla")
_GROUPS = {
    "scoring": ("lam", "steps"),
    "rewinding": ("rate", "chosen", "values", "hold", "batchnorm", "vanilla"),
    "fine-tuning": ("checkpoint", "max_epochs", "trainer", "seed"),
}


@dataclass
class ExportJob(Job):
    model: LightningModule
    audit: AuditResult | None
    title: str | None
    out: Path
    settings: dict[str, Any]
    remarks: list[str]

    def plan(self) -> list[str]:
        card = f"write {self.out.with_suffix('.md')}, the model card"
        return [*self.remarks, f"write {self.out}, the weights alone", card]

    def run(self) -> int:
        print("".join(f"{remark}\n" for remark in self.remarks), end="")
        told: dict[str, Any] = {"audit": self.audit, "title": self.title, "settings": self.settings}
        try:
            export(self.model, self.out, overwrite=True, **told)
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
        parser.add_argument(
            "--settings",
            type=str,
            help="settings.json of the hardening, for the card; default: beside --checkpoint",
        )
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
        inputs = [options.checkpoint, options.audit, options.settings, *map(str, options.config or ())]
        check_outputs([out, out.with_suffix(".md")], options.overwrite, inputs)
        audit = None if options.audit is None else AuditResult.load(options.audit)
        model = load_model(options)
        return ExportJob(model, audit, options.title, out, *_settings(options, model))


def _settings(options: Any, model: LightningModule) -> tuple[dict[str, Any], list[str]]:
    """The settings of the hardening for the card, and a remark where those beside the model are left out."""
    given, checkpoint = options.settings, Path(options.checkpoint)
    path = checkpoint.parent / RECORD if given is None else Path(given)
    if given is None and not path.is_file():
        return {}, []
    asked = given is not None or checkpoint.name == HARDENED
    try:
        record = read_record(path)
    except ValueError:
        if asked:
            raise
        return {}, [f"{path} is no record of a hardening: the card has no settings."]
    known = record.is_of(weights_digest(model))
    if known is False:
        told = f"{path} is of a hardening that gave other weights than those of {checkpoint}"
        if asked:
            raise UsageError(f"{told}: name the settings.json of the hardening that wrote them, --settings FILE.")
        return {}, [f"{told}: the card has no settings."]
    return _for_card(record) | ({} if known else {"of these weights": "not known"}), []


def _for_card(record: Record) -> dict[str, Any]:
    """The settings by what they are of, without the folders of this machine."""
    settings = {name: Path(value).name if name in _FILES else value for name, value in record.settings.items()}
    found = {group: {n: settings.pop(n) for n in names if n in settings} for group, names in _GROUPS.items()}
    return {**{group: values for group, values in found.items() if values}, **settings}
