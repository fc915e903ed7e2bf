"""Data that cannot be audited: random augmentation, one-shot iterators."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
)

from lightning_cwrf import MIAAuditCallback, PrivacyScoringCallback
from lightning_cwrf.attacks import Evidence, create_attack, logit_signal, register_attack
from lightning_cwrf.attacks.base import ATTACKS
from lightning_cwrf.auditing import audit
from lightning_cwrf.auditing.run import run_attacks
from lightning_cwrf.data import reads_alike
from tests.helpers import Classifier, digits, part, same_snapshot, snapshot, trained, trainer

CHOSEN = list(range(1, 200, 4))


POOL = part(0, 200)


OTHERS = part(300, 400)


@pytest.fixture(scope="module")
def model():
    return Classifier(width=16)


class Augmented(Dataset):
    """Examples with noise on some of them, as random augmentation gives."""

    def __init__(self, data, rate=1.0):
        self.data = data
        self.rate = rate

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return (x.flip(-1) if torch.rand(()) < self.rate / 2 else x), y


class Stream(IterableDataset):
    """Goes on where it was left."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        while True:
            self.place += 1
            yield digits()[self.place % 1000]


@pytest.mark.parametrize("rate", [1.0, 0.05])
def test_augmented_members_raise(rate, model):
    with pytest.raises(ValueError, match=r"members read differently each time.*Pass members="):
        audit(model, members=Augmented(POOL, rate), nonmembers=OTHERS)
    with pytest.raises(ValueError, match=r"nonmembers read differently each time.*Pass nonmembers="):
        audit(model, members=POOL, nonmembers=DataLoader(Augmented(OTHERS, rate), batch_size=50))
    with pytest.raises(ValueError, match="population read differently"):
        audit(model, members=POOL, nonmembers=OTHERS, population=Augmented(part(500, 700), rate))
    train = DataLoader(Augmented(POOL, rate), batch_size=16, shuffle=True)
    model = Classifier()
    before = snapshot(model)
    with pytest.raises(ValueError, match="members read differently each time"):
        trainer(callbacks=[MIAAuditCallback(OTHERS)]).fit(model, train)
    same_snapshot({**before, "grads": {}}, {**snapshot(model), "modes": before["modes"]})
    trainer(max_epochs=1, callbacks=[MIAAuditCallback(OTHERS, members=POOL)]).fit(Classifier(), train)


def test_augmentation_of_the_last_examples_alone_is_found(model):
    mixed = ConcatDataset([part(0, 900), Augmented(part(900, 1200))])
    with pytest.raises(ValueError, match="members read differently"):
        audit(model, members=DataLoader(mixed, batch_size=32), nonmembers=part(1200, 1300))
    with pytest.raises(ValueError, match=r"members read differently each time .*or a stream that continues"):
        audit(model, members=DataLoader(Stream(), batch_size=8), nonmembers=OTHERS)


class Noisy(Dataset):
    """Its random numbers are its own: every worker begins each pass with the same."""

    def __init__(self):
        self.random = random.Random(0)

    def __len__(self):
        return 100

    def __getitem__(self, i):
        x, y = POOL[i]
        return x + self.random.gauss(0, 1), y


class Seeded(Noisy):
    def __getitem__(self, i):
        x, y = POOL[i]
        return x + float(np.random.randn()), y


def seed_alike(worker):
    np.random.seed(worker)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "init"), [(Noisy(), None), (Seeded(), seed_alike)])
def test_augmentation_in_workers_with_the_same_seed_is_found(data, init):
    noisy = DataLoader(data, batch_size=16, num_workers=2, worker_init_fn=init)
    assert not reads_alike(noisy)
    assert reads_alike(DataLoader(Subset(POOL, range(100)), batch_size=16, num_workers=2, shuffle=True))


def test_a_loader_with_its_own_iteration_warns(model):
    class Scaled(DataLoader):
        def __iter__(self):
            for x, y in super().__iter__():
                yield x / 255, y

    with pytest.warns(UserWarning, match=r"members: Scaled has an __iter__ of its own"):
        audit(model, members=Scaled(POOL, batch_size=16), nonmembers=OTHERS)


def test_augmentation_in_the_transfer_hook_is_found():
    class Hooked(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x + torch.rand_like(x) if self.trainer.training else x), y

    with pytest.raises(ValueError, match="batch transfer hooks change members at random"):
        trainer(callbacks=[MIAAuditCallback(OTHERS)]).fit(Hooked(), DataLoader(POOL, batch_size=16))


def test_scoring_warns_that_augmented_members_may_overlap():
    model, vanilla = trained()
    scoring = PrivacyScoringCallback(part(0, 20), vanilla, steps=1)
    train = DataLoader(Augmented(part(0, 64)), batch_size=16)
    with pytest.warns(UserWarning, match="the training data read differently each time.*whether .*nonmembers.* hold"):
        trainer(max_epochs=1, callbacks=[scoring]).fit(model, train)


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda e: e.signal(logit_signal).neg_(), "logits's logit_signal"),
        (lambda e: e.shadow_signals(logit_signal).sub_(1.0).sum(0), "shadow_logits's logit_signal"),
    ],
)
def test_an_attack_that_writes_into_a_shared_signal_raises(write, what):
    evidence = Evidence(
        torch.randn(8, 3), torch.arange(8) % 3, shadow_logits=torch.randn(4, 8, 3), membership=torch.rand(4, 8) > 0.5
    )
    with ATTACKS.temporary():
        register_attack("writes")(write)
        with pytest.raises(ValueError, match=f"the writes attack changed the evidence's {what} in place"):
            run_attacks([create_attack("writes"), create_attack("loss")], evidence, asked=True)
    before = evidence.shadow_logits.clone()
    with ATTACKS.temporary():
        register_attack("erases")(lambda e: e.shadow_logits.mul_(0).sum((0, 2)))
        with pytest.raises(ValueError, match="the erases attack changed the evidence's shadow_logits in place"):
            run_attacks([create_attack("erases"), create_attack("loss")], evidence, asked=True)
    assert not torch.equal(before, evidence.shadow_logits)
