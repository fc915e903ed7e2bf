"""Ways of scoring that save memory give the same scores."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_cwrf.weights.scores import learnability_scores, privacy_vulnerability_scores
from tests.oracles import formulas
from tests.weights.helpers import Detached


def test_sparse_and_strided_gradients_and_chunks_score_as_dense_ones(monkeypatch):
    class Words(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.words = nn.Embedding(5, 4, sparse=sparse)
            self.head = nn.Conv1d(4, 3, 1).to(memory_format=torch.preserve_format)

        def forward(self, x):
            return self.head(self.words(x).transpose(1, 2)).mean(2)

    data = [(torch.randint(5, (6, 7)), torch.randint(3, (6,))) for _ in range(2)]
    found = []
    for sparse, chunk in ((False, 1 << 20), (True, 1 << 20), (False, 3)):
        torch.manual_seed(0)
        monkeypatch.setattr("lightning_cwrf.weights.descent._CHUNK", chunk)
        found.append(learnability_scores(Words(sparse), data, steps=3, lr=0.1))
    for other in found[1:]:
        for name, score in found[0].items():
            torch.testing.assert_close(other[name], score)
    images = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 3))
    pictures = [(torch.randn(5, 2, 3, 3), torch.randint(3, (5,)))]
    plain = learnability_scores(images, pictures, steps=2, lr=0.1)
    last = learnability_scores(images.to(memory_format=torch.channels_last), pictures, steps=2, lr=0.1)
    for name, score in plain.items():
        torch.testing.assert_close(last[name], score)


def test_a_model_that_needs_old_values_of_its_weights_is_scored_all_the_same():
    model = Detached().double()
    data = [(torch.randn(6, 4).double(), torch.randint(3, (6,))) for _ in range(2)]
    done = []
    scores = learnability_scores(model, data, steps=2, lr=0.1, on_step=done.append)
    assert done == [1, 2]  # it began anew in the first step
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    expected = {n: torch.zeros_like(p) for n, p in weights.items()}
    for x, y in data:
        h = F.linear(F.linear(x, weights["first.weight"], weights["first.bias"]), weights["a.weight"].detach())
        h = torch.tanh(F.linear(h, weights["a.weight"], weights["a.bias"]))
        loss = F.cross_entropy(F.linear(h, weights["b.weight"], weights["b.bias"]), y)
        for (name, weight), gradient in zip(
            weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            expected[name] += (gradient * weight).abs().detach()
            weights[name] = (weight - 0.1 * gradient).detach().requires_grad_()
    for name, score in expected.items():
        torch.testing.assert_close(scores[name].double(), score, rtol=1e-5, atol=1e-8)


def test_an_error_of_the_users_backward_is_not_changed():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("mine")

    class Model(nn.Linear):
        def forward(self, x):
            return Bad.apply(super().forward(x))

    with pytest.raises(RuntimeError, match="mine"):
        learnability_scores(Model(4, 3), [(torch.randn(8, 4), torch.randint(3, (8,)))])


@pytest.mark.parametrize("width", [2, 64], ids=["vanilla model kept", "its outputs alone"])
def test_the_vanilla_model_gives_the_same_outputs_whether_it_is_kept_or_not(width):
    """Whether its weights are given up before the first step is decided by size; scores do not depend on it."""
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))  # noqa: E731
    model, vanilla = make().double(), make().double()
    data = [[(torch.randn(4, 4).double(), torch.randint(3, (4,))) for _ in range(3)] for _ in range(2)]
    small = 3 * sum(t.numel() * t.element_size() for t in data[1][0]) < sum(p.numel() * 8 for p in model.parameters())
    assert small == (width == 64)
    ours = privacy_vulnerability_scores(model, vanilla, *data, lam=0.7, steps=4, lr=0.05)
    theirs = formulas.algorithm_1(model, vanilla.state_dict(), *data, 0.7, 4, 0.05)
    for name, score in theirs.items():
        torch.testing.assert_close(ours[name].double(), score, rtol=1e-5, atol=1e-9)


def test_a_vanilla_model_whose_outputs_are_kept_runs_once_a_step():
    """Weights of 1.2 MB, batches of some bytes."""

    class Wide(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 512), nn.Linear(512, 512), nn.Linear(512, 3))

        def forward(self, x):
            calls.append(torch.is_grad_enabled())
            return super().forward(x)

    calls = []
    data = [[(torch.randn(4, 4), torch.randint(3, (4,))) for _ in range(3)] for _ in range(2)]
    privacy_vulnerability_scores(Wide(), Wide(), *data, steps=5)
    # Five answers, one comparison of both ways in three passes, five passes of the copy.
    assert calls == [False] * 5 + [False] * 3 + [True] * 5
