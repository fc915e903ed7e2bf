"""Weight scores are those of Algorithm 1."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_cwrf.weights.scores import learnability_scores, privacy_vulnerability_scores, pve_loss
from tests.helpers import part, trained
from tests.oracles import formulas
from tests.weights.helpers import Counting, batches


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_scores_are_those_of_algorithm_1(lam):
    model, vanilla = trained()
    model, vanilla = model.double(), {n: v.double() if v.is_floating_point() else v for n, v in vanilla.items()}
    members = [(x.double(), y) for x, y in batches(0, 40)]
    reference = [(x.double(), y) for x, y in batches(100, 124)]
    ours = privacy_vulnerability_scores(model, vanilla, members, reference, lam=lam, steps=7, lr=0.05)
    theirs = formulas.algorithm_1(model, vanilla, members, reference, lam, 7, 0.05)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name].double(), theirs[name], rtol=1e-5, atol=1e-9)


def test_scores_in_train_mode_are_of_batch_statistics():
    torch.manual_seed(0)
    model, vanilla = (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 10)).double()
        for _ in range(2)
    )
    members = [(x.double(), y) for x, y in batches(0, 40)]
    reference = [(x.double(), y) for x, y in batches(100, 124)]
    before = copy.deepcopy(model.state_dict())
    settings = {"lam": 0.7, "steps": 5, "lr": 0.05}
    ours = privacy_vulnerability_scores(model, vanilla, members, reference, mode="train", **settings)
    theirs = formulas.algorithm_1(model, vanilla.state_dict(), members, reference, 0.7, 5, 0.05, train=True)
    for name in theirs:
        torch.testing.assert_close(ours[name].double(), theirs[name], rtol=1e-5, atol=1e-9)
    in_eval = privacy_vulnerability_scores(model, vanilla, members, reference, **settings)
    assert not torch.allclose(ours["1.weight"], in_eval["1.weight"], rtol=0.1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Frozen(nn.Sequential):
    """A train method that returns nothing, as many people write it."""

    def train(self, mode=True):
        super().train(mode)
        self[2].eval()


def test_layers_in_eval_mode_stay_so_in_a_model_that_trains():
    layers = nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 10)
    model = nn.Sequential(*layers).train()
    model[2].eval()
    model[3].eval()
    scores = [learnability_scores(model, batches(0, 40), steps=3, mode=mode) for mode in ("eval", "train")]
    assert all(torch.equal(score, scores[1][name]) for name, score in scores[0].items())
    assert [layer.training for layer in model] == [True, True, False, False, True]
    frozen = Frozen(*layers)
    frozen.train()
    for mode in ("eval", "train"):
        assert learnability_scores(frozen, batches(0, 40), steps=1, mode=mode).keys() == scores[0].keys()
        assert privacy_vulnerability_scores(frozen, "redraw", batches(0, 40), batches(100, 124), steps=1, mode=mode)
    model.eval()  # a finished model as it is loaded
    again = learnability_scores(model, batches(0, 40), steps=3, mode="train")
    assert not torch.equal(again["4.weight"], scores[0]["4.weight"])


def test_a_batch_of_one_in_train_mode_raises_with_the_fix():
    model, vanilla = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10)) for _ in range(2))
    with pytest.raises(ValueError, match=r"a batch of one example has no batch statistics.*another batch_size"):
        learnability_scores(model, part(0, 9), batch_size=4, steps=3, mode="train")
    with pytest.raises(ValueError, match="a batch of one example"):
        privacy_vulnerability_scores(model, vanilla, part(0, 8), part(20, 29), batch_size=4, steps=3, mode="train")
    assert learnability_scores(model, part(0, 9), batch_size=4, steps=3)


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 6), nn.Linear(6, 10)
        self.register_buffer("size", torch.ones(6))

    def forward(self, x):
        x = self.body(x.flatten(1))
        if self.training:
            self.size.mul_(0.9).add_(x.detach().std(0), alpha=0.1)
        return self.head(x / self.size)


def test_a_model_that_overwrites_what_its_backward_pass_needs_raises_with_the_fix():
    given = Normalised(), Normalised(), batches(0, 40), batches(100, 124)
    with pytest.raises(ValueError, match=r"writes into a tensor .* score with mode=.eval."):
        privacy_vulnerability_scores(*given, steps=2, mode="train")
    assert privacy_vulnerability_scores(*given, steps=2)


def test_dropout_is_drawn_in_train_mode_alone():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    for mode, same in (("eval", True), ("train", False)):
        torch.manual_seed(0)
        first = learnability_scores(model, batches(0, 40), steps=2, mode=mode)
        torch.manual_seed(1)
        again = learnability_scores(model, batches(0, 40), steps=2, mode=mode)
        assert torch.equal(first["2.weight"], again["2.weight"]) is same


def test_learnability_is_privacy_vulnerability_at_lambda_zero():
    model, vanilla = trained()
    members, reference = batches(0, 40), batches(100, 124)
    a = learnability_scores(model, members, steps=5)
    b = privacy_vulnerability_scores(model, vanilla, members, reference, lam=0.0, steps=5)
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_pve_loss_against_loops():
    z, z_re, z_vn = (torch.randn(5, 4) for _ in range(3))
    y = torch.tensor([0, 3, 1, 2, 2])
    ce = formulas.mean([formulas.cross_entropy(row, int(t)) for row, t in zip(z.tolist(), y, strict=True)])
    kl = 0.0
    for p_row, q_row in zip(z_vn.tolist(), z_re.tolist(), strict=True):
        p, q = formulas.softmax(p_row), formulas.softmax(q_row)
        kl += sum(a * (torch.tensor(a).log() - torch.tensor(b).log()).item() for a, b in zip(p, q, strict=True)) / 5
    assert float(pve_loss(z, y, z_re, z_vn, lam=0.7)) == pytest.approx(0.3 * ce + 0.7 * kl, abs=1e-5)


def test_same_seed_same_scores():
    model, vanilla = trained()
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(privacy_vulnerability_scores(model, vanilla, part(0, 64), part(100, 164), steps=3))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


class Parts(nn.Module):
    """A tied weight, an unused layer, an averaged copy, and a layer that not every batch reaches."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.unused = nn.Linear(2, 2)
        self.sometimes = nn.Linear(4, 4)
        self.average = copy.deepcopy(self.a)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        hidden = self.b(self.a(x))
        return self.sometimes(hidden) if self.calls == 2 else hidden


def test_tied_weights_count_once_and_only_what_the_loss_reaches_counts():
    """A part that any one step reaches counts; an averaged copy and an unused layer do not; a warning names them."""
    with pytest.warns(
        UserWarning, match=r"does not reach 4 of 9 trainable parameters \(unused.weight, unused.bias, av"
    ):
        scores = learnability_scores(Parts(), [(torch.randn(6, 4), torch.randint(4, (6,)))], steps=3)
    assert list(scores) == ["a.weight", "a.bias", "b.bias", "sometimes.weight", "sometimes.bias"]
    assert scores["a.weight"].sum() > 0


def test_a_loss_that_reaches_nothing_is_an_error():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="the loss depends on no trainable parameter"):
        learnability_scores(Detached(4, 3), [(torch.randn(6, 4), torch.randint(3, (6,)))], steps=1)


def test_a_list_is_read_again_and_a_generator_raises():
    model = nn.Linear(4, 3)
    data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    learnability_scores(model, data, steps=5)
    with pytest.raises(ValueError, match="cannot be restarted"):
        learnability_scores(model, (batch for batch in data), steps=5)


def test_classification_step_of_the_user_is_used_everywhere():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def classification_step(self, batch):
            left, right, y = batch
            return self.layer(torch.cat([left, right], 1)), y

    data = [(torch.randn(8, 2), torch.randn(8, 2), torch.randint(3, (8,)))]
    other = [(torch.randn(8, 2), torch.randn(8, 2), torch.randint(3, (8,)))]
    scores = privacy_vulnerability_scores(TwoInputs(), TwoInputs(), data, other, steps=2)
    assert scores["layer.weight"].sum() > 0
    with pytest.raises(ValueError, match="are members"):
        privacy_vulnerability_scores(TwoInputs(), TwoInputs(), data, data, steps=2)


def test_batches_are_of_the_asked_size_and_as_many_as_the_steps():
    members = TensorDataset(torch.randn(40, 4), torch.randint(3, (40,)))
    reference = TensorDataset(torch.randn(40, 4), torch.randint(3, (40,)))
    for scores, sizes in (
        (lambda size: learnability_scores(Counting(4, 3), members, steps=3, batch_size=size), [7] * 3),
        (
            lambda size: privacy_vulnerability_scores(
                Counting(4, 3), Counting(4, 3), members, reference, steps=3, batch_size=size
            ),
            [7, 7, 7, 14, 14, 7, 14, 7, 14],  # vanilla, then the copy: apart, together; and so on, together
        ),
    ):
        Counting.sizes = []
        scores(7)
        assert Counting.sizes == sizes
