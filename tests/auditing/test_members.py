"""The audited members are the training members, or the audit says why they cannot be known."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_cwrf import MIAAuditCallback, PrivacyScoringCallback
from lightning_cwrf.auditing import audit
from lightning_cwrf.callbacks.audit import weights_digest
from lightning_cwrf.data import reads_alike
from lightning_cwrf.weights.scores import learnability_scores, privacy_vulnerability_scores
from tests.helpers import Classifier, digits, loader, part, same_snapshot, snapshot, trained, trainer

CHOSEN = list(range(1, 200, 4))
REST = [i for i in range(200) if i not in CHOSEN]
POOL = part(0, 200)
OTHERS = part(300, 400)


@pytest.fixture(scope="module")
def memorised():
    """A model of 50 of the 200 examples."""
    torch.manual_seed(0)
    model = Classifier(width=16)
    trainer(max_epochs=40).fit(model, DataLoader(Subset(POOL, CHOSEN), batch_size=16, shuffle=True))
    return model


class Own(Sampler):
    def __iter__(self):
        return iter(CHOSEN)


SAMPLED = {
    "SubsetRandomSampler": {"sampler": SubsetRandomSampler(CHOSEN), "batch_size": 16},
    "WeightedRandomSampler": {
        "sampler": WeightedRandomSampler([float(i in CHOSEN) for i in range(200)], 400),
        "batch_size": 16,
    },
    "own sampler": {"sampler": Own(), "batch_size": 16},
    "own batches": {"batch_sampler": [CHOSEN[:20], CHOSEN[20:]]},
    "BatchSampler": {"batch_sampler": BatchSampler(SubsetRandomSampler(CHOSEN), 16, drop_last=False)},
    "batches as indices": {"sampler": [CHOSEN[:20], CHOSEN[20:]], "batch_size": None},
}


@pytest.mark.parametrize("name", SAMPLED)
def test_the_members_of_a_sampler_are_those_it_gives(name, memorised):
    """They were all 200, of which 150 had never been trained on."""
    data = digits() if name == "batches as indices" else POOL
    sampled = audit(memorised, members=DataLoader(data, **SAMPLED[name]), nonmembers=OTHERS)
    exact = audit(memorised, members=Subset(POOL, CHOSEN), nonmembers=OTHERS)
    assert len(sampled.losses) == 150
    assert sampled.values() == pytest.approx(exact.values(), abs=1e-5)
    assert (
        sampled.values()["loss/auroc"] > audit(memorised, members=POOL, nonmembers=OTHERS).values()["loss/auroc"] + 0.1
    )


def test_a_split_by_two_samplers_of_one_data_set(memorised):
    """It was refused: 200 of 200 non-members were members."""
    inside, outside = (DataLoader(POOL, 32, sampler=SubsetRandomSampler(places)) for places in (CHOSEN, REST))
    result = audit(memorised, members=inside, nonmembers=outside)
    assert int(result.is_member.sum()) == len(CHOSEN)
    assert len(result.is_member) == 200
    scores = privacy_vulnerability_scores(memorised, Classifier(width=16), inside, outside, steps=2)
    same = privacy_vulnerability_scores(
        memorised, Classifier(width=16).requires_grad_(True), Subset(POOL, CHOSEN), Subset(POOL, REST), steps=2
    )
    assert scores.keys() == same.keys()


def seen_by_training(settings, loading, epochs=2):
    """The examples that a Trainer hands to the module, and the members that its audit takes."""
    seen, audited = set(), set()

    class Spy(Classifier):
        def training_step(self, batch, batch_idx):
            seen.update(image.numpy().tobytes() for image in batch[0])
            return super().training_step(batch, batch_idx)

    def key(example):
        audited.add(example[0].numpy().tobytes())
        return example[0].numpy().tobytes()

    callback = MIAAuditCallback(OTHERS, every_n_epochs=0, key=key)
    trainer(max_epochs=epochs, callbacks=[callback], **settings).fit(Spy(), DataLoader(POOL, **loading))
    others = {image.numpy().tobytes() for image, _ in OTHERS}
    assert len(others) == 100
    assert len(callback.result.losses) == len(audited)
    return seen, audited - others


@pytest.mark.parametrize(
    ("settings", "loading"),
    [
        ({"limit_train_batches": 3}, {"batch_size": 16}),
        ({"limit_train_batches": 0.5}, {"batch_size": 16}),
        ({"limit_train_batches": 2}, {"batch_size": 16, "sampler": Own()}),
        ({"limit_train_batches": 1}, {"batch_sampler": [CHOSEN[:20], CHOSEN[20:]]}),
        ({"overfit_batches": 2}, {"batch_size": 16, "shuffle": True}),
        ({"overfit_batches": 2}, {"batch_size": 16}),
        ({}, {"batch_size": 16, "drop_last": True}),
        ({}, {"batch_size": 16, "sampler": SubsetRandomSampler(CHOSEN)}),
        ({}, {"batch_size": 16, "shuffle": True}),
    ],
)
def test_the_members_are_the_examples_that_training_saw(settings, loading):
    seen, audited = seen_by_training(settings, loading)
    assert seen == audited


def test_limited_batches_of_a_shuffled_loader():
    """Each epoch draws others: enough epochs draw all, few leave most out, and nobody knows which."""

    def fit(epochs, limit=6, **settings):
        callback = MIAAuditCallback(OTHERS, every_n_epochs=0, **settings)
        run = trainer(max_epochs=epochs, callbacks=[callback], limit_train_batches=limit)
        run.fit(Classifier(), DataLoader(POOL, batch_size=20, shuffle=True))
        return callback.result

    with pytest.raises(MisconfigurationException, match=r"leaves out about 16% of the examples.*members=\.\.\."):
        fit(2)
    with pytest.warns(UserWarning, match="leaves out about 6% of the examples"):
        assert len(fit(3).losses) == 300
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*leaves out.*")
        fit(6)
        assert len(fit(1, members=Subset(POOL, CHOSEN)).losses) == 150
        # A pass leaves out 36 % of the examples, ten passes next to none.
        run = trainer(max_epochs=10, callbacks=[MIAAuditCallback(OTHERS)])
        run.fit(Classifier(), DataLoader(POOL, batch_size=128, shuffle=True, drop_last=True))
    callback = MIAAuditCallback(OTHERS)
    with pytest.warns(UserWarning, match="leaves out about 90%"):
        trainer(callbacks=[callback], fast_dev_run=True).fit(
            Classifier(), DataLoader(POOL, batch_size=20, shuffle=True)
        )


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_training_of_less_than_an_epoch(shuffle):
    """4 of 10 batches are trained on; the other 120 examples are no members."""
    run = trainer(max_steps=4, max_epochs=-1, callbacks=[MIAAuditCallback(OTHERS)])
    with pytest.raises(MisconfigurationException, match="leaves out about 60% of the examples"):
        run.fit(Classifier(), DataLoader(POOL, batch_size=20, shuffle=shuffle))


class _Stop(Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= trainer.fit_loop.epoch_loop.total_batch_idx + 1 >= self.batches


@pytest.mark.parametrize(("settings", "batches", "share"), [({}, 4, 60), ({"limit_train_batches": 3}, 6, 49)])
def test_a_training_that_is_stopped_early(settings, batches, share):
    """Its 40 epochs were to draw every example."""
    callback = MIAAuditCallback(OTHERS, every_n_epochs=0)
    run = trainer(max_epochs=40, callbacks=[_Stop(batches), callback], **settings)
    with pytest.warns(UserWarning, match=f"ended before it had drawn about {share}% of the examples"):
        run.fit(Classifier(), DataLoader(POOL, batch_size=20, shuffle=True))
    assert any("ended before" in note for note in callback.result.notes())


def test_a_whole_epoch_leaves_out_nothing():
    callback = MIAAuditCallback(OTHERS, every_n_epochs=0)
    run = trainer(max_epochs=40, callbacks=[_Stop(10), callback], reload_dataloaders_every_n_epochs=1)
    with pytest.warns(UserWarning, match="recreated every 1 epochs"):
        run.fit(Classifier(), DataLoader(POOL, batch_size=20, shuffle=True))
    assert not any("ended before" in note for note in callback.result.notes())


def test_loaders_that_draw_few_of_their_examples(memorised):
    draws = DataLoader(POOL, batch_size=20, sampler=WeightedRandomSampler(torch.ones(200), 100))
    with pytest.warns(UserWarning, match="a pass leaves out 61% of the 200"):
        audit(memorised, members=draws, nonmembers=OTHERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audit(memorised, members=DataLoader(POOL, batch_size=16, shuffle=True), nonmembers=OTHERS)


def test_scoring_takes_the_members_that_are_trained_on():
    """A SubsetRandomSampler over 64 was scored as the whole data set."""
    model, vanilla = trained()
    seen = []
    for members in (DataLoader(POOL, 16, sampler=SubsetRandomSampler(range(64))), part(0, 64)):
        torch.manual_seed(3)
        scoring = PrivacyScoringCallback(OTHERS, vanilla, steps=2)
        given = [] if isinstance(members, Subset) else [members]
        again = copy.deepcopy(model)
        if given:
            trainer(max_epochs=1, callbacks=[scoring]).fit(again, members)
        else:
            trainer(max_epochs=1, callbacks=[scoring]).fit(again, DataLoader(members, 16, shuffle=True))
        seen.append(scoring.scores)
    # One batch of all 64 each step: only their order in the sum differs.
    for name, scores in seen[0].items():
        torch.testing.assert_close(scores, seen[1][name], rtol=1e-3, atol=1e-5)


def test_scoring_reads_batches_of_256_whatever_the_loaders():
    model, vanilla = trained()
    sizes = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def classification_step(self, batch):
            sizes.append(len(batch[1]))
            return self.model(batch[0]), batch[1]

    spy = Spy()
    weights = {f"model.{name}": value for name, value in vanilla.items()}
    small, reference = loader(0, 600, batch_size=32), loader(700, 1300, batch_size=16)
    privacy_vulnerability_scores(spy, weights, small, reference, steps=2)
    assert set(sizes) == {256}
    sizes.clear()
    learnability_scores(spy, small, steps=3, batch_size=100)
    assert sizes == [100] * 3
    sizes.clear()
    ready = [next(iter(small))]
    learnability_scores(spy, ready, steps=2)
    assert sizes == [32] * 2  # batches that are ready are taken as they are
    for wrong in (0, 2.0, True, "256"):
        with pytest.raises((TypeError, ValueError), match="batch_size must be an integer"):
            learnability_scores(spy, small, batch_size=wrong)
        with pytest.raises((TypeError, ValueError), match="batch_size must be an integer"):
            PrivacyScoringCallback(OTHERS, vanilla, batch_size=wrong)


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
def test_augmented_members_are_refused(rate, memorised):
    with pytest.raises(ValueError, match=r"members read differently each time.*Pass members="):
        audit(memorised, members=Augmented(POOL, rate), nonmembers=OTHERS)
    with pytest.raises(ValueError, match=r"nonmembers read differently each time.*Pass nonmembers="):
        audit(memorised, members=POOL, nonmembers=DataLoader(Augmented(OTHERS, rate), batch_size=50))
    with pytest.raises(ValueError, match="population read differently"):
        audit(memorised, members=POOL, nonmembers=OTHERS, population=Augmented(part(500, 700), rate))
    train = DataLoader(Augmented(POOL, rate), batch_size=16, shuffle=True)
    model = Classifier()
    before = snapshot(model)
    with pytest.raises(ValueError, match="members read differently each time"):
        trainer(callbacks=[MIAAuditCallback(OTHERS)]).fit(model, train)
    same_snapshot({**before, "grads": {}}, {**snapshot(model), "modes": before["modes"]})
    trainer(max_epochs=1, callbacks=[MIAAuditCallback(OTHERS, members=POOL)]).fit(Classifier(), train)


def test_augmentation_of_the_last_examples_alone_is_found(memorised):
    mixed = ConcatDataset([part(0, 900), Augmented(part(900, 1200))])
    with pytest.raises(ValueError, match="members read differently"):
        audit(memorised, members=DataLoader(mixed, batch_size=32), nonmembers=part(1200, 1300))
    with pytest.raises(ValueError, match=r"members read differently each time .*or a stream that continues"):
        audit(memorised, members=DataLoader(Stream(), batch_size=8), nonmembers=OTHERS)


class _Noisy(Dataset):
    """Its random numbers are its own: every worker begins each pass with the same."""

    def __init__(self):
        self.random = random.Random(0)

    def __len__(self):
        return 100

    def __getitem__(self, i):
        x, y = POOL[i]
        return x + self.random.gauss(0, 1), y


class _Seeded(_Noisy):
    def __getitem__(self, i):
        x, y = POOL[i]
        return x + float(np.random.randn()), y


def _seed(worker):
    np.random.seed(worker)


@pytest.mark.parametrize(("data", "init"), [(_Noisy(), None), (_Seeded(), _seed)])
def test_augmentation_of_workers_that_begin_alike_is_found(data, init):
    noisy = DataLoader(data, batch_size=16, num_workers=2, worker_init_fn=init)
    assert not reads_alike(noisy)
    assert reads_alike(DataLoader(Subset(POOL, range(100)), batch_size=16, num_workers=2, shuffle=True))


def test_a_loader_with_an_iteration_of_its_own_is_told(memorised):
    class Scaled(DataLoader):
        def __iter__(self):
            for x, y in super().__iter__():
                yield x / 255, y

    with pytest.warns(UserWarning, match=r"members: Scaled has an __iter__ of its own"):
        audit(memorised, members=Scaled(POOL, batch_size=16), nonmembers=OTHERS)


def test_augmentation_in_the_transfer_hook_is_found():
    class Hooked(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x + torch.rand_like(x) if self.trainer.training else x), y

    with pytest.raises(ValueError, match="batch transfer hooks change members at random"):
        trainer(callbacks=[MIAAuditCallback(OTHERS)]).fit(Hooked(), DataLoader(POOL, batch_size=16))


def test_scoring_says_that_augmented_members_hide_an_overlap():
    model, vanilla = trained()
    scoring = PrivacyScoringCallback(part(0, 20), vanilla, steps=1)
    train = DataLoader(Augmented(part(0, 64)), batch_size=16)
    with pytest.warns(UserWarning, match="the training data read differently each time.*whether nonmembers hold"):
        trainer(max_epochs=1, callbacks=[scoring]).fit(model, train)


class SeenEMA(EMAWeightAveraging):
    """Averages so slowly that the last weights are others."""

    def __init__(self):
        super().__init__(decay=0.9)


class NoNorm(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net[1] = nn.Identity()


@pytest.mark.parametrize("audit_first", [True, False])
@pytest.mark.parametrize(
    ("make", "model"),
    [
        (SeenEMA, Classifier),
        (lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1), Classifier),
        (lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1), NoNorm),
    ],
)
def test_the_audited_weights_are_those_that_are_left(make, model, audit_first, tmp_path):
    """With averaged weights the test accuracy was another model's."""
    callback = MIAAuditCallback(OTHERS, every_n_epochs=1)
    callbacks = [callback, make()] if audit_first else [make(), callback]
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, max_epochs=4, callbacks=callbacks, logger=logger)
    torch.manual_seed(1)
    final = model(lr=0.05)
    run.fit(final, DataLoader(POOL, batch_size=32, shuffle=True))
    exact = audit(final, members=POOL, nonmembers=OTHERS)
    assert callback.result.values() == pytest.approx(exact.values(), abs=1e-6)
    assert torch.equal(callback.result.losses, exact.losses)
    others = [entry["test_loss"] for entry in callback.history[:-1]]
    assert all(abs(loss - exact.values()["test_loss"]) > 1e-3 for loss in others)  # the averaging does something
    logger.save()
    last = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    place = last[0].split(",").index("mia/test_loss")
    values = [float(line.split(",")[place]) for line in last[1:] if line.split(",")[place]]
    assert values[-1] == pytest.approx(exact.values()["test_loss"], abs=1e-5)


def test_weights_that_change_after_the_last_audit_are_audited_again():
    """A user's own averaging, in the module's last hook."""

    class Moves(Classifier):
        def on_train_end(self):
            with torch.no_grad():
                self.net[5].weight.mul_(0.1)

    callback = MIAAuditCallback(OTHERS, every_n_epochs=0)
    model = Moves()
    trainer(max_epochs=2, callbacks=[callback]).fit(model, DataLoader(POOL, batch_size=32))
    assert callback.result.values() == pytest.approx(audit(model, members=POOL, nonmembers=OTHERS).values(), abs=1e-6)
    assert len(callback.history) == 1
    assert weights_digest(model) != weights_digest(Moves())


def test_two_audits_in_one_trainer():
    first = MIAAuditCallback(OTHERS, every_n_epochs=0)
    second = MIAAuditCallback(part(500, 600), every_n_epochs=0, name="mia_other")
    run = trainer(max_epochs=1, callbacks=[first, second])
    run.fit(Classifier(), DataLoader(POOL, batch_size=32))
    logged = {name for name in run.callback_metrics if name.endswith("/test_loss")}
    assert logged == {"mia/test_loss", "mia_other/test_loss"}
    assert first.result.values() != second.result.values()
    twins = trainer(callbacks=[MIAAuditCallback(OTHERS), MIAAuditCallback(OTHERS)])
    with pytest.raises(MisconfigurationException, match=r"there are 2 MIAAuditCallbacks .* or give each another name="):
        twins.fit(Classifier(), DataLoader(POOL, batch_size=32))


class Sparse(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.EmbeddingBag(17, 8, sparse=True), nn.Linear(8, 10))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_sparse_embeddings_are_audited():
    words = TensorDataset((digits().tensors[0].flatten(1) * 16).long(), digits().tensors[1])
    callback = MIAAuditCallback(Subset(words, range(300, 400)), every_n_epochs=1)
    trainer(max_epochs=1, callbacks=[callback]).fit(Sparse(), DataLoader(Subset(words, range(100)), batch_size=20))
    assert callback.result is not None


def test_several_training_loaders_are_told():
    class Both(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    loaders = {"a": loader(0, 64), "b": loader(0, 64)}
    with pytest.raises(MisconfigurationException, match=r"not a dict; .*MIAAuditCallback\(members=\.\.\.\)"):
        trainer(callbacks=[MIAAuditCallback(OTHERS)]).fit(Both(), loaders)
    trainer(max_epochs=1, callbacks=[MIAAuditCallback(OTHERS, members=part(0, 64))]).fit(Both(), loaders)
