"""The parts of the scoring's descent, one by one."""

import copy

import pytest
import torch
from torch import nn

from lightning_cwrf.weights.descent import accumulate
from lightning_cwrf.weights.joining import TwoBatches, join
from lightning_cwrf.weights.scores import learnability_scores, memory_of
from lightning_cwrf.weights.vanilla import identity, is_file, save_vanilla


def pair(n=3, width=4, dtype=torch.float32):
    return torch.rand(n, width, dtype=torch.float64).to(dtype), torch.zeros(n, dtype=torch.int64)


def test_batches_that_fit_are_joined_in_order():
    first, second = pair(2), pair(5)
    inputs, targets = join(nn.Linear(4, 3), first, second)
    assert torch.equal(inputs, torch.cat([first[0], second[0]]))
    assert targets.shape == (7,)


class Own(nn.Linear):
    def classification_step(self, batch):
        return self(batch[0]), batch[1]


@pytest.mark.parametrize(
    ("model", "second"),
    [
        (Own(4, 3), pair()),
        (nn.Linear(4, 3), pair(width=5)),
        (nn.Linear(4, 3), pair(dtype=torch.float64)),
        (nn.Linear(4, 3), (torch.rand(3, 4), torch.zeros(3, dtype=torch.int32))),
        (nn.Linear(4, 3), (torch.rand(3, 4), torch.zeros(2, dtype=torch.int64))),
        (nn.Linear(4, 3), (torch.rand(3, 4).to_sparse(), torch.zeros(3, dtype=torch.int64))),
        (nn.Linear(4, 3), (torch.rand(3, 4), torch.tensor(0))),
        (nn.Linear(4, 3), {"a": torch.rand(3, 4), "b": torch.rand(3, 4), "y": torch.zeros(3, dtype=torch.int64)}),
        (nn.Linear(4, 3), ([1.0, 2.0], torch.zeros(2, dtype=torch.int64))),
    ],
    ids=["own step", "width", "dtype", "label dtype", "lengths", "sparse", "no batch", "several inputs", "list"],
)
def test_batches_that_do_not_fit_are_not(model, second):
    assert join(model, pair(), second) is None
    assert join(model, second, pair()) is None


def test_a_batch_that_does_not_fit_is_run_apart_and_the_next_one_joined_again():
    class Sizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(1, 3), []

        def forward(self, x):
            self.seen.append(tuple(x.shape))
            return self.layer(x.mean(1, keepdim=True))

    model, run = Sizes(), TwoBatches()
    for first, second in ((pair(2), pair(3)), (pair(2), pair(3, width=7)), (pair(2), pair(3))):
        model.seen.clear()
        logits, targets, others = run(model, first, second)
        assert (len(logits), len(targets), len(others)) == (2, 2, 3)
        torch.testing.assert_close(logits, model.layer(first[0].mean(1, keepdim=True)))
        torch.testing.assert_close(others, model.layer(second[0].mean(1, keepdim=True)))
        torch.testing.assert_close(targets, first[1])
        assert (model.seen[-1] == (5, 4)) == (second[0].shape[1] == 4)


def test_the_callers_model_is_never_stepped_and_each_step_is_reported():
    model, steps = nn.Linear(2, 2), []
    before = copy.deepcopy(model.state_dict())

    def begin():
        return lambda work: work(torch.ones(1, 2)).square().sum()

    scores = accumulate(model, begin, 3, 0.1, steps.append)
    assert steps == [1, 2, 3]
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    # By hand: z = W·1 + b, the gradient of each weight of a row is 2z.
    weight, bias = before["weight"].clone(), before["bias"].clone()
    expected = torch.zeros_like(weight)
    for _ in range(3):
        gradient = (2 * (weight.sum(1) + bias)).unsqueeze(1).expand(2, 2)
        expected += (gradient * weight).abs()
        weight, bias = weight - 0.1 * gradient, bias - 0.1 * gradient[:, 0]
    torch.testing.assert_close(scores["weight"], expected)


def test_a_loss_that_is_not_finite_names_the_step_and_the_rate():
    def begin():
        values = iter([1.0, float("nan")])
        return lambda work: work.weight.sum() * next(values)

    with pytest.raises(ValueError, match=r"the scoring loss is nan at step 2; lower lr \(now 0.5\)"):
        accumulate(nn.Linear(2, 2), begin, 3, 0.5, None)


def test_one_unreached_parameter_and_many_are_reported():
    class Wide(nn.Linear):
        def __init__(self, extra):
            super().__init__(4, 3)
            self.spare = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(extra))

    for extra, words in (
        (1, r"1 of 3 trainable parameters \(spare.0\)"),
        (5, r"5 of 7 .* \(spare.0, spare.1, spare.2, spare.3, spare.4\)"),
        (6, r"6 of 8 .* \(spare.0, spare.1, spare.2, spare.3, spare.4 and 1 more\)"),
    ):
        with pytest.warns(UserWarning, match=words):
            learnability_scores(Wide(extra), [pair()], steps=1)


def test_memory_of_a_nest():
    x = torch.zeros(3, 4)
    assert memory_of(x) == 48
    assert memory_of({"a": [x, (x.double(), None)], "b": 3, "c": "text"}) == 48 + 96
    assert memory_of([x, object()]) == float("inf")


def test_weights_are_recognised_by_their_content(tmp_path):
    model = nn.Linear(2, 2)
    path = save_vanilla(model, tmp_path / "w")
    assert identity(path) == identity(str(path)) == identity(model.state_dict())
    assert identity(path).startswith("weights ")
    assert identity(nn.Linear(2, 2).state_dict()) != identity(path)
    assert identity("redraw") == "redraw"
    assert identity(tmp_path / "gone") is identity(model) is identity(nn.Module) is None
    assert [is_file(source) for source in (path, str(path), "redraw", model, {})] == [True, True, False, False, False]
