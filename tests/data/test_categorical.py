"""Data in which different examples share their content."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_cwrf import (
    train_shadows,
    without_overlap,
)
from lightning_cwrf.auditing import audit
from tests.helpers import Classifier, part

MEMBERS, OTHERS, POPULATION = part(0, 60), part(100, 160), part(200, 300)


class Categorical(Dataset):
    """People of whom three answers are known: many answer alike."""

    def __init__(self, people):
        answers = torch.randint(4, (1000, 3), generator=torch.Generator().manual_seed(0))
        self.rows = [(answers[i].float(), answers[i].sum() % 2, f"person {i}") for i in people]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def classification_step(self, batch):
        return self.layer(batch[0]), batch[1]


def test_people_with_the_same_answers_are_distinguished_by_a_key():
    """405 of 542 were members by content; there was no way to audit them."""
    members, others = Categorical(range(500)), Categorical(range(500, 1000))
    plain = [
        TensorDataset(torch.stack([r[0] for r in d.rows]), torch.stack([r[1] for r in d.rows]))
        for d in (members, others)
    ]
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"\d+ of the 500 examples of nonmembers are members"):
        audit(model, members=plain[0], nonmembers=plain[1])
    allowed = audit(model, members=plain[0], nonmembers=plain[1], overlap="allow")
    keyed = audit(
        Linear(),
        members=members,
        nonmembers=DataLoader(others, batch_size=32),
        key=lambda person: person[2],
    )
    assert len(keyed.losses) == len(allowed.losses) == 1000
    assert keyed.overlap == {}
    assert len(allowed.overlap["nonmembers"]) > 400
    twice = Categorical([*range(500, 900), *range(3)])
    with pytest.raises(
        ValueError,
        match=r"3 of the 403 examples of nonmembers are members \(the same key\), at positions 400, 401, 402",
    ):
        audit(Linear(), members=members, nonmembers=twice, key=lambda person: person[2])
    assert len(without_overlap(twice, members, key=lambda person: person[2])) == 400


def test_categorical_shadow_pools_can_have_a_population(tmp_path):
    """The scoring, the defenses and train_shadows warn where content tells nobody apart."""
    data = Categorical(range(1000))
    plain = TensorDataset(torch.stack([r[0] for r in data.rows]), torch.stack([r[1] for r in data.rows]))
    pool, population = Subset(plain, range(200)), Subset(plain, range(200, 260))
    with pytest.warns(UserWarning, match="examples of the population are in the pool.* this may be chance"):
        shadows = train_shadows(fit_linear, pool, 4, population=population, store=tmp_path, progress=False, workers=1)
    sides = {"members": Subset(plain, range(100)), "nonmembers": Subset(plain, range(100, 200))}
    result = audit(nn.Linear(3, 2), **sides, shadows=shadows, overlap="allow")
    assert set(result.scores) == {"loss", "lira", "rmia"}


def fit_linear(members, seed):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in DataLoader(members, batch_size=20):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_an_overlap_by_chance_in_categorical_reference_data_is_a_warning():
    from lightning_cwrf.weights.scores import privacy_vulnerability_scores

    data = Categorical(range(400))
    plain = TensorDataset(torch.stack([r[0] for r in data.rows]), torch.stack([r[1] for r in data.rows]))
    members, reference = Subset(plain, range(200)), Subset(plain, range(200, 400))
    with pytest.warns(UserWarning, match="share their content with one another"):
        privacy_vulnerability_scores(nn.Linear(3, 2), nn.Linear(3, 2), members, reference, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        privacy_vulnerability_scores(Classifier(), Classifier(), MEMBERS, OTHERS, steps=1)


def test_dropping_many_examples_of_categorical_data_is_remarked_on():
    """A model that treats all examples alike, on few distinct inputs: what is left is unlike the members."""
    x = torch.arange(40).remainder(8).float().unsqueeze(1)
    members = TensorDataset(x[:20], torch.zeros(20, dtype=torch.long))
    nonmembers = TensorDataset(x[20:] + 4, torch.zeros(20, dtype=torch.long))
    shared = sum(float(value) in x[:20] for value in x[20:, 0] + 4)
    with pytest.warns(UserWarning, match=f"{shared} of the 20 nonmembers were left out.*pass key="):
        dropped = audit(nn.Linear(1, 2), members=members, nonmembers=nonmembers, overlap="drop")
    assert any("attacks look stronger" in remark for remark in dropped.remarks)
    allowed = audit(nn.Linear(1, 2), members=members, nonmembers=nonmembers, overlap="allow")
    assert not any("left out" in remark for remark in allowed.remarks)
