"""Callbacks whose data are a split of a DataModule."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, random_split

from lightning_cwrf import MIAAuditCallback
from tests.callbacks.helpers import Splits, hardening
from tests.helpers import Classifier, loader, part, trainer


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
