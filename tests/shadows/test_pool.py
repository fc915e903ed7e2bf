"""Pools and populations that cannot be used raise before any training."""

import functools

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, TensorDataset

from lightning_cwrf.shadows import balanced_membership, train_shadows
from tests import recipe_functions
from tests.helpers import digits, part
from tests.recipe_functions import quick

train = functools.partial(train_shadows, workers=1, progress=False)


def no_training(members, seed):
    pytest.fail("it trained")


class Labels(Dataset):
    """Inputs that read alike, and labels that are drawn at random in the second batch."""

    def __len__(self):
        return 300

    def __getitem__(self, i):
        return torch.full((1, 8, 8), float(i)), i % 10 if i < 256 else int(torch.randint(10, ()))


class Fickle(Dataset):
    """Reads the same for a while."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 8

    def __getitem__(self, i):
        self.reads += 1
        return torch.full((1, 8, 8), float(i + (self.reads > 20))), 0


class Stream(IterableDataset):
    def __iter__(self):
        return iter(part(0, 20))


def triples():
    return TensorDataset(*digits()[:20], torch.ones(20))


PAIRS = [digits()[i] for i in range(20)]


class Jittered(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.rand(1, 8, 8), 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pool": Labels()}, ValueError, "the pool reads differently each time, in its labels|differently each time"),
        ({"pool": Stream()}, TypeError, "the pool must be a torch data set .* not a Stream"),
        ({"pool": PAIRS}, TypeError, "the pool must be a torch data set .* not a list"),
        ({"pool": iter(PAIRS)}, TypeError, "the pool must be a torch data set"),
        ({"pool": triples()}, TypeError, "the pool must give pairs"),
        ({"pool": TensorDataset(torch.rand(20, 4), torch.rand(20))}, ValueError, "labels of the pool must be"),
        ({"pool": TensorDataset(torch.rand(20, 4), torch.arange(20) - 1)}, ValueError, "some of them negative"),
        ({"pool": part(0, 0)}, ValueError, "the pool is empty"),
        ({"population": Stream()}, TypeError, "the population must be a torch data set"),
        ({"pool": Jittered()}, ValueError, "reads differently each time"),
        ({"population": part(18, 30)}, ValueError, "2 of the 12 examples of the population are in the pool"),
    ],
)  # fmt: skip
def test_invalid_pools_raise_before_any_training(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        train(**{"recipe": no_training, "pool": part(0, 20), "n": 2, "store": tmp_path / "store", **arguments})
    assert not (tmp_path / "store").exists()


def test_a_pool_that_changes_later_raises(tmp_path):
    with pytest.raises(RuntimeError, match="the pool gave other examples after this training than before"):
        train(quick, Fickle(), 2, store=tmp_path)


untrained = functools.partial(recipe_functions.setting, "untrained")


def test_copies_of_an_example_are_in_or_out_together(tmp_path):
    pool = ConcatDataset([part(0, 20), part(5, 10), part(5, 6)])
    with pytest.warns(UserWarning, match="6 of the 26 examples of the pool are copies of others"):
        signals = train(untrained, pool, 4, store=tmp_path)
    assert torch.equal(signals.membership[:, 5:10], signals.membership[:, 20:25])
    assert torch.equal(signals.membership[:, 5], signals.membership[:, 25])
    assert (signals.membership.sum(0) == 2).all()
    assert torch.equal(signals.membership[:, :20], balanced_membership(4, 20, 0))


def test_all_examples_of_a_group_are_in_or_out_together(tmp_path):
    """Of 12 persons, the last two share a copy. Names do not matter, and more models add to the first."""
    pool = ConcatDataset([part(0, 22), part(20, 22)])
    persons = [f"person {i // 2}" for i in range(22)] + ["someone else"] * 2
    with pytest.warns(UserWarning, match="copies"):
        shadows = train(untrained, pool, 4, groups=persons, store=tmp_path)
    membership = shadows.membership
    assert torch.equal(membership[:, :24:2], membership[:, 1:24:2])
    assert torch.equal(membership[:, 20], membership[:, 22])
    assert torch.equal(membership[:, :22:2], balanced_membership(4, 11, 0))
    with pytest.warns(UserWarning, match="copies"):
        again = train(untrained, pool, 6, groups=np.repeat(np.arange(12), 2), store=tmp_path)
    assert again.store.key == shadows.store.key
    assert torch.equal(again.membership[:4], membership)
    with pytest.warns(UserWarning, match="copies"):
        alone = train(untrained, pool, 4, store=tmp_path)
    assert alone.store.key != shadows.store.key
    with pytest.warns(UserWarning, match="copies"), pytest.raises(ValueError, match="or other groups"):
        train(on_base, pool, 4, base=shadows, store=tmp_path)


def test_groups_of_very_different_sizes_warn(tmp_path):
    with pytest.warns(UserWarning, match="trained on [0-9]+% of the pool, and others on [0-9]+%"):
        train(untrained, part(0, 20), 2, groups=[0] * 16 + [1, 2, 3, 4], store=tmp_path)


def on_base(members, seed, base):
    raise AssertionError("nothing must be trained")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0] * 3, "groups must have a value for each of the 4 examples of the pool, in its order; it has 3"),
        ([0, 1, None, 1], "groups has no value for 1 examples"),
        (["a"] * 4, "groups must leave two halves"),
        ("abcd", "it has no list but str"),
    ],
)
def test_groups_that_do_not_fit_raise(groups, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(untrained, part(0, 4), 2, groups=groups, store=tmp_path)
