"""Canaries: who is in the training set with which label, and bounds on ε of real trainings."""

import collections
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_cwrf import insert_canaries
from lightning_cwrf.attacks import create_attack
from lightning_cwrf.defenses import DPSGDMixin
from lightning_cwrf.metrics.functional import one_run_epsilon
from lightning_cwrf.outputs import collect_outputs
from tests.helpers import Classifier, part, same_snapshot, snapshot, trainer

Pair = collections.namedtuple("Pair", "x y")
FORMS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "named": Pair,
    "labels": lambda x, y: {"pixels": x, "labels": y},
    "y": lambda x, y: {"a": x, "b": x, "y": y},
    "numpy": lambda x, y: (x, np.int64(y)),
    "array": lambda x, y: (x, np.array(y)),
    "tensor": lambda x, y: {"x": x, "target": torch.tensor(y, dtype=torch.int16)},
}


class Items(Dataset):
    """Item i is the number i, read with noise of its own each time, and its label."""

    def __init__(self, labels, form="tuple"):
        self.labels, self.form = labels, form

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return FORMS[self.form](i + 0.4 * torch.rand(()), self.labels[i])


def described(item):
    """The number, the label, and the form, of an item."""
    values = list(item.values()) if isinstance(item, dict) else list(item)
    keys = tuple(item) if isinstance(item, dict) else ()
    return int(values[0]), int(values[-1]), (type(item), keys, type(values[-1]), getattr(values[-1], "dtype", None))


@given(st.data(), st.sampled_from(sorted(FORMS)), st.booleans(), st.booleans(), st.integers(0, 99))
def test_every_example_is_there_once_with_the_right_label(data, form, mislabel, given_classes, seed):
    classes = data.draw(st.integers(2, 5))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=2, max_size=30))
    labels[0] = classes - 1
    m = data.draw(st.integers(2, len(labels)))
    plain = Items(labels, form)
    rng = torch.get_rng_state()
    canaries = insert_canaries(plain, m, classes=classes if given_classes else None, mislabel=mislabel, seed=seed)
    assert torch.equal(rng, torch.get_rng_state())
    assert len(canaries) == len(canaries.examples) == len(canaries.included) == m
    shown = [described(item) for item in canaries.examples]
    assert [number for number, _, _ in shown] == canaries.places.tolist()
    assert len(set(canaries.places.tolist())) == m
    for number, label, like in shown:
        assert (label != labels[number]) == mislabel
        assert 0 <= label < classes
        assert like == described(plain[number])[2]
    carried = {number: label for number, label, _ in shown}
    included = {number for number, inside in zip(carried, canaries.included.tolist(), strict=True) if inside}
    train = [described(item) for item in canaries.train]
    assert [number for number, _, _ in train] == [i for i in range(len(labels)) if i not in carried or i in included]
    assert [label for _, label, _ in train] == [carried.get(number, labels[number]) for number, _, _ in train]
    again = insert_canaries(plain, m, classes=classes, mislabel=mislabel, seed=seed)
    assert torch.equal(again.places, canaries.places)
    assert torch.equal(again.included, canaries.included)
    assert [described(item) for item in again.examples] == shown


def test_a_loader_with_workers_reads_them():
    canaries = insert_canaries(Items([0, 1, 2] * 10, "labels"), 10)
    batches = list(DataLoader(canaries.train, batch_size=8, num_workers=1))
    assert sum(len(batch["labels"]) for batch in batches) == 20 + int(canaries.included.sum())
    assert torch.cat([b["labels"] for b in batches]).tolist() == [described(item)[1] for item in canaries.train]


def test_inclusion_is_fair_and_wrong_labels_are_uniform():
    labels = [i % 4 for i in range(4000)]
    canaries = insert_canaries(Items(labels), 4000, classes=4)
    assert stats.binomtest(int(canaries.included.sum()), 4000, 0.5).pvalue > 1e-4
    wrong = collections.Counter((labels[n], label) for n, label, _ in map(described, canaries.examples))
    for own in range(4):
        counts = [wrong[own, other] for other in range(4) if other != own]
        assert sum(counts) == 1000
        assert stats.chisquare(counts).pvalue > 1e-4
    inside = [
        label for (_, label, _), flag in zip(map(described, canaries.examples), canaries.included, strict=True) if flag
    ]
    assert stats.chisquare(np.bincount(inside)).pvalue > 1e-4  # the coin knows nothing of the label
    other = insert_canaries(Items(labels), 4000, classes=4, seed=1)
    assert 0.4 < float((other.included == canaries.included).double().mean()) < 0.6


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: insert_canaries(Items([0, 1, 1]), 4),
            ValueError,
            "from 2 to 3, not 4. There are 3",
        ),
        (lambda: insert_canaries(Items([0, 1, 1]), 1), ValueError, "not 1"),
        (lambda: insert_canaries(Items([0, 1]), 2, classes=1), ValueError, "an integer of at least 2, not 1"),
        (lambda: insert_canaries(Items([0, 0]), 2), ValueError, "every label is 0; pass classes="),
        (lambda: insert_canaries(Items([0, 3]), 2, classes=3), ValueError, "label 3 of example 1 is out of range"),
        (lambda: insert_canaries(Items([0, -1]), 2), ValueError, "example 1 is not a class index: .* value -1"),
        (
            lambda: insert_canaries(TensorDataset(torch.zeros(4, 2), torch.eye(4)), 2),
            ValueError,
            "not a class index.*one-hot",
        ),
        (lambda: insert_canaries(TensorDataset(torch.zeros(4, 2)), 2), TypeError, "a batch must be"),
        (lambda: insert_canaries(Stream(), 2), TypeError, "a length that is read by index, not Stream"),
        (lambda: insert_canaries(DataLoader(Items([0, 1])), 2), TypeError, "not DataLoader"),
    ],
)
def test_invalid_canaries_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Plain(Classifier):
    """A classifier that DP-SGD can train as it is."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def trained_on(canaries, model, epochs):
    torch.manual_seed(0)
    trainer(max_epochs=epochs).fit(model, DataLoader(canaries.train, batch_size=64, shuffle=True))
    return model


@pytest.mark.slow
def test_a_training_that_memorises_shows_its_epsilon():
    canaries = insert_canaries(part(0, 600), 200)
    model = trained_on(canaries, Plain(lr=3e-3), 150)
    before, rng = snapshot(model), torch.get_rng_state()
    bound = float(canaries.epsilon(model, guesses=100, delta=1e-5))
    same_snapshot(before, snapshot(model))
    assert torch.equal(rng, torch.get_rng_state())
    assert bound > 1
    outputs = collect_outputs(model, canaries.examples)
    own = create_attack("loss")
    scores = -torch.nn.functional.cross_entropy(outputs.logits.double(), outputs.targets, reduction="none")
    assert bound == pytest.approx(float(one_run_epsilon(scores, canaries.included, guesses=100, delta=1e-5)))
    assert float(canaries.epsilon(model, guesses=100, delta=1e-5, attack=own)) == bound
    assert float(canaries.epsilon(model, guesses=100, delta=1e-5, confidence=0.999)) < bound
    for name in ("lira", "attack_p"):
        with pytest.raises(ValueError, match=f"the {name} attack needs .*one_run_epsilon"):
            canaries.epsilon(model, attack=name)


@pytest.mark.slow
@pytest.mark.parametrize("target", [1.0, 4.0])
def test_the_bound_stays_below_what_dp_sgd_spends(target):
    canaries = insert_canaries(part(0, 600), 200)
    model = DPSGDMixin.attach(Plain(lr=3e-3), target_epsilon=target, from_scratch=True)
    trained_on(canaries, model, 10)
    spent = model.privacy_spent
    assert spent.epsilon <= target
    for guesses in (20, 100, 200):
        assert float(canaries.epsilon(model, guesses=guesses, delta=spent.delta)) <= spent.epsilon


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"m": 20.0}, "m must be an integer"),
        ({"m": "20"}, "m must be an integer"),
        ({"m": True}, "m must be an integer"),
        ({"m": 20, "classes": 3.0}, "classes must be an integer"),
        ({"m": 20, "mislabel": "no"}, "mislabel must be True or False"),
        ({"m": 20, "seed": None}, "seed must be an integer"),
    ],
)
def test_settings_of_another_type_raise(settings, message):
    with pytest.raises(TypeError, match=message):
        insert_canaries(TensorDataset(torch.randn(100, 4), torch.arange(100) % 3), **settings)


def test_exposure_of_included_canaries():
    """A model that knows them by heart puts each included one above all others; a fresh one tells nothing."""
    canaries = insert_canaries(part(0, 300), m=200, seed=1)

    class Knows(nn.Module):
        """Puts all weight on the label of the included canaries."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            items = [canaries.examples[i] for i in canaries.included.nonzero().flatten().tolist()]
            self.known = torch.stack([x.flatten() for x, _ in items])
            self.labels = torch.stack([torch.as_tensor(y) for _, y in items])

        def forward(self, x):
            near = torch.cdist(x.flatten(1), self.known).min(1)
            return 9.0 * nn.functional.one_hot(self.labels[near.indices], 10) * (near.values < 1e-6)[:, None]

    included = int(canaries.included.sum())
    most = math.log2(201 - included)
    assert canaries.exposure(Knows()).tolist() == pytest.approx(included * [most])
    found = canaries.exposure(Classifier())
    assert found.shape == (included,)
    assert 0.5 < float(found.mean()) < 2.5  # about 1.44


def test_exposure_needs_canaries_of_both_kinds():
    canaries = dataclasses.replace(insert_canaries(part(0, 20), m=4), included=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="included and some that are not"):
        canaries.exposure(Classifier())
    with pytest.raises(ValueError, match="needs"):
        insert_canaries(part(0, 20), m=4).exposure(Classifier(), attack="lira")
