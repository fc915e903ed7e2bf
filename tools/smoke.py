"""Try an installed wheel: ``python -I tools/smoke.py`` in an environment with nothing else."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_cwrf
from lightning_cwrf import (
    CriticalRewindCallback,
    DefenseCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
)


class Small(LightningModule):
    """Two layers on random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(model: Small, members: DataLoader, epochs: int, callbacks: tuple = ()) -> None:
    """One fit that leaves nothing on the disk."""
    Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, members)


def harden() -> None:
    """A hardening and an audit: the frozen weights are the initial ones, and the attack has an AUC."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(96, 8), torch.randint(3, (96,)))
    members, nonmembers, reference = (
        DataLoader(torch.utils.data.Subset(data, range(i, i + 32)), batch_size=16) for i in (0, 32, 64)
    )
    model = Small()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, members, epochs=5)
    rewind, privacy = CriticalRewindCallback(rate=0.1), MIAAuditCallback(nonmembers=nonmembers)
    scoring = PrivacyScoringCallback(nonmembers=reference, vanilla=initial, steps=2)
    fit(model, members, 2, (scoring, rewind, GradientMaskCallback(), DefenseCallback("relaxloss", alpha=0.5), privacy))
    kept = sum(int((value == initial[name]).sum()) for name, value in model.state_dict().items())
    assert rewind.mask is not None
    assert kept >= rewind.mask.count == round(0.1 * rewind.mask.total), kept
    assert privacy.result is not None
    print(privacy.result)


def command() -> None:
    """``cwrf --help``, where this version has the command."""
    if not importlib.metadata.distribution("lightning-cwrf").entry_points.select(group="console_scripts", name="cwrf"):
        return
    script = Path(sysconfig.get_path("scripts")) / "cwrf"
    subprocess.run([str(script), "--help"], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    place = Path(lightning_cwrf.__file__).resolve()
    assert Path(sysconfig.get_path("purelib")).resolve() in place.parents, f"{place} is not an installed wheel"
    assert lightning_cwrf.__version__ == importlib.metadata.version("lightning-cwrf")
    assert (place.parent / "py.typed").exists()
    harden()
    command()
    print(f"lightning_cwrf {lightning_cwrf.__version__} works on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
