"""Initial weights drawn again as a library's own classes draw them: Hugging Face, timm, PEFT, and stand-ins of them."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback
from lightning_cwrf.weights.redraw import fresh_weights, redraw
from lightning_cwrf.weights.vanilla import capture, load_vanilla
from tests.helpers import Classifier, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:vanilla='redraw'")


class HuggingFace(nn.Module):
    """``_init_weights`` for each layer, which leaves layers that it has initialised before as they are."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 64)
        self.scale = nn.Parameter(torch.full((8,), 3.0))
        self.init_weights()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.25)
            nn.init.zeros_(module.bias)
        if isinstance(module, HuggingFace):
            nn.init.constant_(module.scale, 3.0)

    def _initialize_weights(self, module):
        if not getattr(module, "_is_hf_initialized", False):
            self._init_weights(module)
        module._is_hf_initialized = True

    def init_weights(self):
        self.apply(self._initialize_weights)


class Timm(nn.Module):
    """Parameters of the model itself, which ``init_weights`` alone sets; its argument has a default."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails
        self.token = nn.Parameter(torch.zeros(4))
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.init_weights()

    def init_weights(self, mode=""):
        nn.init.constant_(self.token, 2.0)
        nn.init.constant_(self.head.weight, 0.5)
        nn.init.constant_(self.norm.running_mean, 9.0)
        if self.fails and mode == "" and self.token.requires_grad and self.norm.training is False:
            raise RuntimeError("no such mode")


class Lora(nn.Module):
    """A layer with an adapter: the first matrix is drawn, the second one is zero."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.reset_lora_parameters("default", True)

    def reset_lora_parameters(self, adapter_name, init_lora_weights):
        if init_lora_weights is False:
            return
        if init_lora_weights not in (True, "gaussian"):
            raise ValueError(f"unknown {init_lora_weights}")
        std = 10.0 if init_lora_weights == "gaussian" else 0.01
        nn.init.normal_(self.lora_A[adapter_name].weight, std=std)
        nn.init.zeros_(self.lora_B[adapter_name].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Config:
    def __init__(self, init_lora_weights):
        self.init_lora_weights = init_lora_weights


class Adapted(Classifier):
    """A frozen backbone with an adapter, inside a LightningModule, and a head that is trained as a whole."""

    def __init__(self, init=True):
        super().__init__()
        self.peft_config = {"default": Config(init)}
        self.net = nn.Sequential(nn.Flatten(), Lora(nn.Linear(64, 16)), nn.ReLU(), nn.Linear(16, 10))


def moved(model):
    """As if trained: every trainable weight is elsewhere."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1 + torch.randn_like(p))
    return model


def test_the_initialisation_for_each_layer_is_applied():
    drawn = redraw(moved(HuggingFace()))
    assert set(drawn["head.weight"].unique().tolist()) == {0.25}
    assert not drawn["head.bias"].any()
    assert set(drawn["scale"].tolist()) == {3.0}
    assert 0.5 < float(drawn["embed.weight"].std()) < 1.5


def test_it_is_applied_to_models_inside_a_module():
    model = Classifier()
    model.backbone, model.other = HuggingFace(), nn.Linear(4, 4)
    drawn = redraw(moved(model))
    assert set(drawn["backbone.head.weight"].unique().tolist()) == {0.25}
    assert drawn["other.weight"].unique().numel() == 16


def test_one_without_init_weights_is_applied_layer_by_layer():
    class Nano(HuggingFace):
        init_weights = None

        def __init__(self):
            nn.Module.__init__(self)
            self.head, self.scale = nn.Linear(8, 64), nn.Parameter(torch.full((8,), 3.0))

    assert set(redraw(moved(Nano()))["head.weight"].unique().tolist()) == {0.25}


def test_a_model_whose_own_parameters_init_weights_sets():
    drawn = redraw(moved(Timm()))
    assert drawn["token"].tolist() == [2.0] * 4
    assert set(drawn["head.weight"].unique().tolist()) == {0.5}


def test_an_initialisation_does_not_reach_what_is_frozen():
    model = Timm()
    model.norm.requires_grad_(False)
    model.token.requires_grad_(False)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(7)
    drawn = redraw(model)
    assert drawn["token"].tolist() == drawn["norm.running_mean"].tolist() == [7.0] * 4
    assert set(drawn["head.weight"].unique().tolist()) == {0.5}


def test_an_initialisation_that_fails_is_an_error_with_the_fix():
    model = moved(Timm(fails=True)).eval()
    with pytest.raises(ValueError, match=r"the initialisation of Timm failed \(RuntimeError: no such mode\)\. Instead"):
        redraw(model)


def test_the_warning_names_the_initialisation():
    with pytest.warns(UserWarning, match="each layer's reset_parameters and the initialisation of Timm"):
        redraw(Timm())


@pytest.mark.parametrize(("init", "low", "high"), [(True, 0.003, 0.03), ("gaussian", 3, 30)])
def test_an_adapter_is_drawn_by_its_own_initialisation(init, low, high):
    model = moved(Adapted(init))
    before, drawn = capture(model), redraw(model)
    assert low < float(drawn["net.1.lora_A.default.weight"].std()) < high
    assert not drawn["net.1.lora_B.default.weight"].any()
    for frozen in ("net.1.base_layer.weight", "net.1.base_layer.bias"):
        assert torch.equal(drawn[frozen], before[frozen])
    assert not torch.equal(drawn["net.3.weight"], before["net.3.weight"])


def test_an_adapter_without_initialisation_keeps_its_layers_own():
    drawn = redraw(moved(Adapted(False)))
    assert 0 < float(drawn["net.1.lora_B.default.weight"].abs().max()) <= 2**-0.5


def test_an_adapter_that_cannot_be_drawn_again_is_an_error():
    with pytest.raises(ValueError, match=r"reset_lora_parameters\('default', 'pissa'\) failed \(unknown pissa\)"):
        redraw(moved(Adapted("pissa")))


def test_a_fine_tuned_adapter_is_hardened():
    torch.manual_seed(0)
    model = Adapted()
    frozen = copy.deepcopy(model.net[1].base_layer.state_dict())
    trainer(max_epochs=20).fit(model, loader(0, 64))
    callbacks = [PrivacyScoringCallback([], "redraw", kind="random"), CriticalRewindCallback(0.3)]
    trainer(max_epochs=1, callbacks=[*callbacks, GradientMaskCallback()]).fit(model, loader(0, 64))
    mask = callbacks[1].mask
    assert set(mask.masks) == {name for name, p in model.named_parameters() if p.requires_grad}
    rewound = model.net[1].lora_B["default"].weight[mask.masks["net.1.lora_B.default.weight"]]
    assert len(rewound)
    assert not rewound.any()
    assert all(torch.equal(value, frozen[n]) for n, value in model.net[1].base_layer.state_dict().items())


def test_a_pretrained_checkpoint_is_the_vanilla_weights_of_a_fine_tuned_model(tmp_path):
    pretrained = Classifier()
    run = trainer(max_epochs=1)
    run.fit(pretrained, loader(400, 464))
    run.save_checkpoint(tmp_path / "pretrained.ckpt")
    model = Classifier.load_from_checkpoint(tmp_path / "pretrained.ckpt")
    trainer(max_epochs=1).fit(model, loader(0, 64))
    with pytest.raises(ValueError, match=r"is a checkpoint from after training .* If it was trained on other data"):
        load_vanilla(tmp_path / "pretrained.ckpt", model)
    state = torch.load(tmp_path / "pretrained.ckpt", weights_only=True)["state_dict"]
    callbacks = [PrivacyScoringCallback(loader(100, 140), state, steps=2), CriticalRewindCallback(0.2)]
    trainer(max_epochs=1, callbacks=[*callbacks, GradientMaskCallback()]).fit(model, loader(0, 64))
    for name, chosen in callbacks[1].mask.masks.items():
        assert torch.equal(model.get_parameter(name)[chosen], pretrained.get_parameter(name)[chosen])


# --- The libraries themselves.


def bert(**settings):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=100, num_labels=2, **size, **settings)
    return transformers.BertForSequenceClassification(config)


def check_like_new(make):
    """Means and spreads of the redrawn weights are those of new ones, where there are enough of them."""
    fresh, drawn = make(), redraw(moved(make()))
    assert all(torch.isfinite(value).all() for value in drawn.values())
    for name, p in fresh.named_parameters():
        if p.numel() < 64 and p.unique().numel() > 1:
            continue
        spread = float(p.detach().std(correction=0))
        assert float(drawn[name].std(correction=0)) == pytest.approx(spread, rel=0.35, abs=1e-3), name
        assert float(drawn[name].mean()) == pytest.approx(float(p.detach().mean()), abs=0.02 + 0.3 * spread), name


def test_hugging_face_models():
    check_like_new(lambda: bert(initializer_range=0.1))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_timm_models(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2} if "vit" in name else {}
    check_like_new(lambda: timm.create_model(name, num_classes=5, **small))


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_peft_models(init):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query", "word_embeddings"], init_lora_weights=init
    )
    model = moved(peft.get_peft_model(bert(), config))
    before, drawn = capture(model), redraw(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(drawn[name], before[name]) for name in before.keys() - trained)
    zero = {name for name in trained if not drawn[name].any()}
    assert zero == {n for n in trained if "lora_B" in n or "lora_embedding_A" in n or n.endswith("bias")}
    first = next(name for name in trained if "lora_A" in name)
    bound = 0.25 if init == "gaussian" else 32**-0.5 / 3**0.5  # of the standard deviation
    assert float(drawn[first].std()) == pytest.approx(bound, rel=0.3)


def test_an_initialisation_of_peft_that_changes_the_frozen_weights_is_an_error():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"reset_lora_parameters\('default', 'pissa'\) failed"):
        redraw(peft.get_peft_model(bert(), config))


class Loading(nn.Module):
    """A class whose ``init_weights`` loads what was saved, which may be trained weights."""

    def __init__(self, sizes=(20, 8)):
        super().__init__()
        self.head, self.other = nn.Linear(*sizes), nn.Linear(*sizes)
        self.saved = {}

    def init_weights(self):
        self.load_state_dict(self.saved, strict=False)


@pytest.mark.parametrize(("sizes", "kept"), [((20, 8), "head."), ((20, 8), ""), ((3, 2), "")])
def test_an_initialisation_that_gives_the_models_own_weights_is_an_error(sizes, kept):
    model = Loading(sizes)
    model.saved = {name: value.clone() for name, value in model.state_dict().items() if name.startswith(kept)}
    with pytest.raises(ValueError, match=r"drew the model's own current weights of head\.weight.*Instead, pass"):
        redraw(model)
    moved(model)
    redraw(model)  # of the saved state, but trained since


# --- Fresh values, from a seed.


def test_fresh_weights_are_a_function_of_the_seed():
    model = Classifier()
    state = torch.get_rng_state()
    first, again, other = (fresh_weights(model, seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.isclose(first["net.0.weight"], other["net.0.weight"]).any()
    torch.manual_seed(3)
    assert not torch.isclose(first["net.0.weight"], Classifier().net[0].weight).any()
    assert first["net.0.weight"].abs().max() <= 1 / 3  # the bound of a convolution over nine pixels


def test_fresh_weights_that_are_the_initial_ones_are_an_error():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(20, 20)
            self.init_weights()

        def init_weights(self):
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                self.head.weight.normal_(generator=generator)

    initial = capture(Fixed())
    with pytest.raises(ValueError, match=r"values='fresh' drew the model's initial weights of head\.weight.*'initial'"):
        fresh_weights(moved(Fixed()), 0, initial)


def test_fresh_weights_of_another_spread_are_told():
    model = nn.Sequential(nn.Linear(20, 20))
    with pytest.warns(UserWarning, match=r"spread unlike the initial ones .*0\.weight 0\.13 instead of 1\."):
        fresh_weights(model, 0, {"0.weight": torch.randn(20, 20), "0.bias": torch.zeros(20)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh_weights(model, 0, capture(nn.Sequential(nn.Linear(20, 20))))


def test_fresh_weights_keep_what_is_frozen_and_need_a_way_to_be_drawn():
    model = moved(Adapted())
    drawn, before = fresh_weights(model, 0), capture(model)
    assert torch.equal(drawn["net.1.base_layer.weight"], before["net.1.base_layer.weight"])
    bare = nn.Linear(3, 3)
    bare.extra = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"values='fresh' cannot draw .*\(Linear: extra\).* leave values at 'initial'"):
        fresh_weights(bare, 0)
