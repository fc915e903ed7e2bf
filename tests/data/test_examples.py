"""How an example is recognised: by content or by key."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from lightning_cwrf import (
    without_overlap,
)
from lightning_cwrf.auditing import audit
from lightning_cwrf.data import example_digests, example_ids, fingerprints
from tests.helpers import Classifier, part

MEMBERS, OTHERS, POPULATION = part(0, 60), part(100, 160), part(200, 300)


@pytest.mark.parametrize(
    ("key", "message"),
    [(3, "key must be a function of one example"), (lambda e: e[0], "not a list"), (lambda e: None, "not a NoneType")],
)
def test_keys_that_are_none(key, message):
    with pytest.raises(TypeError, match=message):
        audit(Classifier(), members=MEMBERS, nonmembers=OTHERS, key=key)


def test_a_key_gets_an_example_in_the_form_of_its_batch():
    x, y = torch.arange(6.0).view(3, 2), torch.tensor([7, 8, 9])
    seen = []
    ids = example_ids({"x": x, "label": y, "name": ["a", "b", "c"]}, lambda e: seen.append(e) or e["name"])
    assert ids == [("a", None), ("b", None), ("c", None)]
    assert torch.equal(seen[1]["x"], x[1])
    assert example_ids([x, y], lambda e: e[1]) == [(7, None), (8, None), (9, None)]
    assert example_ids((x, {"id": y.numpy()}), lambda e: e[1]["id"]) == [(7, None), (8, None), (9, None)]


def test_padding_is_no_content():
    """18 of 32 were found: the others stood in batches of another length."""
    rows = [torch.arange(1, n) for n in (3, 6, 4, 9)]

    def batch(chosen, pad=0):
        width = max(len(rows[i]) for i in chosen)
        ids = torch.stack([nn.functional.pad(rows[i], (0, width - len(rows[i])), value=pad) for i in chosen])
        mask = torch.stack([torch.arange(width) < len(rows[i]) for i in chosen]).long()
        return {"input_ids": ids, "attention_mask": mask}

    whole, few = fingerprints(batch([0, 1, 2, 3])), fingerprints(batch([0, 2]))
    assert few == [whole[0], whole[2]]
    assert len(set(whole)) == 4
    assert fingerprints(batch([0, 2], pad=1)) == [fingerprints(batch([0, 3], pad=1))[0], whole[2]]
    assert fingerprints(batch([0, 3])["input_ids"])[0] == fingerprints(batch([0])["input_ids"])[0]
    assert fingerprints(torch.tensor([[0, 3], [3, 0]]))[0] != fingerprints(torch.tensor([[0, 3], [3, 0]]))[1]
    assert fingerprints(torch.zeros(1, 2)) != fingerprints(torch.zeros(1, 3))  # floats are no padding
    assert fingerprints(torch.zeros(2, 0, dtype=torch.long))[0]
    pairs = [
        ({"a": torch.tensor([[1, 0]]), "b": torch.tensor([[2]])}),
        ({"a": torch.tensor([[1]]), "b": torch.tensor([[2]])}),
    ]
    assert fingerprints(pairs[0]) == fingerprints(pairs[1])
    apart = [torch.tensor([[1, 2], [1, 0]]), torch.tensor([[3, 0], [2, 3]])]
    assert len(set(fingerprints(apart))) == 2  # one row does not run on into the next


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "samples", "frames"])
def test_what_a_mask_leaves_out_is_no_content(left, kind):
    """Decoders pad at the left, and audio is padded too."""
    torch.manual_seed(0)
    rows = [torch.randn(n, 3) for n in (3, 6, 4)]
    rows = {"tokens": [r[:, 0].gt(0).long() for r in rows], "samples": [r[:, 0] for r in rows], "frames": rows}[kind]

    def batch(chosen):
        width = max(len(rows[i]) for i in chosen)
        x, mask = (
            torch.zeros(len(chosen), width, *rows[0].shape[1:], dtype=rows[0].dtype),
            torch.zeros(len(chosen), width),
        )
        for line, i in enumerate(chosen):
            places = slice(width - len(rows[i]), None) if left else slice(len(rows[i]))
            x[line, places], mask[line, places] = rows[i], 1
        return {"x": x, "attention_mask": mask.long()}

    whole = fingerprints(batch([0, 1, 2]))
    assert len(set(whole)) == 3
    assert fingerprints(batch([2, 0])) == [whole[2], whole[0]]


@pytest.mark.parametrize("form", ["dict", "named", "texts", "triple"])
def test_an_index_in_the_batch_hides_no_overlap(form):
    """Each data set numbers its own examples, so a copy has another number."""

    class Numbered(Dataset):
        def __init__(self, begin, end):
            self.examples = part(begin, end)

        def __len__(self):
            return len(self.examples)

        def __getitem__(self, i):
            x, y = self.examples[i]
            if form == "triple":
                return x, y, i
            name, known = {"dict": ("idx", i), "named": ("Sample_ID", i), "texts": ("id", f"no {i}")}[form]
            return {"x": x, name: known, "labels": y}

    class Own(Classifier):
        def classification_step(self, batch):
            x, y = (batch["x"], batch["labels"]) if isinstance(batch, dict) else batch[:2]
            return self(x), y

    model = Own()
    with pytest.raises(ValueError, match="20 of the 40 examples of nonmembers are members"):
        audit(model, members=Numbered(0, 40), nonmembers=Numbered(20, 60))
    assert len(without_overlap(Numbered(20, 60), Numbered(0, 40))) == 20
    audit(model, members=Numbered(0, 40), nonmembers=Numbered(40, 80))


def test_numbers_that_are_all_there_is_are_content():
    ids, ages = torch.tensor([1, 2]), torch.tensor([30, 30])
    assert len(set(example_digests(({"id": ids}, ages)))) == 2
    assert len(set(example_digests((ids, ages, ages)))) == 2
    assert len(set(example_digests(({"age": ids, "x": ages}, ages)))) == 2
    assert len(set(example_digests(({"input_ids": torch.tensor([[1, 2], [1, 3]]), "x": ages}, ages)))) == 2


def test_sparse_inputs_have_content():
    x = torch.eye(3)
    assert fingerprints(x.to_sparse()) == fingerprints(x)


class Graph:
    """As in chemprop: the examples of a batch joined to one object."""


def test_a_batch_of_one_object_raises_with_the_fix():
    for batch in ((Graph(), torch.tensor([0, 1])), (Graph(), None, torch.tensor([0, 1]), torch.ones(2))):
        with pytest.raises(TypeError, match=r"inputs of type Graph: give batches of tensors.*classification_step") as e:
            example_ids(batch)
        assert "key=" not in str(e.value)
