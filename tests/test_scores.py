import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

from lightning_cwrf.scores import (
    learnability_scores,
    privacy_vulnerability_scores,
    pve_loss,
    score_correlation,
    weight_kinds,
)
from tests.helpers import Classifier, loader, part, same_snapshot, snapshot, trained
from tests.oracles import formulas


def batches(begin, end, size=8):
    return list(loader(begin, end, size))


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


@pytest.mark.usefixtures("rng_untouched")
def test_scoring_leaves_model_and_rng_untouched():
    rng = torch.get_rng_state()
    model, vanilla = trained()
    model.train()
    model.net[1].eval()  # a frozen BatchNorm, a mode of its own
    model.net[0].weight.requires_grad_(False)
    model(next(iter(loader(0, 8)))[0]).sum().backward()
    before = snapshot(model)
    torch.set_rng_state(rng)
    data = DataLoader(part(0, 40), batch_size=8, shuffle=True)
    scores = privacy_vulnerability_scores(model, vanilla, data, loader(100, 140), steps=6)
    same_snapshot(before, snapshot(model))
    assert "net.0.weight" not in scores
    assert "net.0.bias" in scores


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


def test_a_list_is_begun_again_and_a_generator_says_why_not():
    model = nn.Linear(4, 3)
    data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    learnability_scores(model, data, steps=5)
    with pytest.raises(ValueError, match="cannot be begun again"):
        learnability_scores(model, (batch for batch in data), steps=5)


def linear_case():
    members = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    reference = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    return nn.Linear(4, 3), nn.Linear(4, 3), members, reference


def test_overlap_is_found_by_content_and_named():
    model, vanilla, members, reference = linear_case()
    reference[0][0][3] = members[0][0][5]
    with pytest.raises(ValueError, match=r"1 of the 8 examples of nonmembers are members"):
        privacy_vulnerability_scores(model, vanilla, members, reference)


def test_overlap_is_found_wherever_it_is_and_counted_whole():
    model, vanilla = trained()
    with pytest.raises(ValueError, match="3 of the 1003 examples of nonmembers"):
        privacy_vulnerability_scores(model, vanilla, part(0, 64), part(61, 1064), steps=1)


def test_probabilities_are_refused():
    _, _, members, reference = linear_case()
    model, vanilla = (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)) for _ in range(2))
    with pytest.raises(ValueError, match="are probabilities"):
        privacy_vulnerability_scores(model, vanilla, members, reference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"lam": 1.2}, "lam must be a number in"),
        (lambda c: {"steps": 0}, "steps must be an integer of at least 1"),
        (lambda c: {"lr": -1.0}, "lr must be a number of at least 0, not -1.0"),
        (lambda c: {"lr": float("inf")}, "lr must be a number of at least 0, not inf"),
        (lambda c: c["members"].clear() or {}, "members holds no batch"),
        (lambda c: c["nonmembers"].clear() or {}, "nonmembers holds no batch"),
        (lambda c: c["members"][0][1].fill_(3) is None or {}, "label 3 is out of range"),
        (lambda c: c["members"][0][0].fill_(float("nan")) is None or {}, "NaN or infinite"),
        (lambda c: {"lr": 3e38}, "NaN or infinite|scoring loss is"),
    ],
)
def test_bad_input_is_a_clear_error(change, message):
    model, vanilla, members, reference = linear_case()
    case = {"members": members, "nonmembers": reference}
    extra = change(case)
    case.update(extra if isinstance(extra, dict) else {})
    with pytest.raises(ValueError, match=message):
        privacy_vulnerability_scores(model, vanilla, **case)


def test_the_models_own_weights_are_doubtful_vanilla_weights():
    model, _, members, reference = linear_case()
    with pytest.warns(UserWarning, match="own present weights"):
        privacy_vulnerability_scores(model, copy.deepcopy(model), members, reference)


def test_nothing_trainable_is_an_error():
    model, vanilla, members, reference = linear_case()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to score"):
        privacy_vulnerability_scores(model, vanilla, members, reference)


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


def test_kinds_and_correlation_of_a_vit():
    vit = VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=10)
    kinds = weight_kinds(vit)
    assert kinds["conv_proj.weight"] == "conv"
    assert kinds["encoder.layers.encoder_layer_0.mlp.0.weight"] == "attention+MLP"
    assert kinds["encoder.layers.encoder_layer_1.self_attention.in_proj_weight"] == "attention+MLP"
    assert kinds["encoder.layers.encoder_layer_1.self_attention.out_proj.bias"] == "attention+MLP"
    assert kinds["encoder.ln.weight"] == "norm"
    assert kinds["heads.head.weight"] == "linear"
    assert kinds["class_token"] == "other"
    a = {name: torch.rand_like(p) for name, p in vit.named_parameters()}
    b = {name: torch.rand_like(p) + a[name] for name, p in vit.named_parameters()}
    found = score_correlation(a, b, vit)
    for kind in set(kinds.values()) | {"all"}:
        names = [n for n in kinds if kind in ("all", kinds[n])]
        flat = [[v for n in names for v in s[n].flatten().tolist()] for s in (a, b)]
        assert found[kind] == pytest.approx(formulas.pearson(*flat), abs=1e-9), kind


def test_head_of_a_flat_attention_model_is_linear():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 8)
            self.attn = nn.MultiheadAttention(8, 2)
            self.head = nn.Linear(8, 3)

    kinds = weight_kinds(Flat())
    assert kinds["head.weight"] == "linear"
    assert kinds["attn.out_proj.weight"] == "attention+MLP"
    assert kinds["embed.weight"] == "embedding"


def test_correlation_refuses_scores_of_another_model():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'bias'"):
        score_correlation({"weight": torch.rand(2, 2)}, {"weight": torch.rand(2, 2), "bias": torch.rand(2)}, model)


def test_scoring_works_on_a_dataset_and_under_no_grad():
    model = Classifier()
    data = TensorDataset(torch.randn(20, 1, 8, 8), torch.randint(10, (20,)))
    with torch.no_grad():
        scores = learnability_scores(model, data, steps=2)
    assert scores["net.5.weight"].sum() > 0
