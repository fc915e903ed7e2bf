"""Two batches in one forward pass."""

import pytest
import torch
from torch import nn

from lightning_cwrf.weights.scores import privacy_vulnerability_scores
from tests.oracles import formulas
from tests.weights.helpers import Counting


class Mixing(nn.Linear):
    """Its outputs depend on the whole batch."""

    def forward(self, x):
        z = super().forward(x)
        return z - z.mean(0)


class OneSize(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(8, -1))


@pytest.mark.parametrize("cls", [Mixing, OneSize, nn.Linear])
def test_both_batches_go_through_as_one_only_where_that_is_the_same(cls):
    model, vanilla = cls(4, 3).double(), cls(4, 3).double()
    data = [[(torch.randn(8, 4).double(), torch.randint(3, (8,))) for _ in range(3)] for _ in range(2)]
    ours = privacy_vulnerability_scores(model, vanilla, *data, lam=0.7, steps=4, lr=0.05)
    theirs = formulas.algorithm_1(model, vanilla.state_dict(), *data, 0.7, 4, 0.05)
    for name, score in theirs.items():
        torch.testing.assert_close(ours[name].double(), score, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("reference", "sizes"),
    [
        # The vanilla model's batches, once both apart and as one to compare them, and as one from then on.
        ([(torch.randn(6, 4), torch.randint(3, (6,)))], [6, 8, 6, 14, 14, 6, 14]),
        ([{"x": torch.randn(6, 4), "y": torch.randint(3, (6,))}], [6, 8, 6, 14, 14, 6, 14]),
        ([(torch.randn(6, 1, 4), torch.randint(3, (6,)))], None),
    ],
)
def test_batches_of_one_form_are_joined(reference, sizes):
    Counting.sizes = []
    members = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    if sizes is None:
        with pytest.raises(ValueError, match="logits must be"):
            privacy_vulnerability_scores(Counting(4, 3), Counting(4, 3), members, reference, steps=2)
        return
    privacy_vulnerability_scores(Counting(4, 3), Counting(4, 3), members, reference, steps=2)
    assert Counting.sizes == sizes
