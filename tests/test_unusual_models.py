"""Modules that are more than layers with parameters: compiled, reparametrized, tied, with attributes of their own."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback
from lightning_cwrf.weights.copies import copied
from lightning_cwrf.weights.scores import learnability_scores, privacy_vulnerability_scores
from lightning_cwrf.weights.vanilla import capture, load_vanilla, redraw, save_vanilla
from tests.callbacks.helpers import finished
from tests.helpers import Classifier, loader, trainer


def batches(count=3, shape=(6,), seed=0, words=None):
    generator = torch.Generator().manual_seed(seed)

    def inputs():
        if words is not None:
            return torch.randint(words, (16, *shape), generator=generator)
        return torch.randn(16, *shape, generator=generator)

    return [(inputs(), torch.randint(5, (16,), generator=generator)) for _ in range(count)]


def slow_scores(model, vanilla, members, references, lam=0.7, steps=4, lr=0.05):
    """Algorithm 1 in float64: two forward passes, all gradients first, then all updates."""
    work, start = (copied(each).double().eval() for each in (model, vanilla))
    double = [[(x.double() if x.is_floating_point() else x, y) for x, y in side] for side in (members, references)]
    weights = {name: p for name, p in work.named_parameters() if p.requires_grad}
    scores = {name: torch.zeros_like(p) for name, p in weights.items()}
    for i in range(steps):
        (x, y), (x_re, _) = (side[i % len(side)] for side in double)
        with torch.no_grad():
            target = start(x_re).log_softmax(-1)
        divergence = F.kl_div(work(x_re).log_softmax(-1), target, log_target=True, reduction="batchmean")
        work.zero_grad()
        ((1 - lam) * F.cross_entropy(work(x), y) + lam * divergence).backward()
        with torch.no_grad():
            for name, p in weights.items():
                if p.grad is not None:
                    scores[name] += (p.grad * p).abs()
            for p in weights.values():
                if p.grad is not None:
                    p -= lr * p.grad
    return scores


class Convolutional(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5)
        )
        self[1].running_mean.normal_()
        self[1].running_var.uniform_(0.5, 2)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layers(self.embed(x)).mean(1))


class MixesTheBatch(Transformer):
    """Attention over the batch: two batches as one would be another model."""

    def forward(self, x):
        return self.head(self.layers(self.embed(x).mean(1).unsqueeze(0)).squeeze(0))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.tanh(self.inner(self.embed(x).mean(1))))


class Checkpointed(nn.Module):
    """One layer, thrice; its gradient comes in three parts where the checkpoints are reentrant."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def block(self, x):
        return torch.tanh(self.inner(x))

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(x)


def reparametrized(how):
    def make():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            made = nn.Sequential(how(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 5))
        made(torch.randn(2, 6))  # the old ones keep the computed weight, which deepcopy refuses
        return made

    return make


MODELS = {
    "convolutional": (Convolutional, {"shape": (1, 8, 8)}),
    "channels last": (lambda: Convolutional().to(memory_format=torch.channels_last), {"shape": (1, 8, 8)}),
    "transformer": (Transformer, {"shape": (7,), "words": 20}),
    "mixes the batch": (MixesTheBatch, {"shape": (7,), "words": 20}),
    "tied": (Tied, {"shape": (7,), "words": 20}),
    "checkpoints": (lambda: Checkpointed(False), {}),
    "reentrant checkpoints": (lambda: Checkpointed(True), {}),
    "weight_norm": (reparametrized(nn.utils.weight_norm), {}),
    "spectral_norm": (reparametrized(nn.utils.spectral_norm), {}),
    "parametrizations.weight_norm": (reparametrized(nn.utils.parametrizations.weight_norm), {}),
    "parametrizations.orthogonal": (reparametrized(nn.utils.parametrizations.orthogonal), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_slow_way_in_double_precision(name):
    make, data = MODELS[name]
    torch.manual_seed(0)
    model, vanilla = make(), make()
    members, references = batches(**data), batches(seed=1, **data)
    found = privacy_vulnerability_scores(model, vanilla, members, references, steps=4, lr=0.05)
    for parameter, expected in slow_scores(model, vanilla, members, references).items():
        assert torch.allclose(found[parameter].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_the_score_of_a_complex_weight_is_the_first_order_change_where_it_is_set_to_zero():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 5, dtype=torch.cfloat))

        def forward(self, x):
            return (x.to(self.w.dtype) @ self.w).abs()

    class Real(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.parts = nn.Parameter(torch.view_as_real(w.detach()).clone())

        def forward(self, x):
            return ((x @ self.parts[..., 0]) ** 2 + (x @ self.parts[..., 1]) ** 2).sqrt()

    model = Complex()
    real = Real(model.w)
    ((x, y),) = batches(1)
    F.cross_entropy(real(x), y).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = learnability_scores(model, [(x, y)], steps=1)
    assert torch.allclose(scores["w"], (real.parts.grad * real.parts).sum(-1).abs(), rtol=1e-4)


def test_a_copy_that_computes_with_the_models_own_weights_is_an_error():
    class Closes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 5)
            self.encode = lambda x: torch.tanh(self.inner(x))

        def forward(self, x):
            return self.head(self.encode(x))

    with pytest.raises(ValueError, match=r"a copy of this Closes still computes with the 'inner\.\w+' of the model"):
        learnability_scores(Closes(), batches(), steps=2)


def hardened(model, vanilla, fitted=None):
    callbacks = [PrivacyScoringCallback(loader(100, 140), vanilla, steps=2), CriticalRewindCallback(0.3)]
    callbacks.append(GradientMaskCallback())
    torch.manual_seed(1)
    trainer(callbacks=callbacks).fit(model if fitted is None else fitted, loader(0, 32))
    masks = callbacks[1].mask.masks
    assert all(torch.equal(model.get_parameter(n)[m], vanilla[n][m]) for n, m in masks.items())
    assert sum(int(m.sum()) for m in masks.values()) == callbacks[1].mask.count > 0
    return masks


@pytest.mark.slow
def test_a_compiled_lightning_module_is_hardened_as_it_is_uncompiled():
    model, vanilla = finished()
    plain, _ = finished()
    masks = hardened(model, vanilla, torch.compile(model, backend="eager"))
    expected = hardened(plain, vanilla)
    assert all(torch.equal(m, expected[n]) for n, m in masks.items())
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


class OldNorms(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(self.net[5])
            nn.utils.spectral_norm(self.net[0])


class KeepsItsFeatures(Classifier):
    def forward(self, x):
        self.features = self.net[:4](x)
        return self.net[4:](self.features)


@pytest.mark.parametrize("make", [OldNorms, KeepsItsFeatures])
def test_modules_that_hold_computed_tensors_are_hardened(make):
    model, vanilla = finished(make)
    model(torch.rand(2, 1, 8, 8))
    hardened(model, vanilla)


@pytest.mark.parametrize("how", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_redraw_refuses_layers_whose_reset_does_not_reach_the_weights(how):
    model = reparametrized(how)()
    with pytest.raises(ValueError, match=r"cannot draw the parameters of 0 \(Linear: weight_\w+"):
        redraw(model)


def test_redraw_refuses_a_reset_that_leaves_a_parameter():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

        def reset_parameters(self):
            nn.init.normal_(self.weight)

    with pytest.raises(ValueError, match=r"cannot draw the parameters of 0 \(Scaled: scale\)"):
        redraw(nn.Sequential(Scaled()))


def test_extra_state_of_modules_is_no_weight(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"calls": 1}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(Extra(6, 5))
    path = save_vanilla(model, tmp_path / "init.safetensors")
    other = nn.Sequential(Extra(6, 5))
    assert torch.equal(load_vanilla(path, other)["0.weight"], model[0].weight)
    assert privacy_vulnerability_scores(other, path, batches(), batches(seed=1), steps=1)


def test_vanilla_weights_in_which_tied_ones_differ_are_an_error():
    state = capture(Tied())
    state["out.weight"] = state["out.weight"] + 1
    with pytest.raises(
        ValueError, match=r"'embed\.weight' and 'out\.weight' differ, but in the model they are the same"
    ):
        load_vanilla(state, copy.deepcopy(Tied()))
