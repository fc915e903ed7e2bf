"""``cwrf audit``: measure one finished model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_cwrf.attacks import available_attacks
from lightning_cwrf.checks import check_confidence
from lightning_cwrf.commands.audits import ShadowPlan, add_shadow_options, attacks_of, audited, concluded, shadow_plan
from lightning_cwrf.commands.base import Command, Job, UsageError, check_outputs, output_file
from lightning_cwrf.commands.gate import Gate, add_gate_options, explain_gate, judged, parse_gates
from lightning_cwrf.commands.loading import MODEL_OBJECTS, Loaded, add_model_options, load
from lightning_cwrf.report import write_report
from lightning_cwrf.weights.trained import LOOKS_UNTRAINED, check_trained

_EXPLAINED = """The loss attack needs the model alone; LiRA, which is stronger, needs --shadows, and RMIA
--population too. The table shows each attack's AUC (0.5 is chance) and its TPR at a low FPR, with confidence intervals.

examples:
  cwrf audit --model mine.Net --data mine.Data --checkpoint finished.ckpt --out audit.json
  cwrf audit --config audit.yaml --shadows 16 --training.max_epochs 100 --fail-above lira/tpr_at_fpr_0.001=0.05

The second fails the build (code 3) unless the audit shows that the TPR is below 0.05."""


@dataclass
class AuditJob(Job):
    loaded: Loaded
    attacks: list[str]
    gates: list[Gate]
    shadows: ShadowPlan | None
    out: Path | None
    report: Path | None

    def plan(self) -> list[str]:
        options = self.loaded.options
        lines = [f"audit {options.checkpoint} with {', '.join(self.attacks)} on {self.loaded.device}"]
        if self.shadows is not None:
            lines.insert(0, f"train {self.shadows.n} shadow models, kept in {self.shadows.store}")
        lines += [f"write {path}" for path in (self.out, self.report) if path is not None]
        return lines + [f"exit with code 3 if {gate.name} is {gate.sense} {gate.limit:g}" for gate in self.gates]

    def run(self) -> int:
        options = self.loaded.options
        shadows = None if self.shadows is None else self.shadows.train()
        result = audited(
            self.loaded, self.loaded.model, "the model", shadows, attacks=self.attacks, confidence=options.confidence
        )
        untrained = [remark for remark in result.remarks if LOOKS_UNTRAINED in remark]
        if untrained:
            raise UsageError(f"--checkpoint {options.checkpoint}: {untrained[0]}")
        print(result)
        if self.out is not None:
            print(f"\nsaved {result.save(self.out)}")
        if self.report is not None:
            print(f"saved {write_report({Path(options.checkpoint).stem: result}, self.report, overwrite=True)}")
        code, lines = judged(self.gates, result, options.judge)
        if lines:
            print("\n" + "\n".join(lines))
        print(concluded({"the model": result}))
        return code


class AuditCommand(Command):
    name = "audit"
    summary = "Measure how well membership inference attacks work on a finished model."
    objects = (*MODEL_OBJECTS, "population", "pool")

    def explain(self) -> str:
        return f"{_EXPLAINED}\n\nattacks: {', '.join(available_attacks())}\n\n{explain_gate()}"

    def add_options(self, parser: Any) -> None:
        add_model_options(parser)
        parser.add_argument(
            "--attacks",
            type=list[str] | str | None,
            help="as [loss,entropy]; default: loss, with --shadows lira, with --population rmia",
        )
        parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals")
        add_shadow_options(parser)
        parser.add_argument("--store", type=str, help="folder that keeps the shadow models; default: shadows")
        parser.add_argument("--out", type=str, help="file for the audit, all scores included (JSON)")
        parser.add_argument("--report", type=str, help="file for a report that people can read (HTML)")
        add_gate_options(parser)

    def prepare(self, options: Any) -> AuditJob:
        if options.checkpoint is None:
            raise UsageError("--checkpoint is missing: pass the file of the finished weights.")
        check_confidence(options.confidence)
        out, report = output_file("out", options.out, ".json"), output_file("report", options.report, ".html")
        written = [each for each in (out, report) if each is not None]
        check_outputs(written, options.overwrite, [options.checkpoint, *map(str, options.config or ())])
        attacks = attacks_of(options, options.attacks)
        gates = parse_gates(options, attacks)
        loaded = load(options)
        if options.shadows or options.dry_run:
            _check_trained(loaded)  # else the audit itself shows it, without another pass over the members
        return AuditJob(loaded, attacks, gates, shadow_plan(loaded, Path(options.store or "shadows")), out, report)


def _check_trained(loaded: Loaded) -> None:
    try:
        check_trained(loaded.model.to(loaded.device), loaded.audited["members"])
    except ValueError as error:
        raise UsageError(f"--checkpoint {loaded.options.checkpoint}: {error}") from error
