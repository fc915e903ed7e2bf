"""``cwrf harden``: rewind the most vulnerable weights of a finished model, fine-tune it, and measure both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_cwrf.auditing import AuditResult
from lightning_cwrf.callbacks import CriticalRewindCallback, DefenseCallback
from lightning_cwrf.commands.audits import (
    ShadowPlan,
    add_shadow_options,
    attacks_of,
    audited,
    concluded,
    hardened_recipe,
    shadow_plan,
)
from lightning_cwrf.commands.base import FAILED, Command, Job, UsageError, check_outputs
from lightning_cwrf.commands.check import CheckJob, check_job
from lightning_cwrf.commands.gate import Gate, add_gate_options, explain_gate, judged, parse_gates
from lightning_cwrf.commands.loading import MODEL_OBJECTS, add_model_options
from lightning_cwrf.commands.record import HARDENED, MASK, RECORD, write_record
from lightning_cwrf.commands.training import (
    LEVEL,
    add_training_options,
    at_level,
    cwrf_callbacks,
    explain_defenses,
    fine_tuning,
    make_trainer,
    needs_level,
    rewinding,
    trainer_arguments,
)
from lightning_cwrf.data import Batches
from lightning_cwrf.report import comparison_table, write_report
from lightning_cwrf.shadows import ShadowOutputs
from lightning_cwrf.weights.selection import how_rewound

_EXPLAINED = """It checks first (as `cwrf check`) and stops at an error. Then it audits the finished model, scores its
weights, rewinds the share --rate of them to their values from before training and freezes them, fine-tunes the
rest with the loss of --defense, and audits the result. --values, --hold and --batchnorm change what is done to the
chosen weights. Written to --out: hardened.ckpt, which your own class loads (load_from_checkpoint),
mask.safetensors, finished.json and hardened.json (the audits), settings.json, report.html.

How strong the defense is, is yours to choose: more --defense.alpha is more private and less accurate. It starts at the
finished model's loss on --reference, which it never saw: then it has the same loss on its members.

examples:
  cwrf harden --model mine.Net --data mine.Data --checkpoint finished.ckpt --vanilla init.safetensors --out hardened
  cwrf harden --config harden.yaml --defense relaxloss --defense.alpha 0.5 --rate 0.05 --control
  cwrf harden --config harden.yaml --shadows 16 --training.max_epochs 100

The loss attack alone is weak: --shadows adds LiRA, and with --population RMIA, against models that went through
the same hardening. And most of the effect may come from the fine-tuning, not from the rewinding: --control shows how
much."""


@dataclass
class HardenJob(Job):
    checking: CheckJob
    make_callbacks: Callable[[], list[Callback]]
    arguments: dict[str, Any]
    attacks: list[str]
    gates: list[Gate]
    shadows: ShadowPlan | None
    out: Path
    validation: Batches | None
    seconds: dict[str, float | None] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    results: dict[str, AuditResult] = field(default_factory=dict)
    chosen: str = ""
    measured: bool = False

    def plan(self) -> list[str]:
        options = self.checking.loaded.options
        lines = ["check the model and the data, and stop at an error"]
        if self.shadows is not None:
            lines.append(f"train {self.shadows.n} shadow models for each audit, kept in {self.shadows.store}")
        lines.append(f"audit the finished model of {options.checkpoint}")
        epochs = f"fine-tune {self._fine_tuning}"
        if options.control:
            lines.append("control: fine-tune in the same way, nothing rewound; audit it")
        how = how_rewound(options["values"], options.hold)
        lines.append(f"score the weights in {options.steps} steps; {options.rate:.2%} of them are then {how}")
        lines += [f"{options.batchnorm} BatchNorm's running statistics"] if options.batchnorm != "keep" else []
        return [*lines, f"{epochs}; audit the result", *(f"write {path}" for path in outputs(self.out, options))]

    def run(self) -> int:
        loaded = self.checking.loaded
        options = loaded.options
        report = self.checking.preflight()
        print(report, flush=True)
        if not report.ok:
            print("\nstopped at the errors above; nothing was trained or written.")
            return FAILED
        self._set_level()
        print(f"fine-tuning: {self._fine_tuning}", flush=True)
        base = None if self.shadows is None else self.shadows.train()
        self._keep("finished", audited(loaded, loaded.model, "the finished model", base, attacks=self.attacks), None)
        if options.control:
            control = loaded.again()
            began = time.perf_counter()
            trainer = self._fit(control, [DefenseCallback(self._defense)])
            self._audit("control, r = 0", "control", control, trainer, base, began)
        callbacks = self.make_callbacks()
        hardened, began = loaded.model, time.perf_counter()
        trainer = self._fit(hardened, [*callbacks, DefenseCallback(self._defense)])
        self._unfinished.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(self._unfinished / HARDENED)
        rewind = next(each for each in callbacks if isinstance(each, CriticalRewindCallback))
        assert rewind.mask is not None
        rewind.mask.save(self._unfinished / MASK)
        self.chosen = f"{rewind.mask.count:,} of {rewind.mask.total:,} weights"
        self._audit(f"hardened, {self._rewinding}", "hardened", hardened, trainer, base, began)
        return self._conclude()

    @property
    def _fine_tuning(self) -> str:
        return fine_tuning(self.checking.loaded.options, self._defense, measured=self.measured)

    def _set_level(self) -> None:
        """RelaxLoss' ``alpha``, where the user named none."""
        loaded = self.checking.loaded
        if needs_level(self._defense, loaded.options):
            reference = loaded.data("reference")
            assert reference is not None
            self.checking.defense = at_level(self._defense, loaded.model, reference, loaded.options.steps)
            self.measured = True

    @property
    def _rewinding(self) -> str:
        return rewinding(self.checking.loaded.options)

    @property
    def _defense(self) -> Any:
        return self.checking.defense

    @property
    def _unfinished(self) -> Path:
        """Where files are until all are there, so that a failed run leaves none that block the next."""
        return self.out / "unfinished"

    def _fit(self, model: LightningModule, callbacks: list[Callback]) -> Trainer:
        seed_everything(self.checking.loaded.options.seed, workers=True, verbose=False)
        trainer = make_trainer(self.arguments, callbacks)
        trainer.fit(model, self.checking.loaded.members, self.validation)
        if trainer.interrupted:
            raise KeyboardInterrupt
        return trainer

    def _audit(
        self,
        name: str,
        file: str,
        model: LightningModule,
        trainer: Trainer,
        base: ShadowOutputs | None,
        began: float,
    ) -> None:
        spent = time.perf_counter() - began
        shadows = None if self.shadows is None else self.shadows.train(hardened_recipe(trainer, model), base)
        self._keep(name, audited(self.checking.loaded, model, name, shadows, attacks=self.attacks), spent, file)

    def _keep(self, name: str, result: AuditResult, seconds: float | None, file: str | None = None) -> None:
        self.results[name], self.seconds[name], self.files[name] = result, seconds, f"{file or name}.json"
        result.save(self._unfinished / self.files[name])

    def _settings(self) -> dict[str, Any]:
        """What the report and a model card say of the run."""
        options = self.checking.loaded.options
        rewind = ("rate", "values", "hold", "batchnorm")
        names = ("checkpoint", "vanilla", *rewind, "lam", "steps", "max_epochs", "shadows", "seed")
        settings: dict[str, Any] = {name: str(options[name]) for name in names}
        defense = {} if self._defense is None else self._defense.named()
        defense |= {"alpha taken from": LEVEL} if self.measured else {}
        more = {"chosen": self.chosen, "trainer": dict(options.trainer), "defense": defense}
        return settings | {name: value for name, value in more.items() if value}

    def _conclude(self) -> int:
        options = self.checking.loaded.options
        print("\n" + comparison_table(self.results, self.seconds))
        print(f"\nfine-tuning: {self._fine_tuning}")
        if not options.control:
            print("How much of this is the fine-tuning alone is not known: run it with --control too.")
        write_report(
            self.results,
            self._unfinished / "report.html",
            mask=self._unfinished / MASK,
            settings=self._settings(),
            seconds=self.seconds,
            overwrite=True,
        )
        spent = {self.files[name]: seconds for name, seconds in self.seconds.items()}
        weights = {self.files[name]: result.weights for name, result in self.results.items()}
        write_record(self._unfinished, self._settings(), spent, weights)
        for path in outputs(self.out, options):
            (self._unfinished / path.name).replace(path)
        if not any(self._unfinished.iterdir()):  # a failed run may have left others
            self._unfinished.rmdir()
        print(f"\nsaved {', '.join(map(str, outputs(self.out, options)))}")
        code, lines = judged(self.gates, list(self.results.values())[-1], options.judge)
        if lines:
            print("\n" + "\n".join(lines))
        print(concluded(self.results))
        return code


def outputs(out: Path, options: Any) -> list[Path]:
    """The files that a hardening writes."""
    names = [HARDENED, MASK, "finished.json", "hardened.json", RECORD]
    names += ["control.json"] if options.control else []
    return [out / name for name in [*names, "report.html"]]


class HardenCommand(Command):
    name = "harden"
    summary = "Make a finished model safer: rewind its most vulnerable weights, fine-tune it, audit before and after."
    objects = (*MODEL_OBJECTS, "reference", "defense", "population", "pool", "validation")

    def explain(self) -> str:
        return f"{_EXPLAINED}\n\n{explain_defenses()}\n\n{explain_gate()}"

    def add_options(self, parser: Any) -> None:
        add_model_options(parser)
        add_training_options(parser)
        parser.add_argument("--validation", type=str | dict[str, Any] | None, help="data for your validation_step")
        parser.add_argument("--out", type=str, default="hardened", help="folder for everything that is written")
        parser.add_argument(
            "--control",
            action="store_true",
            help="also fine-tune without rewinding, and put it into the table: what rewinding itself adds. It costs a "
            "second fine-tuning, so it is off by default",
        )
        add_shadow_options(parser)
        add_gate_options(parser)

    def prepare(self, options: Any) -> HardenJob:
        if options.checkpoint is None:
            raise UsageError("--checkpoint is missing: pass the file of the finished weights.")
        out = Path(options.out)
        if out.is_file():
            raise UsageError(f"--out {out} is a file; name a folder.")
        inputs = [options.checkpoint, options.vanilla, *map(str, options.config or ())]
        check_outputs(outputs(out, options), options.overwrite, inputs)
        attacks = attacks_of(options)
        gates = parse_gates(options, attacks)
        checking = check_job(options)
        loaded = checking.loaded
        if not isinstance(loaded.members, DataLoader) and not hasattr(loaded.members, "__iter__"):
            raise UsageError("--members is a data set without a loader: pass --batch_size for the fine-tuning.")
        reference = loaded.data("reference")
        if reference is None:
            raise UsageError("--reference is missing: name data that the model never saw.")

        def callbacks() -> list[Callback]:
            return cwrf_callbacks(options, reference, loaded.plain, checking.vanilla)

        callbacks()  # they check their settings
        shadows = shadow_plan(loaded, out / "shadows")
        arguments = {"default_root_dir": str(out), **trainer_arguments(options)}
        return HardenJob(checking, callbacks, arguments, attacks, gates, shadows, out, loaded.data("validation"))
