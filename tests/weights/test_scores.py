import contextlib
import copy
import re
import threading
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback
from lightning_cwrf.weights.correlation import score_correlation, weight_kinds
from lightning_cwrf.weights.score_files import load_scores, save_scores
from lightning_cwrf.weights.scores import learnability_scores, privacy_vulnerability_scores, pve_loss, warn_if_swapped
from lightning_cwrf.weights.vanilla import capture
from tests.helpers import Classifier, loader, part, same_snapshot, snapshot, trained, trainer
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
    with pytest.warns(UserWarning, match="own current weights"):
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


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)


class AttentionNet(nn.Module):
    """Told by its parts: a name with "attention" in it makes no block of the whole model."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"attention": SelfAttention(), "mlp": nn.Linear(4, 4), "drop": nn.PReLU()})
        self.block2 = nn.Linear(4, 4)
        self.bag = nn.EmbeddingBag(3, 4)
        self.up = nn.ConvTranspose1d(1, 1, 1)
        self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(1, 4), nn.RMSNorm(4)])


def test_kinds_by_hand():
    kinds = weight_kinds(AttentionNet())
    assert kinds["block.mlp.weight"] == "attention+MLP"
    assert kinds["block.drop.weight"] == "other"
    assert kinds["block2.weight"] == "linear"  # its name only begins as the block's
    assert kinds["bag.weight"] == "embedding"
    assert kinds["up.weight"] == "conv"
    assert {kinds[name] for name in kinds if name.startswith("norms.")} == {"norm"}
    # A linear layer of an attention layer of the user's own lies inside its block too.
    assert kinds["block.attention.query.weight"] == "attention+MLP"
    for layer in (nn.TransformerDecoderLayer(8, 2, 16), nn.TransformerEncoderLayer(8, 2, 16)):
        kinds = weight_kinds(layer)
        assert {kinds[name] for name in kinds if not name.startswith("norm")} == {"attention+MLP"}
        assert kinds["norm1.weight"] == "norm"


def test_correlation_refuses_scores_of_another_model():
    model = nn.Linear(2, 2)
    both = {"weight": torch.rand(2, 2), "bias": torch.rand(2)}
    weight = {"weight": both["weight"]}
    for a, b, name in (
        (weight, both, "bias"),
        (both, weight, "bias"),
        (weight, {"weight": torch.rand(4, 1)}, "weight"),
        ({"other": torch.rand(2)}, {"other": torch.rand(2)}, "other"),
    ):
        with pytest.raises(ValueError, match=f"the scores of '{name}' are missing"):
            score_correlation(a, b, model)
    assert score_correlation(weight, weight, model) == {"all": pytest.approx(1), "linear": pytest.approx(1)}


def test_scoring_works_on_a_dataset_and_under_no_grad():
    model = Classifier()
    data = TensorDataset(torch.randn(20, 1, 8, 8), torch.randint(10, (20,)))
    with torch.no_grad():
        scores = learnability_scores(model, data, steps=2)
    assert scores["net.5.weight"].sum() > 0


# --- What surrounds the call, and models that are hard to score.

SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad disabled": lambda: torch.set_grad_enabled(False),
}


@contextlib.contextmanager
def default_double():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("surrounding", [*SURROUNDINGS.values(), default_double], ids=[*SURROUNDINGS, "double"])
def test_scores_are_the_same_whatever_surrounds_the_call(surrounding):
    model, vanilla = trained()
    members, reference = batches(0, 40), batches(100, 124)
    plain = (
        privacy_vulnerability_scores(model, vanilla, members, reference, steps=3),
        learnability_scores(model, members, steps=3),
    )
    with surrounding():
        surrounded = (
            privacy_vulnerability_scores(model, vanilla, members, reference, steps=3),
            learnability_scores(model, members, steps=3),
        )
        assert all(p.grad_fn is None for p in model.parameters())
    for a, b in zip(plain, surrounded, strict=True):
        assert all(torch.equal(a[name], b[name]) and b[name].dtype == torch.float32 for name in a)
        assert not any(score.is_inference() for score in b.values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_trainers_mixed_precision_does_not_reach_the_scores(precision):
    model, vanilla = trained()
    callback = PrivacyScoringCallback(batches(100, 124), vanilla, steps=3, members=batches(0, 40))
    expected = privacy_vulnerability_scores(model, vanilla, batches(0, 40), batches(100, 124), steps=3)
    trainer(callbacks=[callback], precision=precision, max_epochs=1).fit(model, loader(0, 32))
    assert all(torch.equal(callback.scores[name], expected[name]) for name in expected)


def test_half_precision_weights_are_scored_on_inputs_of_their_own():
    model, vanilla, members, reference = linear_case()
    scores = privacy_vulnerability_scores(model.bfloat16(), vanilla, members, reference, steps=2)
    assert scores["weight"].sum() > 0

    class Half(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].bfloat16(), batch[1]), batch_idx)

    half = Half().bfloat16()
    callback = PrivacyScoringCallback(loader(100, 140), capture(Half()), steps=2)
    trainer(callbacks=[callback], max_epochs=1).fit(half, loader(0, 32))
    assert callback.scores["net.5.weight"].sum() > 0


def test_random_scores_are_of_what_the_loss_reaches_and_fit_a_mask_in_any_default_precision():
    class WithAverage(Classifier):
        def __init__(self):
            super().__init__()
            self.average = copy.deepcopy(self.net)

    for kind in ("random", "learnability", "privacy"):
        torch.manual_seed(0)
        model = WithAverage()
        vanilla = {n: t + 0.1 for n, t in capture(model).items()}
        scoring = PrivacyScoringCallback(loader(100, 140), vanilla, steps=1, kind=kind)
        rewind = CriticalRewindCallback(rate=0.1)
        with pytest.warns(UserWarning, match="does not reach 6 of 12 trainable parameters"), default_double():
            trainer(callbacks=[scoring, rewind, GradientMaskCallback()], max_epochs=1).fit(model.float(), loader(0, 32))
        own = sum(p.numel() for p in model.net.parameters())
        assert rewind.mask.total == own
        assert rewind.mask.count == round(0.1 * own)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("model.pt", TypeError, "model must be a torch.nn.Module, not str"),
        (nn.Linear, TypeError, "not the class Linear; pass an instance"),
        (nn.Sequential(nn.LazyLinear(3)), ValueError, r"lazy parameters without a shape yet \(0.weight, 0.bias\)"),
    ],
)
def test_what_is_no_model_or_has_no_shapes_yet(model, error, message):
    with pytest.raises(error, match=message):
        learnability_scores(model, [(torch.randn(8, 4), torch.randint(3, (8,)))])


def test_a_model_that_cannot_be_copied_is_named():
    model, vanilla, members, reference = linear_case()
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"Linear cannot be copied .attribute 'lock' of type lock"):
        privacy_vulnerability_scores(model, vanilla, members, reference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": "0.7"}, "lam must be a number, not the str '0.7'. It weights"),
        ({"lam": True}, "lam must be a number, not the bool True"),
        ({"lam": None}, "lam must be a number, not None"),
        ({"steps": 30.0}, "steps must be an integer, not the float 30.0"),
        ({"steps": "30"}, "steps must be an integer, not the str '30'"),
        ({"lr": "1e-3"}, "lr must be a number, not the str '1e-3'"),
    ],
)
def test_settings_of_the_wrong_type(settings, message):
    for make in (
        lambda: privacy_vulnerability_scores(*linear_case(), **settings),
        lambda: PrivacyScoringCallback([], "redraw", **settings),
    ):
        with pytest.raises(TypeError, match=re.escape(message)):
            make()


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


class Detached(nn.Module):
    """Uses its weight a second time, detached: the old value is needed when its gradient is known already."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 3)

    def forward(self, x):
        # The way back comes to a's gradient first, and to the detached use, which first's gradient needs, after it.
        return self.b(torch.tanh(self.a(F.linear(self.first(x), self.a.weight.detach()))))


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


def test_an_error_of_the_users_backward_is_the_users():
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
def test_the_vanilla_model_answers_the_same_whether_it_is_kept_or_not(width):
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


def test_score_files(tmp_path):
    scores = {"weight": torch.rand(3, 4), "bias": torch.rand(3)}
    path = save_scores(scores, tmp_path / "scores.safetensors")
    assert all(torch.equal(load_scores(path)[name], score) for name, score in scores.items())
    safetensors.torch.save_file(scores, tmp_path / "foreign.safetensors")
    assert load_scores(tmp_path / "foreign.safetensors").keys() == scores.keys()
    (tmp_path / "junk").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="junk is no file of scores: it is damaged"):
        load_scores(tmp_path / "junk")
    with pytest.raises(FileNotFoundError, match="no file of scores"):
        load_scores(tmp_path / "none")


class Mixing(nn.Linear):
    """Its outputs depend on the whole batch."""

    def forward(self, x):
        z = super().forward(x)
        return z - z.mean(0)


class OneSize(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(8, -1))


class Counting(nn.Linear):
    def forward(self, x):
        self.sizes.append(len(x))
        return super().forward(x)

    sizes = []


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


def test_a_vanilla_model_whose_outputs_are_held_answers_once_a_step():
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


def test_defaults_are_the_published_settings():
    """30 batches of 256, λ = 0.7; and η_e = 1e-3, which the paper does not state."""
    members = TensorDataset(torch.randn(257, 4), torch.randint(3, (257,)))
    reference = TensorDataset(torch.randn(257, 4), torch.randint(3, (257,)))
    model, vanilla = Counting(4, 3), Counting(4, 3)
    settings = {"steps": 30, "lr": 1e-3, "batch_size": 256}
    for scores, explicit in (
        (lambda **given: learnability_scores(model, members, **given), settings),
        (
            lambda **given: privacy_vulnerability_scores(model, vanilla, members, reference, **given),
            {**settings, "lam": 0.7},
        ),
    ):
        found, done = [], []
        for given in ({"on_step": done.append}, explicit):
            torch.manual_seed(0)
            Counting.sizes = []
            found.append(scores(**given))
            assert 256 in Counting.sizes
            assert 257 not in Counting.sizes
        assert done == list(range(1, 31))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_holds_an_example_at_least(size):
    model, vanilla, members, reference = linear_case()
    for make in (
        lambda: learnability_scores(model, members, batch_size=size),
        lambda: privacy_vulnerability_scores(model, vanilla, members, reference, batch_size=size),
        lambda: PrivacyScoringCallback([], "redraw", batch_size=size),
    ):
        with pytest.raises(ValueError, match=f"batch_size must be an integer of at least 1, not {size}"):
            make()


def logits_of(losses):
    """Two logits for each example, of which the first is the true class's, with the given cross-entropy."""
    z = torch.tensor(losses, dtype=torch.float64).expm1().log()  # ln(1 + e^z) is the loss
    return torch.stack([torch.zeros_like(z), z], 1), torch.zeros(len(losses), dtype=torch.long)


@pytest.mark.parametrize(
    ("members", "reference", "told"),
    [
        # A variance of 8/7 on both sides: the difference has the error sqrt(2/7), and four of them are 2.138.
        ([2.7, 4.7] * 4, [0.5, 2.5] * 4, True),
        ([2.6, 4.6] * 4, [0.5, 2.5] * 4, False),
        ([0.5, 2.5] * 4, [2.7, 4.7] * 4, False),
        # 8/7 and 12/11 on 8 and 12 examples: the error is sqrt(1/7 + 1/11), and four of them 1.934.
        ([2.5, 4.5] * 6, [0.5, 2.5] * 4, True),
        ([2.4, 4.4] * 6, [0.5, 2.5] * 4, False),
        ([5.0, 7.0] * 3 + [6.0], [0.5, 2.5] * 4, False),  # seven are too few to tell
        ([5.0, 7.0] * 4, [0.5, 2.5] * 3 + [1.5], False),
        ([5.0, 7.0] * 4, [0.5, 2.5] * 4, True),
        ([1.0] * 8, [1.0] * 8, False),  # a model that tells nothing apart
    ],
)
def test_sides_are_swapped_where_their_losses_differ_by_four_errors(members, reference, told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_swapped(*logits_of(members), *logits_of(reference))
    assert [("swapped" in str(w.message)) for w in caught] == [True] * told
