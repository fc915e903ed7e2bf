"""Train a small classifier on handwritten digits, harden it with CWRF, and audit it before and after.

The table is about the three ways of training, each over many models that went through the very same recipe, CWRF
included, and were attacked with one another. Its middle column is the control: the same fine-tuning with the same loss,
without rewinding. One page is about the ways of training, another one about the three models themselves.

    python examples/harden_digits.py --out out/digits
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from digits import BATCH, DigitsClassifier, Split, digits, quiet, split
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
    RecipeAudit,
    ShadowRecipe,
    VanillaSnapshotCallback,
    WeightMask,
    audit_recipe,
    train_shadows,
)
from lightning_cwrf.auditing import audit
from lightning_cwrf.report import comparison_table, plot_roc, plot_tradeoff, write_report
from lightning_cwrf.report.changes import conclusion

UNPROTECTED = "unprotected"


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


class Hardened(NamedTuple):
    """A model, the Trainer that fitted it, which its recipe is read off, and the seconds that this took."""

    model: LightningModule
    trainer: Trainer
    seconds: float


def train(arguments: argparse.Namespace, parts: Split) -> tuple[dict[str, Hardened], WeightMask | None]:
    """The finished model, and its two fine-tunings by name; and which weights CWRF rewound."""
    seed, vanilla = arguments.seed, arguments.out / "vanilla.safetensors"
    finished = build(seed, arguments.epochs)
    began = time.perf_counter()
    snapshot = VanillaSnapshotCallback(vanilla, overwrite=True)
    trainer = fit(finished, parts.members, arguments.epochs, [snapshot], bar=UNPROTECTED)
    found = {UNPROTECTED: Hardened(finished, trainer, time.perf_counter() - began)}
    mask = None
    for name, rate in (("fine-tuned, r = 0", 0.0), (f"CWRF, r = {arguments.rate:g}", arguments.rate)):
        hardened = build(seed, arguments.tune_epochs)
        hardened.load_state_dict(finished.state_dict())
        callbacks = [DefenseCallback("relaxloss", alpha=arguments.alpha), *cwrf(parts.reference, vanilla, rate)]
        began = time.perf_counter()
        trainer = fit(hardened, parts.members, arguments.tune_epochs, callbacks, bar=name)
        found[name] = Hardened(hardened, trainer, time.perf_counter() - began)
        mask = next((each.mask for each in callbacks if isinstance(each, CriticalRewindCallback)), mask)
    return found, mask


def audits(
    arguments: argparse.Namespace, parts: Split, trained: dict[str, Hardened]
) -> tuple[dict[str, RecipeAudit], dict[str, AuditResult]]:
    """Of each way of training, over many models, and of each of these models itself."""
    recipes: dict[str, RecipeAudit] = {}
    models: dict[str, AuditResult] = {}
    base = None
    for name, each in trained.items():
        shadows = train_shadows(
            ShadowRecipe.like(each.trainer, each.model, callbacks=list),  # defense and CWRF included
            parts.pool,
            arguments.shadows,
            population=parts.population,
            store=arguments.out / "shadows",
            base=base,
            keep_weights=base is None,
            seed=arguments.seed,
            stack=math.ceil(arguments.shadows / 2),
        )
        base = base or shadows
        recipes[name] = audit_recipe(shadows, seed=arguments.seed)
        models[name] = audit(
            each.model,
            members=parts.members,
            nonmembers=parts.nonmembers,
            shadows=shadows,
            attacks=["loss", "lira", "rmia"],
            seed=arguments.seed,
        )
    return recipes, models


def main(arguments: argparse.Namespace) -> None:
    quiet()
    torch.set_num_threads(1)  # the model is too small for a second thread to help
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    parts = split(digits(), arguments.seed)
    sizes = ", ".join(f"{len(part)} {name}" for name, part in parts._asdict().items() if name != "pool")
    print(f"{sizes}; {arguments.shadows} models of each recipe")
    trained, mask = train(arguments, parts)
    recipes, models = audits(arguments, parts, trained)
    print(f"\n{comparison_table(recipes)}\n")
    print("\n".join(conclusion(recipes)))
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    title = "Handwritten digits: membership inference before and after CWRF"
    shared: dict[str, Any] = {"title": title, "mask": mask, "settings": settings, "overwrite": True}
    seconds = {name: each.seconds for name, each in trained.items()}
    saved = [
        write_report(recipes, out / "report.html", **shared),
        write_report(models, out / "models.html", seconds=seconds, **shared),
        plot_tradeoff({name: {name: each} for name, each in recipes.items()}, out / "tradeoff.png"),
        plot_roc(recipes, out / "roc.png"),
    ]
    print(f"\nsaved {', '.join(map(str, saved))}")


def share(word: str) -> float:
    value = float(word)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {word}: r = 0 is run in any case")
    return value


def even(word: str) -> int:
    count = int(word)
    if count < 8 or count % 2:
        raise argparse.ArgumentTypeError(f"must be even and at least 8, not {word}")
    return count


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=share, default=0.03, help="share of weights to rewind and freeze")
    parser.add_argument("--alpha", type=float, default=0.3, help="level of RelaxLoss")
    parser.add_argument("--shadows", type=even, default=32, help="models of each recipe, even")
    parser.add_argument("--epochs", type=int, default=60, help="of the first training")
    parser.add_argument("--tune-epochs", type=int, default=40, help="of the fine-tuning")
    parser.add_argument("--out", type=Path, default=Path("out/digits"))
    return parser.parse_args(words)


if __name__ == "__main__":
    main(parse_arguments())
