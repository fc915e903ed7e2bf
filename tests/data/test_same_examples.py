"""Whether two data sets hold the same examples."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_cwrf.data.overlap import same_examples

X, Y = torch.arange(40.0).view(40, 1), torch.arange(40) % 2
DATA = TensorDataset(X, Y)


class Noisy(Dataset):
    """With noise from the global random state, or from a generator of its own."""

    def __init__(self, data, generator=None):
        self.data, self.generator = data, generator

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return x + torch.rand((), generator=self.generator), y


class Counted(Dataset):
    reads = 0

    def __len__(self):
        return 40

    def __getitem__(self, i):
        self.reads += 1
        return DATA[i]


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("a stream must not be read")


PAIRS = {
    "another order": (TensorDataset(X.flip(0), Y.flip(0)), True),
    "a shuffled loader": (DataLoader(DATA, batch_size=7, shuffle=True), True),
    "a list of batches": ([(X[:30], Y[:30]), (X[30:], Y[30:])], True),
    "one less": (Subset(DATA, range(39)), False),
    "one twice": (Subset(DATA, [*range(39), 38]), False),
    "another label": (TensorDataset(X, 1 - Y), False),
    "plain and augmented": (Noisy(TensorDataset(X + 5, Y)), True),  # cannot be known: labels alone
    "plain and augmented, other labels": (Noisy(TensorDataset(X, torch.zeros(40).long())), False),
}


@pytest.mark.parametrize("how", PAIRS)
def test_by_content(how):
    other, same = PAIRS[how]
    assert same_examples(DATA, other) is same
    assert same_examples(other, DATA) is same


def test_parts_of_the_same_objects_are_compared_by_index():
    first, second = Noisy(TensorDataset(X, Y)), Noisy(TensorDataset(X, Y))  # of equal content
    both, turned = ConcatDataset([first, second]), ConcatDataset([second, first])
    assert same_examples(both, turned)
    assert same_examples(both, Subset(turned, range(-1, -81, -1)))
    assert not same_examples(Subset(both, [0, 50]), Subset(turned, [0, 50]))
    assert same_examples(Subset(both, [0, 50]), DataLoader(turned, sampler=[10, 40]))
    assert same_examples(
        Subset(Subset(both, np.array([0, 50])), [0, 1]), DataLoader(turned, sampler=np.array([10, 40]))
    )
    keyed = Noisy({"a": (X[0], Y[0]), "b": (X[1], Y[1])})
    assert same_examples(Subset(keyed, ["a", "b"]), Subset(keyed, ["b", "a"]))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_augmented_data_are_read_from_one_random_state(workers):
    def noisy(*places, size=4):
        return DataLoader(Noisy(TensorDataset(X[list(places)], Y[list(places)])), size, num_workers=workers)

    assert same_examples(noisy(0, 1, 2, 3), noisy(3, 2, 1, 0, size=3))
    assert not same_examples(noisy(0, 1, 2, 3), noisy(0, 1, 2, 5))  # of the same labels
    batches = DataLoader(noisy(0, 1, 2, 5).dataset, batch_sampler=[[0, 1], [2, 3]])
    assert not same_examples(noisy(0, 1, 2, 3), batches)
    assert same_examples(noisy(0, 1, 2, 5), batches)


@pytest.mark.slow
def test_an_augmentation_with_its_own_generator_leaves_the_labels():
    def noisy(x):
        return Noisy(TensorDataset(x, Y[: len(x)]), torch.Generator().manual_seed(0))

    assert same_examples(noisy(X), noisy(X.flip(0) + 3))
    assert not same_examples(noisy(X), noisy(X[:39]))


def test_parts_of_one_object_are_not_read():
    data = Counted()
    assert same_examples(Subset(data, [1, 2]), Subset(Subset(data, [0, 2, 1]), torch.tensor([1, 2])))
    assert not same_examples(Subset(data, [1, 2]), DataLoader(Subset(data, [1, 3]), batch_size=2))
    assert data.reads == 0


def test_streams_are_not_read_and_nothing_is_left_changed():
    once = iter([(X, Y)])
    assert same_examples(once, once)
    assert len(list(once)) == 1
    assert same_examples(DataLoader(Stream()), Stream())
    before = torch.get_rng_state()
    same_examples(Noisy(DATA), Noisy(DATA))
    assert torch.equal(torch.get_rng_state(), before)
