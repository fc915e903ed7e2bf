"""Callbacks whose data are a split of a DataModule."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

from lightning_cwrf import MIAAuditCallback
from lightning_cwrf.trainers import datamodule_loader
from tests.callbacks.helpers import Splits, hardening
from tests.helpers import Classifier, loader, part, trainer


@pytest.mark.slow
def test_splits_of_a_datamodule_are_read_for_their_stage(first_files):
    data = Splits()
    callbacks = hardening(first_files, members="train")
    trainer(callbacks=callbacks, max_epochs=1).fit(Classifier(), datamodule=data)
    assert data.stages == ["fit"]  # the test split is that of a copy
    assert len(callbacks[1].nonmembers.dataset) == 40
    assert len(callbacks[-1].nonmembers.dataset) == 64
    given = MIAAuditCallback(nonmembers=Splits())  # its test split
    trainer(callbacks=[given], max_epochs=1).fit(Classifier(), loader(0, 64))
    assert given.result is not None


class SplitsAtRandom(Splits):
    """Splits all data in each ``setup``, and scales them by the stage."""

    generator = None

    def setup(self, stage):
        parts = random_split(part(0, 300), [100, 100, 100], generator=self.generator and self.generator())
        self.train, self.val, self.test = parts
        self.scale = 1.0 if stage == "fit" else 0.5

    def train_dataloader(self):
        self.made = (list(self.train.indices), self.scale)
        return DataLoader(self.train, batch_size=50)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=50)


@pytest.mark.slow
def test_reading_a_split_does_not_change_what_the_fit_trains_on():
    class Seeded(SplitsAtRandom):
        def generator(self):
            return torch.Generator().manual_seed(1)

    made = []
    for audits in ([], [MIAAuditCallback(nonmembers="test")]):
        torch.manual_seed(3)
        data = Seeded()
        trainer(callbacks=audits, max_epochs=1).fit(Classifier(), datamodule=data)
        made.append((*data.made, torch.rand(1).item()))
    assert made[0] == made[1]
    assert made[0][1] == 1.0


def test_a_split_that_depends_on_the_random_state_is_an_error():
    with pytest.raises(MisconfigurationException, match="SplitsAtRandom splits its data at random"):
        trainer(callbacks=[MIAAuditCallback(nonmembers="test")]).fit(Classifier(), datamodule=SplitsAtRandom())


def test_a_datamodule_beside_that_of_the_fit_is_prepared_and_one_loader_may_be_in_a_list():
    class Prepared(Splits):
        def prepare_data(self):
            self.ready = True

        def test_dataloader(self):
            assert self.ready
            return [super().test_dataloader()]

    audit = MIAAuditCallback(nonmembers=Prepared())
    trainer(callbacks=[audit], max_epochs=1).fit(Classifier(), loader(0, 64))
    assert len(audit.result.is_member) == 128


def test_splits_that_are_not_there_are_an_error():
    class Two(Splits):
        def test_dataloader(self):
            return [loader(200, 264), loader(264, 300)]

    for data, problem in ((Two(), "several loaders"), (None, "has no test_dataloader")):
        run = trainer(callbacks=[MIAAuditCallback(nonmembers="test")])
        given = {"datamodule": data} if data else {"train_dataloaders": loader(0, 64)}
        with pytest.raises(MisconfigurationException, match=problem):
            run.fit(Classifier(), **given)
    with pytest.raises(ValueError, match="nonmembers must be 'train' or 'val'"):
        MIAAuditCallback(nonmembers="tset")
    with pytest.raises(TypeError, match="members: expected a DataLoader"):
        MIAAuditCallback(nonmembers="test", members=3)


class Wrapped(Dataset):
    """A data set of one's own over another, with noise from the global random state."""

    def __init__(self, data, noise=0.0):
        self.data, self.noise = data, noise

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return x + self.noise * torch.randn(()), y


HIDDEN = {
    "a Subset of a Subset": lambda split: Subset(split, range(100)),
    "another class": Wrapped,
    "in a list": Wrapped,
    "augmented": lambda split: Wrapped(split, noise=0.1),
    "copied": lambda split: TensorDataset(*map(torch.stack, zip(*split, strict=True))),
    "joined": lambda split: ConcatDataset([split, TensorDataset(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))]),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("seeded", [False, True])
def test_a_random_split_is_found_in_every_kind_of_data_set(how, seeded):
    whole = TensorDataset(torch.arange(200.0).view(200, 1), torch.arange(200) % 2)  # labels alone cannot tell

    class Hiding(LightningDataModule):
        def setup(self, stage):
            torch.rand(1)  # so that it is set up twice
            generator = torch.Generator().manual_seed(3) if seeded else None
            order = torch.randperm(100, generator=generator)[:50].tolist()
            pairs = Subset(whole, [place for i in order for place in (2 * i, 2 * i + 1)])  # one of each class
            self.part = HIDDEN[how](pairs)

        def test_dataloader(self):
            found = DataLoader(self.part, batch_size=16)
            return [found] if how == "in a list" else found

    if seeded:
        assert isinstance(datamodule_loader(Hiding(), "test"), DataLoader)
        return
    with pytest.raises(MisconfigurationException, match="Hiding splits its data at random"):
        datamodule_loader(Hiding(), "test")


def test_several_loaders_of_a_random_setup_are_refused_by_name():
    class Two(Splits):
        def setup(self, stage):
            torch.rand(1)

        def test_dataloader(self):
            return [loader(0, 8), loader(8, 16)]

    with pytest.raises(MisconfigurationException, match=r"Two\.test_dataloader cannot be used as one split"):
        datamodule_loader(Two(), "test")
