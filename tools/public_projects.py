"""Harden and audit a public project's LightningModule, unchanged: ``python tools/public_projects.py torchgeo``.

Each project is trained as its own documentation says, on small data; then come check, scoring, rewind, freeze and
fine-tuning in one more fit, audits before and after, and the exports. docs/compatibility.md has the results. The
projects are no dependencies of this package: install the one that you try, one environment for each.
"""

from __future__ import annotations

import argparse
import copy
import importlib.abc
import importlib.machinery
import importlib.metadata
import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_cwrf import (
    CriticalRewindCallback,
    DefenseCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    VanillaSnapshotCallback,
    audit,
    check,
    export,
)


@dataclass
class Tried:
    """What a project gives: a model, its data, and what it needs beyond them.

    Attributes:
        package: its name on the package index.
        model: untrained.
        members, reference, nonmembers: loaders of three disjoint parts of the data.
        epochs: of the first training.
        step: what is set as ``classification_step`` on the model, where one is needed.
        own: loaders for the first training and for validation, where the project's batches cannot be audited.
        without_hook: leave its ``on_train_epoch_end`` out of the hardening.
        exports: the files that ``export`` is asked for.
        load: makes the model of a checkpoint; None: its class's ``load_from_checkpoint``.
    """

    package: str
    model: LightningModule
    members: DataLoader[Any]
    reference: DataLoader[Any]
    nonmembers: DataLoader[Any]
    epochs: int
    step: Callable[[Any, Any], Any] | None = None
    own: tuple[DataLoader[Any], DataLoader[Any]] | None = None
    without_hook: bool = False
    exports: tuple[str, ...] = ("weights.safetensors", "model.ckpt")
    load: Callable[[Path], LightningModule] | None = None


def parts(data: Any, sizes: tuple[int, int, int] = (300, 200, 300), **loader: Any) -> list[DataLoader[Any]]:
    """Loaders of three parts, the first one shuffled."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    ends = np.cumsum([0, *sizes]).tolist()
    pieces = [Subset(data, order[begin:end]) for begin, end in itertools.pairwise(ends)]
    return [DataLoader(piece, batch_size=32, shuffle=i == 0, **loader) for i, piece in enumerate(pieces)]


def digits(size: int = 8, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``(n, channels, size, size)`` and labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = nn.functional.interpolate(images, size=(size, size)).expand(-1, channels, -1, -1).contiguous()
    return images, torch.tensor(data.target)


def torchgeo() -> Tried:
    """ClassificationTask: dict batches (image, label), a timm model, a scheduler on val_loss."""
    from torchgeo.trainers import ClassificationTask

    images, labels = digits(16, 3)
    data = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    model = ClassificationTask(model="resnet18", in_channels=3, task="multiclass", num_classes=10, loss="ce")
    return Tried("torchgeo", model, *parts(data), epochs=6)


def uq_box() -> Tried:
    """DeterministicClassification: dict batches (input, target), an optimizer as a function."""
    from functools import partial

    from lightning_uq_box.uq_methods import DeterministicClassification

    images, labels = digits()
    data = [{"input": image.flatten(), "target": label} for image, label in zip(images, labels, strict=True)]
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    model = DeterministicClassification(net, nn.CrossEntropyLoss(), optimizer=optimizer)

    def load(path: Path) -> LightningModule:  # it saves no hyper-parameters
        again = copy.deepcopy(net)
        return DeterministicClassification.load_from_checkpoint(path, model=again, loss_fn=nn.CrossEntropyLoss())

    # The hook computes metrics that only the replaced training_step updates.
    return Tried("lightning-uq-box", model, *parts(data), epochs=40, without_hook=True, load=load)


def chemprop() -> Tried:
    """MPNN: a batch is one graph of all its molecules, in a NamedTuple; forward returns probabilities.

    The graph has no examples to tell apart, so scoring and audits get the molecules' names, and the step makes the
    graph of them.
    """
    from chemprop import data as chem
    from chemprop import models
    from chemprop import nn as layers

    names = smiles(800)
    labels = [float(name.count("N") + name.count("O") > 3) for name in names]
    points = [chem.MoleculeDatapoint.from_smi(name, [y]) for name, y in zip(names, labels, strict=True)]
    data = chem.MoleculeDataset(points)
    graphs = dict(zip(names, data, strict=True))
    model = models.MPNN(layers.BondMessagePassing(), layers.MeanAggregation(), layers.BinaryClassificationFFN())

    def step(self: Any, batch: Any) -> Any:
        graph = chem.collate_batch([graphs[name] for name in batch[0]])
        return self.predictor.train_step(self.fingerprint(graph.bmg, graph.V_d, graph.X_d)), batch[1]

    own = parts(data, collate_fn=chem.collate_batch)
    plain = parts(list(zip(names, labels, strict=True)))
    return Tried("chemprop", model, *plain, epochs=20, step=step, own=(own[0], own[2]))


def tabular() -> Tried:
    """CategoryEmbeddingModel: one dict of columns for forward, targets (n, 1), OmegaConf hyper-parameters.

    The project imports pytorch_lightning, whose modules cannot be hardened: here that name leads to lightning.pytorch.
    """
    sys.meta_path.insert(0, PresentName())
    import pandas as pd
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    images, labels = digits()
    columns = [f"pixel{i}" for i in range(64)]
    frame = pd.DataFrame(images.flatten(1).numpy(), columns=columns).assign(digit=labels.numpy())
    whole = TabularModel(
        data_config=DataConfig(target=["digit"], continuous_cols=columns, normalize_continuous_features=False),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="64-32"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(accelerator="cpu"),
        verbose=False,
    )
    data = whole.prepare_dataloader(train=frame[:1400], validation=frame[1400:], seed=0)

    def step(self: Any, batch: Any) -> Any:
        return self(batch)["logits"], batch["target"].squeeze(1)

    model = whole.prepare_model(data)

    def load(path: Path) -> LightningModule:  # its __init__ takes the configuration, as TabularModel passes it
        given = {"config": whole.config, "inferred_config": whole.inferred_config}
        return type(model).load_from_checkpoint(path, **given)

    loaders = parts(data.train_dataloader().dataset)
    return Tried("pytorch-tabular", model, *loaders, epochs=40, step=step, load=load)


class PresentName(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets every import of ``pytorch_lightning`` give ``lightning.pytorch``: the same library, its present name."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        ours = name.partition(".")[0] == "pytorch_lightning"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(spec.name.replace("pytorch_lightning", "lightning.pytorch", 1))
        self.kept = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.kept


def smiles(count: int) -> list[str]:
    """Names of random chain molecules, all different."""
    rng = np.random.default_rng(0)
    found: dict[str, None] = {}
    while len(found) < count:
        found["C" + "".join(rng.choice(["C", "N", "O", "C(C)", "C(=O)", "c1ccccc1"], size=rng.integers(3, 10)))] = None
    return list(found)


PROJECTS: dict[str, Callable[[], Tried]] = {
    "torchgeo": torchgeo,
    "uq_box": uq_box,
    "chemprop": chemprop,
    "tabular": tabular,
}


def quiet(folder: Path, **settings: Any) -> Trainer:
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, **{**off, **settings})


def harden(tried: Tried, folder: Path) -> None:
    """Every step on one model; an error ends it."""
    model, initial = tried.model, folder / "init.safetensors"
    cls, body = type(model), dict(vars(type(model)))
    train, validation = tried.own or (tried.members, tried.nonmembers)
    start = VanillaSnapshotCallback(initial)
    quiet(folder, max_epochs=tried.epochs, callbacks=[start]).fit(model, train, validation)
    if tried.step is not None:
        model.classification_step = MethodType(tried.step, model)  # type: ignore[assignment]
    if tried.without_hook:
        model.on_train_epoch_end = _nothing  # type: ignore[method-assign]
    print(check(model, tried.members, reference=tried.reference, nonmembers=tried.nonmembers, vanilla=initial))
    before = audit(model, members=tried.members, nonmembers=tried.nonmembers)
    rewind, privacy = CriticalRewindCallback(rate=0.03), MIAAuditCallback(nonmembers=tried.nonmembers)
    callbacks = [
        PrivacyScoringCallback(nonmembers=tried.reference, vanilla=initial),
        rewind,
        GradientMaskCallback(),
        DefenseCallback("relaxloss", alpha=0.3),
        privacy,
    ]
    run = quiet(folder, max_epochs=max(2, tried.epochs // 2), callbacks=callbacks)
    run.fit(model, tried.members, validation)
    assert type(model) is cls
    assert dict(vars(cls)) == body, "the class body has changed"
    assert rewind.mask is not None
    assert privacy.result is not None
    print(f"rewound and frozen: {rewind.mask.count:,} of {rewind.mask.total:,} weights")
    for name, result in {"before": before, "after": privacy.result}.items():
        found = {**result.model_metrics, "loss attack AUC": result.estimates["loss"]["auroc"]}
        print(name, {key: round(each.value, 3) for key, each in found.items()})
    run.save_checkpoint(folder / "hardened.ckpt")
    for name in tried.exports:
        print("exported:", export(model, folder / name, audit=privacy.result).name)
    for name in ("hardened.ckpt", *(name for name in tried.exports if name.endswith(".ckpt"))):
        state = (tried.load or cls.load_from_checkpoint)(folder / name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), name
        print(f"{name} loads into {cls.__name__}")


def _nothing() -> None:
    """In the place of a hook."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("project", choices=PROJECTS)
    name = parser.parse_args().project
    seed_everything(0, verbose=False)
    tried = PROJECTS[name]()
    print(f"{tried.package} {importlib.metadata.version(tried.package)}, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        harden(tried, Path(folder))


if __name__ == "__main__":
    main()
