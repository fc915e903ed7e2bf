"""Which examples a loader can give: against counting what the loader itself gives over many passes."""

import itertools

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_cwrf.data import as_loader, first_batches
from lightning_cwrf.data.loading import some_batches
from lightning_cwrf.data.sampling import support

N = 40
DATA = TensorDataset(torch.arange(N).float().view(N, 1), torch.arange(N) % 3)
EVERY_FOURTH = list(range(0, N, 4))


class Backwards(Sampler):
    """A user's own: every third place, from the end."""

    def __iter__(self):
        return iter(range(N - 1, -1, -3))

    def __len__(self):
        return len(range(0, N, 3))


class Shuffled(Sampler):
    """A user's own over some places, in an order that it draws from a generator of its own."""

    def __init__(self, places):
        self.places = places
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self):
        return (self.places[i] for i in torch.randperm(len(self.places), generator=self.generator).tolist())


class Buckets(Sampler):
    """A user's own batch sampler: batches of neighbours in random order, one of them left out of each pass."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter([list(range(4 * i, 4 * i + 4)) for i in order[:-1]])

    def __len__(self):
        return 4


class Endless(Sampler):
    def __iter__(self):
        return itertools.cycle(range(N))


class Fresh(Sampler):
    """Gives places that no pass gave before."""

    def __init__(self):
        self.begin = 0

    def __iter__(self):
        self.begin += 1
        return iter([self.begin])


class Locked(Sampler):
    def __init__(self):
        self.places = (i for i in range(3))  # a generator cannot be copied

    def __iter__(self):
        return self.places


WEIGHTS = torch.tensor([0.0 if i % 5 else 1.0 + i for i in range(N)])
LOADERS = {
    "whole": ({"batch_size": 7}, range(N)),
    "shuffled": ({"batch_size": 7, "shuffle": True}, range(N)),
    "shuffled, last dropped": ({"batch_size": 7, "shuffle": True, "drop_last": True}, range(N)),
    "in order, last dropped": ({"batch_size": 7, "drop_last": True}, range(35)),
    "subset sampler": ({"batch_size": 7, "sampler": SubsetRandomSampler(EVERY_FOURTH)}, EVERY_FOURTH),
    "subset sampler of a tensor": ({"sampler": SubsetRandomSampler(torch.tensor(EVERY_FOURTH))}, EVERY_FOURTH),
    "sequence of fewer": ({"batch_size": 7, "sampler": SequentialSampler(range(9))}, range(9)),
    "random of fewer": ({"batch_size": 7, "sampler": RandomSampler(range(9))}, range(9)),
    "random, some of all": ({"batch_size": 7, "sampler": RandomSampler(DATA, num_samples=6)}, range(N)),
    "with replacement": ({"batch_size": 7, "sampler": RandomSampler(DATA, replacement=True)}, range(N)),
    "weighted": ({"sampler": WeightedRandomSampler(WEIGHTS, 30)}, range(0, N, 5)),
    "a list": ({"batch_size": 2, "sampler": [3, 1, 3, 8]}, [1, 3, 8]),
    "own, fixed": ({"batch_size": 4, "sampler": Backwards()}, range(0, N, 3)),
    "own, fixed, last dropped": (
        {"batch_size": 4, "sampler": Backwards(), "drop_last": True},
        list(range(N - 1, -1, -3))[:12],
    ),
    "own, random": ({"batch_size": 4, "sampler": Shuffled(EVERY_FOURTH)}, EVERY_FOURTH),
    "own batches": ({"batch_sampler": Buckets()}, range(20)),
    "plain batches": ({"batch_sampler": BatchSampler(SubsetRandomSampler(EVERY_FOURTH), 4, False)}, EVERY_FOURTH),
    "plain batches, last dropped": ({"batch_sampler": BatchSampler(Backwards(), 5, True)}, list(range(39, 9, -3))),
    "list of batches": ({"batch_sampler": [[1, 2], [9]]}, [1, 2, 9]),
    "batches as indices": (
        {"batch_size": None, "sampler": BatchSampler(RandomSampler(range(12)), 5, drop_last=False)},
        range(12),
    ),
}


def given(batches):
    return torch.cat([batch[0] for batch in batches]).flatten().int().tolist()


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.usefixtures("rng_untouched")
def test_a_loader_gives_what_its_sampler_can_give(name, monkeypatch):
    settings, expected = LOADERS[name]
    loader = DataLoader(DATA, **settings)
    own = getattr(loader.sampler, "generator", None)
    before = own.get_state() if own is not None else None
    monkeypatch.setattr(DataLoader, "_get_iterator", None)  # nothing iterates a loader to find out
    found = support(loader)
    monkeypatch.undo()
    assert sorted(found.places) == sorted(expected)
    assert own is None or torch.equal(own.get_state(), before)
    rows = given(as_loader(loader, shuffle=False, generator=torch.Generator()))
    assert sorted(rows) == sorted(expected)  # each once
    shuffled = given(as_loader(loader, shuffle=True, generator=torch.Generator().manual_seed(1)))
    assert sorted(shuffled) == sorted(expected)
    assert shuffled != rows or len(rows) < 4


@pytest.mark.parametrize("name", LOADERS)
def test_the_support_is_what_many_passes_give(name):
    loader = DataLoader(DATA, **LOADERS[name][0])
    seen = set()
    for epoch in range(60):
        if hasattr(loader.batch_sampler, "set_epoch"):
            loader.batch_sampler.set_epoch(epoch)
        seen.update(given(loader))
    assert seen == set(support(loader).places)


def test_a_fixed_order_is_kept_and_a_whole_data_set_is_read_in_its_own():
    assert given(as_loader(DataLoader(DATA, sampler=Backwards()), shuffle=False)) == list(range(N - 1, -1, -3))
    assert given(as_loader(DataLoader(DATA, shuffle=True), shuffle=False)) == list(range(N))


def test_batches_of_the_users_sampler_stay_together():
    batches = [
        batch[0].flatten().int().tolist()
        for batch in as_loader(DataLoader(DATA, batch_sampler=Buckets()), shuffle=True)
    ]
    assert sorted(batches) == [list(range(4 * i, 4 * i + 4)) for i in range(5)]


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Endless(), "Endless gives cannot be determined: it does not end"),
        (Fresh(), "each of 16 passes"),
        (Locked(), "copied"),
    ],
)
def test_samplers_whose_examples_are_unknown_are_refused(sampler, message):
    with pytest.raises(ValueError, match=rf"{message}.*members=\.\.\."):
        as_loader(DataLoader(DATA, sampler=sampler), shuffle=False)


def test_the_data_set_is_not_copied():
    class Data(TensorDataset):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    class Own(Shuffled):
        def __init__(self, data):
            super().__init__([1, 2])
            self.data_source = data

    data = Subset(Data(torch.zeros(9, 1)), range(9))
    assert sorted(support(DataLoader(data, sampler=Own(data))).places) == [1, 2]
    assert sorted(support(DataLoader(data, sampler=Own(data.dataset))).places) == [1, 2]


class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.tensor([float(i)]), 0) for i in range(10))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (DataLoader(DATA, batch_size=4), range(8)),
        (DataLoader(DATA, batch_size=4, shuffle=True), range(N)),
        (DataLoader(DATA, batch_size=4, sampler=Backwards()), list(range(N - 1, -1, -3))[:8]),
        (DataLoader(DATA, batch_sampler=[[5, 6], [7], [8]]), [5, 6, 7]),
        (DataLoader(DATA, sampler=BatchSampler(SequentialSampler(DATA), 3, False), batch_size=None), range(6)),
        (DataLoader(Stream(), batch_size=3), range(6)),
        ([(torch.tensor([[float(i)]]), torch.tensor([0])) for i in range(5)], [0, 1]),
        (DataLoader(DATA, batch_size=25), range(N)),
    ],
)
def test_the_first_two_batches(data, expected):
    assert sorted(given(as_loader(first_batches(data, 2), shuffle=False))) == sorted(expected)
    assert first_batches(data, float("inf")) is data


@pytest.mark.parametrize(
    ("settings", "batches", "passes"),
    [
        ({"batch_size": 4, "shuffle": True}, 3, 2),
        ({"batch_size": 7, "shuffle": True, "drop_last": True}, None, 1),
        ({"batch_size": 8, "sampler": RandomSampler(DATA, replacement=True)}, None, 2),
        ({"batch_size": 8, "sampler": WeightedRandomSampler(torch.linspace(1, 9, N), 30)}, 2, 3),
        ({"batch_size": 8, "sampler": RandomSampler(DATA, num_samples=10)}, None, 3),
        ({"batch_sampler": Buckets()}, None, 1),
        ({"batch_size": 4}, 3, 1),
    ],
)
def test_the_share_that_passes_leave_out(settings, batches, passes):
    """Against the share that passes over the loader itself leave out, on average."""
    loader = DataLoader(DATA, **settings)
    places = support(loader, batches).places
    left = []
    for trial in range(300):
        seen = set()
        for number in range(passes):
            if hasattr(loader.batch_sampler, "set_epoch"):
                loader.batch_sampler.set_epoch(trial * passes + number)
            sampler = loader.batch_sampler
            seen.update(itertools.chain.from_iterable(itertools.islice(sampler, batches)))
        left.append(1 - len(seen & set(places)) / len(places))
    mean, error = torch.tensor(left).mean(), torch.tensor(left).std() / len(left) ** 0.5
    assert abs(support(loader, batches).unseen(passes) - mean) <= 4 * error + 1e-6


def test_some_batches_are_spread_and_of_the_same_composition():
    loader = DataLoader(DATA, batch_size=4)
    assert [b[0].flatten().int().tolist() for b in some_batches(loader, examples=1)] == [
        [0, 1, 2, 3],
        [16, 17, 18, 19],
        [36, 37, 38, 39],
    ]
    assert len(list(some_batches(loader))) == 10
    assert len(list(some_batches([1, 2, 3, 4, 5]))) == 3
    assert len(list(some_batches(DataLoader(Stream(), batch_size=2)))) == 3
    assert list(some_batches(TensorDataset(torch.zeros(0)))) == []


def test_batches_are_of_the_size_asked_for_where_they_are_not_ready():
    sizes = [len(b[0]) for b in as_loader(DataLoader(DATA, batch_size=4), shuffle=False, batch_size=16)]
    assert sizes == [16, 16, 8]
    assert [len(b[0]) for b in as_loader(DATA, shuffle=False, batch_size=30)] == [30, 10]
    assert [len(b[0]) for b in as_loader(DataLoader(Stream(), batch_size=2), shuffle=False, batch_size=8)] == [8, 2]
    ready = DataLoader(DATA, batch_sampler=[[1, 2], [3]])
    assert [len(b[0]) for b in as_loader(ready, shuffle=False, batch_size=16)] == [2, 1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": DataLoader(DATA)}, "not a dict; instead of several loaders pass one"),
        ([DataLoader(DATA), DataLoader(DATA)], "not a list of DataLoaders; instead of several"),
        ((DATA, DATA), "not a tuple of TensorDatasets"),
        ((torch.zeros(3, 2), torch.zeros(3)), r"not a tuple of Tensors; .* TensorDataset\(inputs, targets\)"),
        (torch.zeros(3, 2), "not Tensor; make it a TensorDataset"),
        (torch.zeros(3, 2).numpy(), "not ndarray; make it a TensorDataset"),
        ("data", "not str"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_data(data, message):
    with pytest.raises(TypeError, match=message):
        as_loader(data, shuffle=False)


@pytest.mark.slow
def test_persistent_workers_of_a_running_loader_are_not_disturbed():
    loader = DataLoader(
        DATA, batch_size=4, sampler=SubsetRandomSampler(EVERY_FOURTH), num_workers=1, persistent_workers=True
    )
    running = iter(loader)
    rows = given([next(running)])
    assert sorted(given(as_loader(loader, shuffle=False))) == EVERY_FOURTH
    rows += given(running)
    assert sorted(rows) == EVERY_FOURTH


class Sized0(Dataset):
    def __len__(self):
        return 0


def test_an_empty_data_set_gives_no_batch():
    assert list(as_loader(Sized0(), shuffle=True)) == []
    assert list(as_loader(DataLoader(DATA, sampler=[]), shuffle=True)) == []
