"""Train a small classifier on handwritten digits, harden it with CWRF, and audit it before and after.

The audit is adaptive: every shadow model goes through the very same recipe as the model that it shadows, CWRF
included. The middle column of the table is the control: the same fine-tuning with the same loss, without rewinding.

    python examples/harden_digits.py --out out/digits
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from digits import BATCH, DigitsClassifier, digits, quiet, split
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from lightning_cwrf import (
    AuditResult,
    CriticalRewindCallback,
    DefenseCallback,
    GradientMaskCallback,
    PrivacyScoringCallback,
    ShadowRecipe,
    VanillaSnapshotCallback,
    WeightMask,
    train_shadows,
)
from lightning_cwrf.auditing import audit
from lightning_cwrf.report import comparison_table, plot_losses, plot_roc, write_report
from lightning_cwrf.shadows import ShadowOutputs


def build(seed: int, epochs: int) -> DigitsClassifier:
    """The untrained model of a seed: calling it again gives the same initial weights θ_vn."""
    lightning.seed_everything(seed, verbose=False)
    return DigitsClassifier(epochs)


def fit(
    model: LightningModule, members: Dataset[Any], epochs: int, callbacks: Sequence[Callback] = (), bar: str = ""
) -> Trainer:
    """One ``Trainer.fit``; the callbacks are all that differs between plain training and hardening."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*callbacks, EpochBar(bar)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(model, DataLoader(members, batch_size=BATCH, shuffle=True))
    return trainer


class EpochBar(Callback):
    """One bar for a whole fit."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar = tqdm(total=trainer.max_epochs, desc=self.name, unit="epoch")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.update()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.bar.close()


def cwrf(reference: Dataset[Any], vanilla: Any, rate: float) -> list[Callback]:
    """The callbacks of CWRF; at rate 0 nothing is rewound, so there is nothing to attach."""
    if rate == 0:
        return []
    return [
        PrivacyScoringCallback(nonmembers=DataLoader(reference, batch_size=BATCH), vanilla=vanilla),
        CriticalRewindCallback(rate=rate),
        GradientMaskCallback(),
    ]


def main(arguments: argparse.Namespace) -> None:
    quiet()
    torch.set_num_threads(1)  # the model is too small for a second thread to help
    out, seed = arguments.out, arguments.seed
    out.mkdir(parents=True, exist_ok=True)
    members, nonmembers, reference, population, pool = split(digits(), seed)
    print(
        f"{len(members)} members, {len(nonmembers)} non-members, {len(reference)} reference, "
        f"{len(population)} further test images"
    )

    def shadows(trainer: Trainer, model: LightningModule, base: ShadowOutputs | None = None) -> ShadowOutputs:
        """Models that were trained as this one was, read off its Trainer: defense and CWRF included."""
        return train_shadows(
            ShadowRecipe.like(trainer, model, callbacks=list),
            pool,
            arguments.shadows,
            population=population,
            store=out / "shadows",
            base=base,
            keep_weights=base is None,
            seed=seed,
        )

    def audited(model: LightningModule, signals: ShadowOutputs) -> AuditResult:
        return audit(model, members=members, nonmembers=nonmembers, shadows=signals, seed=seed)

    mask: WeightMask | None = None
    results: dict[str, AuditResult] = {}
    seconds: dict[str, float] = {}
    vanilla = out / "vanilla.safetensors"
    finished = build(seed, arguments.epochs)
    began = time.perf_counter()
    snapshot = VanillaSnapshotCallback(vanilla, overwrite=True)
    trainer = fit(finished, members, arguments.epochs, [snapshot], bar="unprotected")
    seconds["unprotected"] = time.perf_counter() - began
    base = shadows(trainer, finished)
    results["unprotected"] = audited(finished, base)
    for name, rate in (("fine-tuned, r = 0", 0.0), (f"CWRF, r = {arguments.rate:g}", arguments.rate)):
        hardened = build(seed, arguments.tune_epochs)
        hardened.load_state_dict(finished.state_dict())
        callbacks = [DefenseCallback("relaxloss", alpha=arguments.alpha), *cwrf(reference, vanilla, rate)]
        began = time.perf_counter()
        trainer = fit(hardened, members, arguments.tune_epochs, callbacks, bar=name)
        seconds[name] = time.perf_counter() - began
        mask = next((each.mask for each in callbacks if isinstance(each, CriticalRewindCallback)), None)
        results[name] = audited(hardened, shadows(trainer, hardened, base))
    print("\n" + comparison_table(results, seconds))
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    report = write_report(
        results,
        out / "report.html",
        title="Handwritten digits: membership inference before and after CWRF",
        mask=mask,
        settings=settings,
        seconds=seconds,
        overwrite=True,
    )
    saved = [report, plot_roc(results, out / "roc.png"), plot_losses(results, out / "losses.png")]
    print(f"\nsaved {', '.join(map(str, saved))}")


def even(word: str) -> int:
    count = int(word)
    if count < 4 or count % 2:
        raise argparse.ArgumentTypeError(f"must be even and at least 4, not {word}")
    return count


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.03, help="share of weights to rewind and freeze")
    parser.add_argument("--alpha", type=float, default=0.6, help="level of RelaxLoss")
    parser.add_argument("--shadows", type=even, default=8, help="number of shadow models, even")
    parser.add_argument("--epochs", type=int, default=60, help="of the first training")
    parser.add_argument("--tune-epochs", type=int, default=40, help="of the fine-tuning")
    parser.add_argument("--out", type=Path, default=Path("out/digits"))
    return parser.parse_args(words)


if __name__ == "__main__":
    main(parse_arguments())
