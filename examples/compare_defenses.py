"""Every defense on the handwritten digits, four ways, against an attacker who knows each of them.

A defense is trained from scratch; it tunes the finished model (r = 0); it tunes it after CWRF's rewinding; and it tunes
it after rewinding as many weights chosen at random. The second and the fourth are the controls: what CWRF's choice of
weights adds is its distance from them. Every model has shadow models of its own, trained by its own recipe.

One table, one plot of utility against privacy. A run that was stopped goes on where it was.

    python examples/compare_defenses.py --out out/compare          # about a quarter of an hour on two cores
    python examples/compare_defenses.py --out out/compare --quick  # a few minutes: fewer epochs and shadow models
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from digits import BATCH, digits, network, quiet, split
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm.auto import tqdm

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback, train_shadows
from lightning_cwrf.auditing import AuditResult, audit_outputs
from lightning_cwrf.defenses import create_defense, defense_class
from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.report import plot_tradeoff, tradeoff_table
from lightning_cwrf.shadows.identity import identity

DEFENSES: dict[str, dict[str, Any]] = {
    "none": {},
    "relaxloss": {"alpha": 0.4},
    "hamp": {"gamma": 0.6, "alpha": 0.01},
    "ccl": {"alpha": 0.5, "beta": 1.0},
    "past": {"lam": 1e-4, "alpha": 1.5},
    "label_smoothing": {"smoothing": 0.2},
    "confidence_penalty": {"beta": 0.5},
    "weight_penalty": {"l1": 1e-4},
    "adversarial_regularization": {"lam": 1.0},
    "mixup_mmd": {"lam": 3.0},
    "dpsgd": {"noise_multiplier": 0.6, "target_delta": 1e-3, "max_grad_norm": 1.0, "accountant": "rdp"},
}
WAYS = ("from scratch", "tuned, r = 0", "CWRF", "random mask")


class Classifier(LightningModule):
    """An ordinary classifier. It has no BatchNorm, so that DP-SGD can train it too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(batchnorm=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


@dataclass(frozen=True)
class Recipe:
    """One cell of the table: a defense, trained in one of the WAYS. Shadow models and the audited one share it."""

    defense: str
    settings: Mapping[str, Any]
    way: str
    epochs: int
    rate: float
    reference: tuple[Tensor, Tensor] = field(repr=False)

    def __call__(self, members: Dataset[Any], seed: int, base: dict[str, Tensor] | None = None) -> LightningModule:
        quiet()
        lightning.seed_everything(seed, verbose=False)
        model = Classifier()
        vanilla = {name: value.clone() for name, value in model.state_dict().items()}
        if base is not None:
            model.load_state_dict(base)
        reference = DataLoader(TensorDataset(*self.reference), batch_size=BATCH)
        if self.defense != "none":
            data = dict.fromkeys(defense_class(self.defense).data_names(), reference)
            create_defense(self.defense, **self.settings, **data).attach(model)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=self.epochs,
            callbacks=self.callbacks(reference, vanilla),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
        )
        trainer.fit(model, DataLoader(members, batch_size=BATCH, shuffle=True))
        return model

    def callbacks(self, reference: DataLoader[Any], vanilla: dict[str, Tensor]) -> list[Callback]:
        if self.way not in ("CWRF", "random mask"):
            return []
        kind = "privacy" if self.way == "CWRF" else "random"
        scoring = PrivacyScoringCallback(nonmembers=reference, vanilla=vanilla, kind=kind)
        return [scoring, CriticalRewindCallback(rate=self.rate), GradientMaskCallback()]


def main(arguments: argparse.Namespace) -> None:
    quiet()
    torch.set_num_threads(1)  # the model is too small for a second thread to help
    out, seed = arguments.out, arguments.seed
    data = digits()
    members, nonmembers, reference, population, pool = split(data, seed)

    def recipe(defense: str, way: str) -> Recipe:
        epochs = arguments.epochs if way == "from scratch" else arguments.tune_epochs
        return Recipe(defense, DEFENSES[defense], way, epochs, arguments.rate, data[reference.indices])

    def shadows(of: Recipe, **settings: Any) -> Any:
        return train_shadows(of, pool, arguments.shadows, population=population, store=out / "shadows", seed=seed,
                             progress=False, **settings)  # fmt: skip

    def model_of(of: Recipe, base: dict[str, Tensor] | None = None) -> Classifier:
        """The audited model: trained on the members, or loaded if this very recipe was trained before."""
        # The tensors, not their names: a stored model is that of the same recipe on the same members.
        file = out / "models" / f"{identity([of, data[members.indices], seed, base])[:32]}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(of(members, seed, base).state_dict(), file)
        model = Classifier()
        model.load_state_dict(load_file(file))
        return model

    def audited(model: Classifier, signals: Any) -> AuditResult:
        inside, outside, further = (collect_outputs(model, part) for part in (members, nonmembers, population))
        return audit_outputs(inside, outside, shadows=signals, population=further)

    plain = recipe("none", "from scratch")
    base = shadows(plain, keep_weights=True)
    finished = model_of(plain).state_dict()
    results: dict[str, dict[str, AuditResult]] = {way: {} for way in WAYS}
    cells = [(defense, way) for defense in arguments.defenses for way in WAYS]
    with tqdm(cells, unit="model") as bar:
        for defense, way in bar:
            bar.set_description(f"{defense}, {way}")
            of = recipe(defense, way)
            if (defense, way) == ("none", "from scratch"):
                model, signals = model_of(of), base
            elif way == "from scratch":
                model, signals = model_of(of), shadows(of)
            else:
                model, signals = model_of(of, finished), shadows(of, base=base)
            results[way][defense] = audited(model, signals)
    table = tradeoff_table(results)
    (out / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nsaved {plot_tradeoff(results, out / 'tradeoff.png')} and {out / 'table.txt'}")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 shadow models, a third of the epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.03, help="share of weights to rewind and freeze")
    parser.add_argument("--shadows", type=int, help="number of shadow models, even (default 8)")
    parser.add_argument("--epochs", type=int, help="of a training from scratch (default 60)")
    parser.add_argument("--tune-epochs", type=int, help="of a fine-tuning (default 40)")
    parser.add_argument("--defenses", nargs="+", choices=list(DEFENSES), default=list(DEFENSES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("out/compare"))
    arguments = parser.parse_args(words)
    for name, full, quick in (("shadows", 8, 4), ("epochs", 60, 20), ("tune_epochs", 40, 14)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else full)
    return arguments


if __name__ == "__main__":
    main(parse_arguments())
