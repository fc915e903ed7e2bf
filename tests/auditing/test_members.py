"""The audited members are the training members, or the audit says why they are unknown."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_cwrf import MIAAuditCallback, PrivacyScoringCallback
from lightning_cwrf.auditing import audit
from lightning_cwrf.weights.scores import learnability_scores, privacy_vulnerability_scores
from tests.helpers import Classifier, digits, loader, part, trained, trainer

pytestmark = pytest.mark.slow

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
def test_the_members_of_a_sampler_are_those_it_can_draw(name, memorised):
    """Not all 200, of which 150 were never trained on."""
    data = digits() if name == "batches as indices" else POOL
    sampled = audit(memorised, members=DataLoader(data, **SAMPLED[name]), nonmembers=OTHERS)
    exact = audit(memorised, members=Subset(POOL, CHOSEN), nonmembers=OTHERS)
    assert len(sampled.losses) == 150
    assert sampled.values() == pytest.approx(exact.values(), abs=1e-5)
    assert (
        sampled.values()["loss/auroc"] > audit(memorised, members=POOL, nonmembers=OTHERS).values()["loss/auroc"] + 0.1
    )


def test_a_split_by_two_samplers_of_one_data_set(memorised):
    """Read as whole data sets, 200 of 200 non-members would be members."""
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
    """The examples that a Trainer passes to the module, and the members that its audit takes."""
    seen, audited = set(), set()

    class Spy(Classifier):
        def training_step(self, batch, batch_idx):
            seen.update(map(content, batch[0]))
            return super().training_step(batch, batch_idx)

    def key(example):
        audited.add(content(example[0]))
        return content(example[0])

    callback = MIAAuditCallback(OTHERS, every_n_epochs=0, key=key)
    trainer(max_epochs=epochs, callbacks=[callback], **settings).fit(Spy(), DataLoader(POOL, **loading))
    audited -= {content(x) for x, _ in OTHERS}
    assert len(callback.result.losses) == len(audited) + len(OTHERS)
    return seen, audited


def content(image):
    return image.numpy().tobytes()


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


class Stop(Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= trainer.fit_loop.epoch_loop.total_batch_idx + 1 >= self.batches


@pytest.mark.parametrize(("settings", "batches", "share"), [({}, 4, 60), ({"limit_train_batches": 3}, 6, 49)])
def test_a_training_that_is_stopped_early(settings, batches, share):
    """Its 40 epochs were to draw every example."""
    callback = MIAAuditCallback(OTHERS, every_n_epochs=0)
    run = trainer(max_epochs=40, callbacks=[Stop(batches), callback], **settings)
    with pytest.warns(UserWarning, match=f"ended before it had drawn about {share}% of the examples"):
        run.fit(Classifier(), DataLoader(POOL, batch_size=20, shuffle=True))
    assert any("ended before" in note for note in callback.result.notes())


def test_a_whole_epoch_leaves_out_nothing():
    callback = MIAAuditCallback(OTHERS, every_n_epochs=0)
    run = trainer(max_epochs=40, callbacks=[Stop(10), callback], reload_dataloaders_every_n_epochs=1)
    with pytest.warns(UserWarning, match="recreated every 1 epochs"):
        run.fit(Classifier(), DataLoader(POOL, batch_size=20, shuffle=True))
    assert not any("ended before" in note for note in callback.result.notes())


def test_loaders_that_draw_few_of_their_examples_warn(memorised):
    draws = DataLoader(POOL, batch_size=20, sampler=WeightedRandomSampler(torch.ones(200), 100))
    with pytest.warns(UserWarning, match="a pass leaves out 61% of its 200"):
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
