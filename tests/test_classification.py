from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf.classification import classification_step, extract_logits, split_batch
from lightning_cwrf.data import as_loader, check_disjoint, cycle, example_digests, fingerprints, isolated_rng, move
from lightning_cwrf.outputs import collect_outputs
from tests.helpers import Classifier, loader, part, same_snapshot, snapshot

x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, ids, mask):
        return SimpleNamespace(logits=self.layer(ids * mask))


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
def test_dict_batches(key):
    model = Keywords()
    logits, targets = classification_step(model, {"ids": x, "mask": torch.ones_like(x), key: y})
    assert torch.equal(logits, model.layer(x))
    assert targets is y
    one, _ = classification_step(model.layer, {"pixel_values": x, key: y})
    assert torch.equal(one, logits)


def test_outputs_of_every_form():
    z = torch.randn(2, 3)
    pair = namedtuple("pair", "logits aux")
    for output in (z, {"logits": z}, SimpleNamespace(logits=z), (z, 1), pair(z, None)):
        assert extract_logits(output) is z
    for output in ({"scores": z}, [z], None, ()):
        with pytest.raises(TypeError, match="define classification_step"):
            extract_logits(output)


@pytest.mark.parametrize("batch", [x, (x,), (x, x, y), {"x": x}, {"y": y, "labels": y, "x": x}, "text"])
def test_batches_of_unknown_form(batch):
    with pytest.raises(TypeError, match="define classification_step"):
        split_batch(batch)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 0), torch.tensor([0, 0]), "K >= 2"),
        (torch.zeros(2, 5, 3), torch.tensor([0, 0]), r"shape \(n, K\)"),
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 0]), "floating-point"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "class indices"),
        (torch.zeros(2, 3), torch.eye(3)[:2].long(), "argmax"),
        (torch.zeros(2, 3), torch.tensor([0]), "2 rows of logits do not fit 1 targets"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "label 3 is out of range: the model has 3 classes"),
        (torch.zeros(2, 3), torch.tensor([0, -100]), "label -100 is out of range"),
        (torch.tensor([[0.0, 0.0], [0.0, float("nan")]]), torch.tensor([0, 0]), r"rows \[1\] of this batch"),
    ],
)
def test_what_no_classifier_gives(logits, targets, message):
    class Fixed(nn.Module):
        def classification_step(self, batch):
            return batch

    with pytest.raises(ValueError, match=message):
        classification_step(Fixed(), (logits, targets))


def test_fingerprints_are_of_content():
    a = {"ids": torch.tensor([[1, 2], [3, 4]]), "mask": torch.tensor([[1.0], [1.0]])}
    b = {"mask": torch.tensor([[1.0], [0.0]]), "ids": torch.tensor([[3, 4], [3, 4]])}
    assert fingerprints(a)[1] != fingerprints(b)[1]
    assert fingerprints(a)[1] == fingerprints({"ids": b["ids"], "mask": a["mask"]})[0]
    assert fingerprints(torch.ones(1, 2)) != fingerprints(torch.ones(1, 2, dtype=torch.float64))
    assert fingerprints(torch.ones(1, 2, 2)) != fingerprints(torch.ones(1, 4))
    assert fingerprints(np.ones((1, 4), np.float32)) == fingerprints(torch.ones(1, 4))
    assert fingerprints(torch.ones(2, dtype=torch.bfloat16))[0]
    with pytest.raises(TypeError, match="inputs of type str"):
        fingerprints("text")
    with pytest.raises(ValueError, match="batch first"):
        fingerprints((torch.ones(2, 1), torch.ones(3, 1)))


def test_digests_do_not_see_labels():
    assert example_digests((x, y)) == example_digests((x, y + 1)) == fingerprints(x)
    check_disjoint(fingerprints(x[:3]), fingerprints(x[3:]), "reference")
    with pytest.raises(ValueError, match="2 of the 3 examples of reference"):
        check_disjoint(fingerprints(x[:5]), fingerprints(x[3:]), "reference")


def test_move_keeps_the_form_of_a_batch():
    pair = namedtuple("pair", "x meta")
    batch = {"a": [x, (y,)], "b": pair(x, "name")}
    moved = move(batch, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert isinstance(moved["a"][1], tuple)
    assert moved["b"].x.is_meta
    assert moved["b"].meta == "name"


def test_a_loader_is_read_whole_and_in_order_whatever_its_owner_does():
    data = TensorDataset(torch.arange(10.0).view(10, 1), torch.zeros(10, dtype=torch.long))
    owner = DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
    rows = torch.cat([batch[0] for batch in as_loader(owner, shuffle=False)]).flatten()
    assert rows.tolist() == list(range(10))
    shuffled = torch.cat([batch[0] for batch in as_loader(owner, shuffle=True)]).flatten()
    assert sorted(shuffled.tolist()) == list(range(10)) != shuffled.tolist()
    with pytest.raises(TypeError, match="not int"):
        as_loader(3, shuffle=False)


def test_cycle():
    it = cycle([1, 2], "members")
    assert [next(it) for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="members holds no batch"):
        next(cycle([], "members"))


@pytest.mark.usefixtures("rng_untouched")
def test_isolated_rng():
    with isolated_rng():
        first = torch.rand(1), np.random.rand()
    with isolated_rng():
        assert (torch.rand(1), np.random.rand()) == first


def test_collecting_outputs_leaves_the_model_as_it_was():
    model = Classifier().train()
    model.net[1].eval()
    before = snapshot(model)
    outputs = collect_outputs(model, loader(0, 40))
    same_snapshot(before, snapshot(model))
    model.eval()
    with torch.no_grad():
        expected = model(torch.stack([part(0, 40)[i][0] for i in range(40)]))
    torch.testing.assert_close(outputs.logits, expected)
    assert len(outputs) == 40
    assert torch.equal(outputs.correct, expected.argmax(1) == outputs.targets)
    with pytest.raises(ValueError, match="are probabilities"):
        collect_outputs(nn.Sequential(model, nn.Softmax(1)), loader(0, 40))
    collect_outputs(nn.Sequential(model, nn.LogSoftmax(1)), loader(0, 40))
    with pytest.raises(ValueError, match="test data holds no batch"):
        collect_outputs(model, [], name="test data")
