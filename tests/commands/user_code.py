"""What a user has: a file with a LightningModule and a LightningDataModule, and the files of a first training."""

import torch

from lightning_cwrf import VanillaSnapshotCallback
from tests.helpers import loader, trainer

MINE = """
from pathlib import Path

import torch
from lightning import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, SubsetRandomSampler, random_split


def examples(begin, end):
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return Subset(TensorDataset(images, torch.tensor(data.target)), list(range(begin, end)))


class Net(LightningModule):
    def __init__(self, width: int = 16, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.hparams.lr)


class Normed(Net):
    def __init__(self, width: int = 16, lr: float = 1e-2):
        super().__init__(width, lr)
        self.net.insert(2, nn.BatchNorm1d(width))


class Needs(Net):
    def __init__(self, width: int):
        super().__init__(width)


class Breaks(Net):
    def __init__(self):
        raise RuntimeError("no such disk")


class Data(LightningDataModule):
    def __init__(self, members: int = 200, batch_size: int = 32):
        super().__init__()
        self.members, self.batch_size = members, batch_size

    def train_dataloader(self):
        return DataLoader(examples(0, self.members), self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(examples(600, 800), self.batch_size)

    def test_dataloader(self):
        return DataLoader(examples(800, 1000), self.batch_size)


class NoVal(Data):
    val_dataloader = LightningDataModule.val_dataloader


class Overlapping(Data):
    def test_dataloader(self):
        return DataLoader(examples(150, 350), self.batch_size)


class Augmented(Data):
    def train_dataloader(self):
        return DataLoader(Noisy(examples(0, self.members)), self.batch_size, shuffle=True)


class Hooked(Data):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


class FailingNet(Net):
    def on_train_epoch_end(self):
        if Path("fail").exists():
            raise RuntimeError("no such disk")


class HookedNet(Net):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].flip(-1), batch[1]


class RandomSplit(Data):
    def __init__(self, seed: int | None = None):
        super().__init__()
        self.seed = seed

    def setup(self, stage):
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        self.parts = random_split(examples(0, 600), [200, 200, 200], generator=generator)

    def train_dataloader(self):
        return DataLoader(self.parts[0], self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts[1], self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.parts[2], self.batch_size)


class NoisySplit(RandomSplit):
    def train_dataloader(self):
        return DataLoader(Noisy(self.parts[0]), self.batch_size, shuffle=True)


class Noisy(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return x + 0.01 * torch.randn_like(x), y


def members(count: int = 200):
    return examples(0, count)


def unlabelled():
    images = torch.stack([image for image, _ in examples(1000, 1200)])
    return TensorDataset(images, torch.zeros(200, dtype=torch.long))


def population():
    return examples(1000, 1500)


class Raw(Dataset):
    def __init__(self):
        self.data = examples(900, 1500)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return {"x": 16 * x, "label": int(y), "about": None}


def scaled(batch):
    return torch.stack([each["x"] / 16 for each in batch]), torch.tensor([each["label"] for each in batch])


def raw_population():
    return DataLoader(Raw(), 100, collate_fn=scaled, sampler=SubsetRandomSampler(range(100, 600)))


def fresh():
    return Net()


number = 3
"""


def first_training(folder, module, epochs=12):
    """Train ``mine.Net`` and leave ``finished.ckpt`` and ``init.safetensors`` in the folder."""
    torch.manual_seed(0)
    model = module.Net()
    run = trainer(max_epochs=epochs, callbacks=[VanillaSnapshotCallback(folder / "init.safetensors")])
    run.fit(model, module.Data().train_dataloader())
    run.save_checkpoint(folder / "finished.ckpt")
    torch.save(model.state_dict(), folder / "weights.pt")
    return model


__all__ = ["MINE", "first_training", "loader"]
