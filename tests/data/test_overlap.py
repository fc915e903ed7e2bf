"""Examples that are on two sides of an audit."""

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset

from lightning_cwrf import (
    MIAAuditCallback,
    train_shadows,
    without_overlap,
)
from lightning_cwrf.auditing import AuditResult, audit
from lightning_cwrf.auditing.sides import apart
from lightning_cwrf.data import example_ids
from lightning_cwrf.data.seen import record_seen
from lightning_cwrf.outputs import ModelOutputs
from tests.helpers import Classifier, digits, part, trainer
from tests.recipe_functions import Memorise

MEMBERS, OTHERS, POPULATION = part(0, 60), part(100, 160), part(200, 300)


MIXED = ConcatDataset([part(100, 140), part(10, 30)])  # places 40 to 59 are members


def test_an_overlap_is_an_error_with_counts_and_places():
    with pytest.raises(
        ValueError, match=r"20 of the 60 examples of nonmembers are members \(the same inputs and label"
    ) as e:
        audit(Classifier(), members=MEMBERS, nonmembers=MIXED)
    assert "at positions 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, ..." in str(e.value)
    for way_out in ("without_overlap", 'overlap="drop"', "key=", 'overlap="allow"'):
        assert way_out in str(e.value)


@pytest.mark.slow
def test_an_overlap_can_be_dropped_or_allowed(tmp_path):
    torch.manual_seed(0)
    model = Classifier()
    attacks = ["loss", "attack_p", "quantile_regression", "augmentation"]
    population = ConcatDataset([POPULATION, part(0, 5), part(100, 103)])
    given = {"members": MEMBERS, "attacks": attacks}
    dropped = audit(model, nonmembers=MIXED, population=population, overlap="drop", **given)
    exact = audit(model, nonmembers=part(100, 140), population=POPULATION, **given)
    assert dropped.values() == exact.values()
    assert dropped.overlap == {"nonmembers": list(range(40, 60)), "population": list(range(100, 108))}
    assert "20 examples of nonmembers are also in another set; they were left out" in str(dropped)
    allowed = audit(model, nonmembers=MIXED, population=population, overlap="allow", **given)
    assert len(allowed.losses) == 120
    assert allowed.overlap == dropped.overlap
    assert "also in another set; they were kept" in str(allowed)
    again = AuditResult.load(allowed.save(tmp_path / "a.json"))
    assert (again.overlap, again.overlap_policy) == (allowed.overlap, "allow")
    assert exact.overlap == {}
    with pytest.raises(ValueError, match="every example of nonmembers is on another side"):
        audit(model, members=MEMBERS, nonmembers=part(0, 20), overlap="drop")
    for wrong in ("keep", None, True):
        with pytest.raises(ValueError, match="overlap must be 'error' or 'drop' or 'allow'"):
            audit(model, members=MEMBERS, nonmembers=OTHERS, overlap=wrong)
        with pytest.raises(ValueError, match="overlap must be"):
            MIAAuditCallback(OTHERS, overlap=wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drop", "allow"])
def test_the_callback_drops_or_allows(name):
    callback = MIAAuditCallback(MIXED, overlap=name, every_n_epochs=0)
    trainer(max_epochs=1, callbacks=[callback]).fit(Classifier(), DataLoader(MEMBERS, batch_size=20))
    assert callback.result.overlap == {"nonmembers": list(range(40, 60))}
    assert len(callback.result.losses) == {"drop": 100, "allow": 120}[name]


@pytest.fixture(scope="module")
def shadows(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    pool = ConcatDataset([MEMBERS, OTHERS])
    return train_shadows(Memorise(), pool, 4, population=POPULATION, store=store, progress=False, workers=1)


@pytest.mark.slow
def test_dropped_examples_leave_the_shadow_models_signals_too(shadows):
    torch.manual_seed(0)
    model = Classifier(width=16)
    both = ConcatDataset([OTHERS, part(0, 7)])
    record_seen(
        model, "non-members that PAST trains against", example_ids(DataLoader(part(200, 210), 10).__iter__().__next__())
    )
    given = {"members": MEMBERS, "shadows": shadows, "overlap": "drop"}
    dropped = audit(model, nonmembers=both, **given)
    assert dropped.overlap == {"nonmembers": list(range(60, 67)), "population": list(range(10))}
    assert set(dropped.scores) == {"loss", "lira", "rmia"}
    assert torch.equal(dropped.scores["lira"], audit(model, nonmembers=OTHERS, **given).scores["lira"])


class Relabelled(Dataset):
    def __init__(self, data, places):
        self.data = data
        self.places = places

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return x, (y + 1) % 10 if i in self.places else y


def test_labels_that_differ_from_the_pools_raise(shadows):
    """They were audited: LiRA compared losses of two labels."""
    model = Classifier(width=16)
    flipped = Relabelled(MEMBERS, {3, 5})
    with pytest.raises(
        ValueError,
        match=r"2 of the 120 audited examples have another label in the .* pool \(the first, number 3",
    ):
        audit(model, members=flipped, nonmembers=OTHERS, shadows=shadows)
    audit(model, members=flipped, nonmembers=OTHERS)


def test_another_number_of_classes_raises(shadows):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    with pytest.raises(ValueError, match="the audited model has 12 classes, the shadow models 10"):
        audit(wide, members=MEMBERS, nonmembers=OTHERS, shadows=shadows)


def test_a_non_member_with_the_inputs_of_a_member_and_another_label_warns():
    with pytest.warns(UserWarning, match="2 of the 60 non-members have the inputs of a member and another label"):
        result = audit(
            Classifier(), members=MEMBERS, nonmembers=Relabelled(ConcatDataset([part(100, 158), part(0, 2)]), {58, 59})
        )
    assert "2 of the 60 non-members have the inputs" in str(result)


def test_many_examples_are_dropped_in_one_pass():
    """Each place is looked up once, not each among all that are dropped: 30,000 took minutes."""
    n = 30_000
    outputs = ModelOutputs(torch.zeros(n, 2), torch.zeros(n, dtype=torch.long), [b"%d" % i for i in range(n)])
    others = ModelOutputs(torch.zeros(n, 2), torch.zeros(n, dtype=torch.long), [b"%d" % (i + 9) for i in range(n)])
    assert len(apart(outputs, others, None, seen={}, overlap="drop").nonmembers) == 9


def test_data_without_the_overlap():
    clean = without_overlap(MIXED, MEMBERS)
    assert [float(x.sum()) for x, _ in clean] == [float(digits()[i][0].sum()) for i in range(100, 140)]
    batches = without_overlap(DataLoader(MIXED, batch_size=16, shuffle=True), MEMBERS, part(100, 110))
    assert isinstance(batches, DataLoader)
    assert [len(y) for _, y in batches] == [16, 14]
    audit(Classifier(), members=MEMBERS, nonmembers=clean)
    with pytest.raises(TypeError, match="map-style data set or a DataLoader of one, not list"):
        without_overlap([1], MEMBERS)
    with pytest.raises(TypeError, match="the data must be read completely"):
        without_overlap(MIXED, Numbers())
    with pytest.raises(ValueError, match="read differently each time"):
        without_overlap(Noisy(), MEMBERS)


class Numbers(IterableDataset):
    def __iter__(self):
        return iter([digits()[0]])


class Noisy(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.rand(3), 0
